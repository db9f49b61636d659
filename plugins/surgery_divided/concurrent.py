"""The small networks at the same time, each on a device of its own: inference of a divided network in parallel.

The root graph of the network stays what runs. Its members start their work in a thread and return a future; the module
that joins them waits.

Reference:
    Zhao et al., 2022, section 3.1.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from typing import NoReturn, Self

import torch
from torch import Tensor, nn

from surgery import ConvertedNetwork
from surgery.errors import InvalidOption, SurgeryError
from surgery_divided.ensemble import Ensemble, Manner, combine, ensemble_of, members, whole

Device = str | int | torch.device


class Concurrent:
    """A divided network for inference whose members run at the same time; called like the network itself.

    It holds copies of the weights in eval mode: later changes of the network do not show. Gradients reach the image,
    never the weights. Calls from several threads take turns at each member. Use it as context manager, or `close()` it,
    to end its threads.

    Args:
        network: A copy of the divided network, which it takes over.
        devices: One for each member; the result is on the first.

    Shape:
        (B, C, H, W) or (B, S*C, H, W), on any device, to (B, classes).
    """

    def __init__(self, network: ConvertedNetwork, devices: Sequence[torch.device]) -> None:
        self.devices = tuple(devices)
        self._network = network.eval().requires_grad_(False)
        self._pools = [ThreadPoolExecutor(1, f"member-{i}") for i in range(len(devices))]
        self._closed = False
        self._share_threads()
        for path, pool, device in zip(_paths(network, ConvertedNetwork), self._pools, devices, strict=True):
            member = network.get_submodule(path).to(device)
            network.set_submodule(path, _Started(member, pool, device, self.devices[0]))
        (path,) = _paths(network, Ensemble)
        network.set_submodule(path, _Joined(ensemble_of(network).manner, self.devices[0]))

    def __call__(self, image: Tensor) -> Tensor:
        """Return the logits of the ensemble, on the first device.

        Raises:
            SurgeryError: If it is closed.
            InvalidOption: If the image has neither C nor S*C channels.
        """
        if self._closed:
            raise SurgeryError("concurrent: found it closed, expected it open; call surgery_divided.concurrent again")
        logits: Tensor = self._network(image)
        return logits

    def close(self) -> None:
        """Let running work finish and end the threads; a second call does nothing."""
        self._closed = True
        for pool in self._pools:
            pool.shutdown()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the threads."""
        self.close()

    def __repr__(self) -> str:
        """Return the devices in the order of the members."""
        return f"{type(self).__name__}({', '.join(map(str, self.devices))})"

    def __reduce__(self) -> NoReturn:
        """Refuse copies and pickling: threads can be neither copied nor saved.

        Raises:
            SurgeryError: Always.
        """
        raise SurgeryError(
            "concurrent: threads are neither copied nor pickled; copy or save the divided network and call "
            "surgery_divided.concurrent again"
        )

    def _share_threads(self) -> None:
        """Divide the threads of the caller among the members on the CPU."""
        on_cpu = [pool for pool, device in zip(self._pools, self.devices, strict=True) if device.type == "cpu"]
        threads = torch.get_num_threads()
        for pool in on_cpu:
            pool.submit(_use_threads, max(1, threads // len(on_cpu))).result()
        # The number holds for the thread that sets it and for all that start later: put the latter right.
        torch.set_num_threads(threads)


def concurrent(model: nn.Module, devices: Sequence[Device]) -> Concurrent:
    """Return a divided network for inference with every member on its own device, in its own thread.

    Args:
        model: A divided network; it stays as it is.
        devices: S devices, in the order of the members; one may appear more than once. Members on the CPU share its
            threads, as many as `torch.get_num_threads()` returns now.

    Raises:
        UnsupportedModel: If `model` is no divided network.
        InvalidOption: If there are more or fewer devices than members.
    """
    network = whole(model)
    number = len(members(network))
    if isinstance(devices, str) or len(devices) != number:
        raise InvalidOption(f"concurrent: found devices {devices!r}, expected {number}, one for each small network")
    return Concurrent(copy.deepcopy(network), [_numbered(torch.device(device)) for device in devices])


class _Joined(nn.Module):
    """Wait for the members and join their logits."""

    def __init__(self, manner: Manner, device: torch.device) -> None:
        super().__init__()
        self.manner, self.device = manner, device

    def forward(self, *futures: Future[_Result]) -> Tensor:
        wait(futures)  # all of them: nothing runs on when one has failed
        return combine([future.result().received(self.device) for future in futures], self.manner)


class _Started(nn.Module):
    """Let a member run in its thread and return at once."""

    def __init__(self, member: nn.Module, pool: ThreadPoolExecutor, device: torch.device, target: torch.device) -> None:
        super().__init__()
        self.member, self.pool, self.device, self.target = member, pool, device, target
        # Members on the same device overlap only on streams of their own.
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def forward(self, view: Tensor) -> Future[_Result]:
        return self.pool.submit(self._run, view, _Caller(view, self.target))

    def _run(self, view: Tensor, caller: _Caller) -> _Result:
        with caller.state(self.stream):
            if self.stream is not None and caller.ready is not None:
                self.stream.wait_event(caller.ready)
            own = _moved(view, self.device)
            if self.stream is not None and own is view:
                view.record_stream(self.stream)
            result = _moved(self.member(own), self.target)
            return _Result(result, None if self.stream is None else self.stream.record_event())


class _Result:
    """Logits on their way to the caller, and the event behind which they are there."""

    def __init__(self, logits: Tensor, done: torch.cuda.Event | None) -> None:
        self.logits, self.done = logits, done

    def received(self, device: torch.device) -> Tensor:
        """Return the logits for use on the caller's stream."""
        if self.done is not None and device.type == "cuda":
            stream = torch.cuda.current_stream(device)
            stream.wait_event(self.done)
            self.logits.record_stream(stream)
        return self.logits


class _Caller:
    """What torch keeps for each thread, as the calling one has it: grad mode, autocast, CUDA streams."""

    def __init__(self, view: Tensor, target: torch.device) -> None:
        self.inference, self.grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        kinds = {"cpu", "cuda", view.device.type, target.type}
        self.autocast = {kind: torch.get_autocast_dtype(kind) for kind in kinds if torch.is_autocast_enabled(kind)}
        cuda = {device for device in (view.device, target) if device.type == "cuda"}
        self.streams = [torch.cuda.current_stream(device) for device in cuda]
        self.ready = torch.cuda.current_stream(view.device).record_event() if view.is_cuda else None

    @contextmanager
    def state(self, own: torch.cuda.Stream | None) -> Iterator[None]:
        """Run in that state; on the device of stream `own`, on that stream."""
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self.inference))
            stack.enter_context(torch.set_grad_enabled(self.grad))
            for kind, dtype in self.autocast.items():
                stack.enter_context(torch.autocast(kind, dtype))
            # Copies between two devices run on the current streams of both: those of the caller, and `own` last.
            for stream in [*self.streams, *([] if own is None else [own])]:
                stack.enter_context(torch.cuda.stream(stream))
            yield


def _use_threads(number: int) -> None:
    torch.get_num_threads()  # the first call in a new thread takes the number of the process, also behind a setting
    torch.set_num_threads(number)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    # A copy to the CPU has to be complete before it is read, one to a GPU is in order with what follows there.
    return tensor.to(device, non_blocking=device.type == "cuda")


def _numbered(device: torch.device) -> torch.device:
    """Return "cuda" as the device that it stands for in this thread; in others it may stand for another."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


def _paths(network: nn.Module, kind: type[nn.Module]) -> list[str]:
    """Return the paths of the modules of a kind, without the network itself."""
    return [path for path, module in network.named_modules() if path and isinstance(module, kind)]
