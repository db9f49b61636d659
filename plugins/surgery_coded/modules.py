"""The modules of a coded network: the coded merge convolution, the dropping of branches, and their switch.

With t_n the output of branch n, s = 1 / sqrt(max(sum_n E(t_n) / N, EPS)) and m_n the dropSubNN mask, a coded merge
returns

    sum_n m_n s t_n = conv(h * (m s)) = conv(x),

one factor per branch and sample on the narrow input of the convolution; the wider output is neither read nor written
once more. A bias belongs to no branch: it is added after the sum and is neither normalized nor dropped.

Reference: Coded ResNeXt (2022), section 3.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from surgery.errors import InvalidOption, PruneError, UnsupportedModel
from surgery.taps import Tap
from surgery_coded import energy
from surgery_coded.energy import Pair
from surgery_coded.gradients import GradientMask, mask_gradient, masked_join


class CodedConv2d(nn.Module):
    """Join N branches: a convolution with energy normalization, a branch mask, and a tap of the energies.

    State-dict keys are those of the convolution that it replaces. The tap holds the normalized energies, (B, N).

    Attributes:
        codewords: (K, N) bool, row k marks the branches of class k; not in the state dict.
        active: None, or (N,) or (B, N) of zeros and ones: branches that are switched off before the normalization,
            which equals their physical removal. Settable; not in the state dict.
        branches: Branches present, N.
        kept: Which of the original branches these are; a mask drawn for all of them is read at these columns.
        gradient_mask: Where set, the variant of `surgery_coded.gradients` in training.
        total_branches: The number that the normalization divides by; stays when branches are removed.
        ratio: r = N_act / N of the scheme that the network was converted with.

    Shape:
        hidden (B, N*d, H, W), mask (B, N) or None; returns (B, C, H', W').
    """

    weight: Tensor
    bias: Tensor | None
    codewords: Tensor
    active: Tensor | None

    def __init__(
        self,
        weight: nn.Parameter | None,
        bias: nn.Parameter | None,
        codewords: Tensor,
        *,
        tap: str,
        stride: Pair = (1, 1),
        padding: Pair = (0, 0),
        dilation: Pair = (1, 1),
        total_branches: int | None = None,
        ratio: float | None = None,
    ) -> None:
        super().__init__()
        if weight is not None:
            self.register_parameter("weight", weight)
        self.register_parameter("bias", bias)
        self.register_buffer("codewords", codewords, persistent=False)
        self.register_buffer("active", None, persistent=False)
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.branches = codewords.shape[1]
        self.total_branches = total_branches or self.branches
        # A plain number, read once: asking the buffer in every step would wait for the device.
        self.ratio = int(codewords[0].sum()) / self.branches if ratio is None else ratio
        self.gradient_mask: GradientMask | None = None
        self.kept = tuple(range(self.branches))
        self.energy = Tap(tap)

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, codewords: Tensor, tap: str) -> CodedConv2d:
        """Return the coded form of `conv`, made of the very same parameters and parametrizations.

        Args:
            conv: The convolution that joins the branches: groups=1, N*d input channels in branch order.
            codewords: (K, N) bool.
            tap: Name of the energy tap.

        Raises:
            UnsupportedModel: If `conv` is grouped, pads with anything but zeros or unevenly, keeps its weight in a
                forward hook, or has an input width that N does not divide.
        """
        _check_conv(conv, codewords, tap)
        parametrized = parametrize.is_parametrized(conv)
        coded = cls(
            None if parametrize.is_parametrized(conv, "weight") else cast(nn.Parameter, conv.weight),
            None if parametrize.is_parametrized(conv, "bias") else cast("nn.Parameter | None", conv.bias),
            codewords.to(conv.weight.device, torch.bool),
            tap=tap,
            stride=cast(Pair, conv.stride),
            padding=_numeric_padding(conv),
            dilation=cast(Pair, conv.dilation),
            ratio=int(codewords[0].sum()) / codewords.shape[1],  # of the given tensor: the convolution may be on meta
        )
        if parametrized:
            parametrize.transfer_parametrizations_and_params(conv, coded)
        return coded.train(conv.training)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the normalized, masked sum of the branches."""
        weight, bias = self.weight, self.bias
        if energy.autocasts(hidden) and hidden.dtype != torch.float64:
            half = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight = hidden.to(half), weight.to(half)
            bias = bias if bias is None else bias.to(half)
        if self._is_pointwise and self.stride != (1, 1):
            hidden = hidden[:, :, :: self.stride[0], :: self.stride[1]]
        with energy.full_precision(hidden):
            output, energies = self._join(hidden, weight, bias, mask)
        self.energy(energies)
        return output

    def _join(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        ones = torch.ones(hidden.shape[0], self.branches, dtype=energy.accumulation_dtype(hidden), device=hidden.device)
        active = ones if self.active is None else self.active * ones
        if mask is not None and mask.shape[1] != self.branches:
            mask = mask[:, list(self.kept)]
        gain = active if mask is None else active * mask
        if self.gradient_mask is not None and self.training and torch.is_grad_enabled():
            stride = (1, 1) if self._is_pointwise else self.stride
            geometry = (stride, self.padding, self.dilation)
            return masked_join(hidden, weight, bias, gain, active, self.total_branches, geometry, self.gradient_mask)
        geometry = ((1, 1), (0, 0), (1, 1)) if self._is_pointwise else (self.stride, self.padding, self.dilation)
        return energy.join(hidden, weight, bias, gain, active, self.total_branches, *geometry)

    @property
    def _is_pointwise(self) -> bool:
        return tuple(self.weight.shape[2:]) == (1, 1) and self.padding == (0, 0)

    def pruned(self, keep: Sequence[int]) -> CodedConv2d:
        """Return a copy with only the branches `keep`, in that order; the normalization divides by the old number.

        Equal to this module with `active` set to zero elsewhere and the input channels of `keep` given.

        Raises:
            PruneError: If `keep` is empty, repeats a branch, or names one that is not there.
        """
        if not keep or len(set(keep)) != len(keep) or not all(0 <= n < self.branches for n in keep):
            raise PruneError(
                f"{self.energy.name}: cannot keep branches {list(keep)} of {self.branches}; give at least one, "
                f"each once, from 0 to {self.branches - 1}"
            )
        index = torch.tensor(list(keep), device=self.weight.device)
        weight = self.weight.detach().unflatten(1, (self.branches, -1)).index_select(1, index).flatten(1, 2)
        twin = CodedConv2d(
            nn.Parameter(weight, requires_grad=self.weight.requires_grad),
            self.bias if self.bias is None else nn.Parameter(self.bias.detach().clone(), self.bias.requires_grad),
            self.codewords.index_select(1, index),
            tap=self.energy.name,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            total_branches=self.total_branches,
            ratio=self.ratio,
        )
        twin.kept = tuple(self.kept[n] for n in keep)
        twin.active = self.active if self.active is None else self.active.index_select(-1, index)
        return twin.train(self.training)

    def extra_repr(self) -> str:
        """Return the sizes for `print(model)`."""
        channels, inputs, *kernel = self.weight.shape
        return f"{inputs}, {channels}, kernel_size={tuple(kernel)}, branches={self.branches}/{self.total_branches}"


class BranchDropout(nn.Module):
    """Draw the dropSubNN mask: every branch of every sample is dropped with probability p, independently.

    Args:
        p: Probability of dropping, in [0, 1).
        branches: N.

    Shape:
        x (B, ...); returns (B, N) of zeros and 1 / (1 - p) with dtype and device of x in train mode, None in eval
        mode and for p = 0.

    Reference: Coded ResNeXt (2022), section 3.1.3.

    Raises:
        InvalidOption: If `p` is outside [0, 1).
    """

    def __init__(self, p: float, branches: int) -> None:
        super().__init__()
        if not 0.0 <= p < 1.0:
            raise InvalidOption(f"BranchDropout: found p={p}, expected a probability in [0, 1); p=0 switches it off")
        self.p = p
        self.branches = branches

    def forward(self, x: Tensor) -> Tensor | None:
        """Return a fresh mask, or None where nothing is dropped."""
        if not self.training or self.p == 0.0:
            return None
        keep = 1.0 - self.p
        return torch.full((x.shape[0], self.branches), keep, dtype=x.dtype, device=x.device).bernoulli().div(keep)

    def extra_repr(self) -> str:
        """Return the options for `print(model)`."""
        return f"p={self.p}, branches={self.branches}"


class BranchSwitch(nn.Module):
    """Switch branches off before something mixes them; the identity while none is off.

    An attention between the branches and their merge reads all of them. With the inactive ones zero it computes what it
    does after their removal.

    Args:
        branches: N.

    Attributes:
        active: None, or (N,) or (B, N) of zeros and ones. Settable; not in the state dict.
        gradient_mask: Where set, inactive branches get no gradient through the attention either; that of the merge.

    Shape:
        x (B, N*d, H, W), the same.
    """

    active: Tensor | None

    def __init__(self, branches: int) -> None:
        super().__init__()
        self.branches = branches
        self.register_buffer("active", None, persistent=False)
        self.gradient_mask: GradientMask | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return `x`, with zeros in the inactive branches."""
        if self.gradient_mask is not None and self.training and torch.is_grad_enabled():
            x = mask_gradient(x, self.gradient_mask)
        if self.active is None:
            return x
        return x * energy.channel_factors(torch.atleast_2d(self.active), x)

    def pruned(self, keep: Sequence[int]) -> BranchSwitch:
        """Return the switch of the branches `keep`, in that order."""
        twin = BranchSwitch(len(keep))
        if self.active is not None:
            twin.active = self.active.index_select(-1, torch.tensor(list(keep), device=self.active.device))
        return twin.train(self.training)

    def extra_repr(self) -> str:
        """Return the size for `print(model)`."""
        return f"branches={self.branches}"


def _check_conv(conv: nn.Conv2d, codewords: Tensor, where: str) -> None:
    branches = codewords.shape[1]
    if conv.groups != 1 or conv.in_channels % branches:
        raise UnsupportedModel(
            f"{where}: found a convolution of {conv.in_channels} channels in {conv.groups} groups, expected groups=1 "
            f"and a multiple of {branches} channels; choose the convolution that joins the branches, or other codewords"
        )
    if conv.padding_mode != "zeros":
        raise UnsupportedModel(f"{where}: found padding_mode={conv.padding_mode!r}, expected 'zeros'; leave it out")
    if "weight" not in conv._parameters and not parametrize.is_parametrized(conv, "weight"):
        raise UnsupportedModel(
            f"{where}: found a weight that a forward hook computes, expected a parameter; use "
            "torch.nn.utils.parametrizations, or remove the weight norm first"
        )


def _numeric_padding(conv: nn.Conv2d) -> Pair:
    if not isinstance(conv.padding, str):
        return cast(Pair, conv.padding)
    reach = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    if conv.padding == "valid":
        return 0, 0
    if reach[0] % 2 or reach[1] % 2:
        raise UnsupportedModel(
            f"found padding='same' with kernel {conv.kernel_size}, which pads unevenly; expected an odd "
            "kernel; leave it out"
        )
    return reach[0] // 2, reach[1] // 2
