"""The masks of all chains, and how they learn: a step and a draw inside the training forward.

With r the real-valued mask (C,) of one consumer's branch, K the fan-in, m the mask in use, and g = dl/dm the gradient
that the previous training forward left, whichever optimizer trains the weights:

    r <- clip(r - lr * g, 0, 1)              the step of the previous iteration
    r <- max(r, FLOOR),  r <- r / sum(r)     stored
    m =  K distinct draws from r             zeros and ones; K * r / sum(r) where the connectivity is "real"
    dl/dr := dl/dm                           straight-through, for all entries, drawn or not

Draws are exponential races: with e_k ~ Exp(1), the order of r_k / e_k from the largest down has the law of drawing
without replacement with probabilities r, since e_k / r_k is the first arrival of a process of rate r_k.

Reference: Connectivity learning in multi-branch networks (2017), Algorithm 1; published as Ahmed & Torresani,
MaskConnect (2018). The floor is not in the paper.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from surgery.errors import InvalidOption, UnsupportedModel
from surgery.objective import unwrap
from surgery.taps import in_backward
from surgery_masked.averaging import average_gradient, process_mean

Connectivity = Literal["learned", "full", "random", "real"]

# A row has to keep K positive entries to draw from. Those at the floor are hardly ever drawn, but they still get a
# gradient, which can revive them.
FLOOR = 1e-4

_WORD = 0xFFFFFFFF
_STREAM = 0x3C6EF372


class Masks(nn.Module):
    """The masks of all pairs of consecutive masked blocks: which branches of the producer each branch reads.

    In train mode with gradients enabled, masks that learn consume the gradient of the previous such forward and are
    drawn anew, once for the whole batch. Otherwise the mask that stands is returned and nothing changes: the K largest
    of every row of `real`, or K * real / sum(real) while "real" learns; a gradient that is not consumed yet does not
    count in it.

    Every training forward is an iteration of the masks, also where gradients are accumulated over several. Backward
    passes through one forward add up; of two forwards without a backward pass between them only the last can leave a
    gradient, and `torch.autograd.grad` leaves none. In a distributed run the gradients are averaged over the processes
    at the end of every backward pass, so all of them run the same numbers of training forwards and backward passes (one
    that leaves a backward pass out counts with zeros, and lets the others wait until its next training forward), and
    the state of any of them is that of all.

    A recomputation in the backward pass uses the masks of its forward pass; under a reentrant checkpoint around the
    whole network, whose forward pass has no gradients, masks do not learn.

    Args:
        pairs: Number of masks L'.
        branches: C.
        fan_in: K in [1, C]; C for "full".
        connectivity: "learned" draws; "real" takes the real-valued masks; "full" and "random" are constant.
        lr: Learning rate of the masks.
        seed: Of the draws, in [-2^63, 2^63); equal seeds and counters give equal draws on every replica.
        fixed: For "random": the K branches that each branch reads, (L', C, K).

    Attributes:
        real: Real-valued masks (L', C, C): row j is the consumer's branch, column k the producer's; rows sum to 1.
        drawn: Number of draws so far.
        seed: As above.
        lr: As above; it may be changed at any time, and is not part of a checkpoint.
        frozen: Whether the K largest are fixed.
        gradient_scale: Called at every training forward for the factor on the loss of that iteration; see
            `set_grad_scaler`.

    Shape:
        image (B, ...), which is not read; returns (L', C, C) with the dtype of `real`.

    Raises:
        InvalidOption: If the fan-in, or what is fixed, does not fit.
    """

    real: Tensor
    drawn: Tensor
    seed: Tensor

    def __init__(
        self,
        pairs: int,
        branches: int,
        fan_in: int,
        *,
        connectivity: Connectivity,
        lr: float,
        seed: int,
        fixed: Tensor | None = None,
    ) -> None:
        super().__init__()
        _check_fan_in(fan_in, branches, connectivity)
        _check_fixed(fixed, (pairs, branches, fan_in), connectivity)
        real = torch.full((pairs, branches, branches), 1 / branches)
        if fixed is not None:
            real = torch.zeros_like(real).scatter(-1, fixed, 1 / fan_in)
        self.register_buffer("real", real)
        self.register_buffer("drawn", torch.tensor(0))
        self.register_buffer("seed", torch.tensor(seed))
        self.fan_in = fan_in
        self.connectivity: Connectivity = connectivity
        self.lr = lr
        self.frozen = False
        self.gradient_scale: Callable[[], float] | None = None
        # The mask of the last training forward, which holds its gradient. Neither a parameter nor a buffer: no
        # optimizer, weight decay or zero_grad of the user's reaches it.
        self._used: Tensor | None = None
        self._scale = 1.0

    @property
    def learns(self) -> bool:
        """Whether training changes the masks."""
        free = self.connectivity == "real" or (self.connectivity == "learned" and self.fan_in < self.real.shape[-1])
        return free and not self.frozen

    @property
    def active(self) -> Tensor:
        """The K largest entries of every row, (L', C, C) of bool; of equal ones the first."""
        return _largest(self.real, self.fan_in)

    def forward(self, image: Tensor) -> Tensor:
        """Return the masks in use."""
        if self.training and torch.is_grad_enabled() and self.learns:
            masks: Tensor = self._iterate()
            return masks
        return self._standing()

    def freeze(self) -> None:
        """Fix the K largest entries of every row, after the last gradient is consumed.

        In a distributed run every process calls it.
        """
        if self._used is not None:
            self._step()
        self.frozen = True

    def get_extra_state(self) -> Tensor:
        """Return whether the masks are frozen, and the gradient that the next training forward consumes; flat."""
        return torch.cat([self.real.new_full((1,), float(self.frozen)), self._gradient().flatten()])

    def set_extra_state(self, state: Tensor) -> None:
        """Take over both from a checkpoint."""
        if state.is_meta:  # without numbers
            return
        self.frozen = bool(state[0])
        self._used, self._scale = None, 1.0
        if state[1:].any():
            self._used = torch.zeros_like(self.real, requires_grad=True)
            self._used.grad = state[1:].to(self.real).reshape(self.real.shape)

    def extra_repr(self) -> str:
        """Return what `print(model)` shows."""
        pairs, branches, _ = self.real.shape
        return f"{pairs} masks, {self.fan_in} of {branches} {self.connectivity}" + (", frozen" if self.frozen else "")

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch leaves it without types
    def _iterate(self) -> Tensor:
        if in_backward():  # a checkpoint around the whole network runs its forward once more
            return self._standing() if self._used is None else self._used
        self._refuse_replica()
        self._step()
        self._scale = 1.0 if self.gradient_scale is None else self.gradient_scale()
        # A leaf: its .grad is dl/dm for all entries, and compiled code that resumes here takes no other kind silently.
        self._used = (self._scaled() if self.connectivity == "real" else self._draw()).requires_grad_()
        average_gradient(self._used)
        return self._used

    def _standing(self) -> Tensor:
        return self._scaled() if self.connectivity == "real" and not self.frozen else self.active.to(self.real.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Masks:
        """Move as any module, but keep the real-valued masks in float32 at least: their steps are small."""
        real = self.real
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.real.dtype in (torch.float16, torch.bfloat16):
            self.real = real.to(self.real.device)
        return self

    def _refuse_replica(self) -> None:
        if "_is_replica" in self.__dict__:  # torch's own mark; what a replica learns is lost
            raise UnsupportedModel(
                "masks: found a replica of torch.nn.DataParallel, expected one network for a process, or masks that "
                "are frozen; use torch.nn.parallel.DistributedDataParallel"
            )

    @torch.no_grad()
    def _step(self) -> None:
        if self._used is not None and self._used.grad is None:
            self._used.grad = process_mean(torch.zeros_like(self._used))
        gradient = self._gradient()
        # One that is not finite is an overflow of the scaled loss, or would be the end of the masks.
        gradient = torch.where(gradient.isfinite().all(), gradient, torch.zeros_like(gradient))
        real = (self.real - self.lr * gradient).clamp(0, 1).clamp(min=FLOOR)
        self.real.copy_(real / real.sum(dim=-1, keepdim=True))  # in place: DistributedDataParallel holds the buffer
        self._used = None

    def _gradient(self) -> Tensor:
        if self._used is None or self._used.grad is None:
            return torch.zeros_like(self.real)
        return self._used.grad.detach().to(self.real) / self._scale

    @torch.no_grad()
    def _draw(self) -> Tensor:
        # In float64, so that networks of other dtypes and devices draw the same from the same `real`.
        noise = -uniform(self.seed, self.drawn, self.real.numel()).log().reshape(self.real.shape)
        self.drawn.add_(1)
        return _largest(self.real.double() / noise, self.fan_in).to(self.real.dtype)

    def _scaled(self) -> Tensor:
        return self.fan_in * self.real / self.real.sum(dim=-1, keepdim=True)


def set_grad_scaler(model: nn.Module, scaler: GradScaler) -> None:
    """Let the masks of a network divide their gradients by the scale of the loss.

    A deep copy of the network shares the scaler.

    Args:
        model: A network with masks, wrapped or not.
        scaler: What scales its loss.

    Raises:
        UnsupportedModel: If the model is not converted, or has no masks.
    """
    found = [module for module in unwrap(model).modules() if isinstance(module, Masks)]
    if not found:
        raise UnsupportedModel(
            "set_grad_scaler: found no masks in the network, expected one with masks that learn; convert it with "
            "'masked', or leave the call out"
        )

    def scale() -> float:  # a bound method would take the scaler along into a deep copy
        return float(scaler.get_scale())

    for masks in found:
        masks.gradient_scale = scale


def uniform(seed: Tensor, drawn: Tensor, count: int) -> Tensor:
    """Return numbers that are a function of a seed, a counter and their index only, in (0, 1) and float64.

    They are made by tensor operations in int64, so no device waits for the host, and no generator is touched.

    Args:
        seed: Any int64 scalar.
        drawn: The counter; its lower 32 bits count.
        count: How many, at most 2^32.

    Shape:
        seed (), drawn (...); returns (..., count).
    """
    key = _mixed(_mixed(_mixed((seed & _WORD) ^ _STREAM) ^ ((seed >> 32) & _WORD)) ^ (drawn & _WORD)).unsqueeze(-1)
    index = torch.arange(count, device=drawn.device)
    # Twice: with one round, counters whose keys differ in the low bits only get the same numbers in another order.
    return (_mixed(_mixed(index ^ key) ^ key).double() + 0.5) / 2**32


def _mixed(word: Tensor) -> Tensor:
    """Return a one-to-one function of 32-bit words, each output bit of which flips with half of the input flips.

    The factors are odd, so that no two words collide, and below 2^31, so that no product overflows an int64.
    """
    word = word ^ (word >> 16)
    word = (word * 0x21F0AAAD) & _WORD
    word = word ^ (word >> 15)
    word = (word * 0x7FEB352D) & _WORD
    return word ^ (word >> 15)


def _largest(values: Tensor, count: int) -> Tensor:
    """Return where the `count` largest of every row are, the first of equal ones whatever the device is."""
    # Only the values of topk: its choice among equal ones is the device's, and a stable sort is not written to ONNX.
    least = values.topk(count, dim=-1).values[..., -1:]
    above, equal = values > least, values == least
    room = count - above.sum(dim=-1, keepdim=True)
    return above | (equal & (equal.long().cumsum(dim=-1) <= room))


def _check_fan_in(fan_in: int, branches: int, connectivity: Connectivity) -> None:
    if not 1 <= fan_in <= branches or (connectivity == "full" and fan_in < branches):
        expected = f"{branches}" if connectivity == "full" else f"1 to {branches}"
        raise InvalidOption(
            f"masks: found fan_in={fan_in} for {branches} branches and connectivity={connectivity!r}, expected "
            f"{expected}; pass another fan_in"
        )


def _check_fixed(fixed: Tensor | None, shape: tuple[int, int, int], connectivity: Connectivity) -> None:
    found = None if fixed is None else tuple(fixed.shape)
    if found != (shape if connectivity == "random" else None):
        raise InvalidOption(
            f"masks: found fixed connections of shape {found} for connectivity={connectivity!r}, expected "
            f"{shape if connectivity == 'random' else None}; pass fixed= for random connectivity only"
        )
