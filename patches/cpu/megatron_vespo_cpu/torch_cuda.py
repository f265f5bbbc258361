"""Stand-ins for the parts of torch.cuda that Megatron-Core calls: device "cuda" means the CPU."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._device import _device_constructors

from megatron_vespo_cpu.replace import replace

_CPU = torch.device("cpu")
_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "empty_like", "zeros_like", "ones_like")


def install() -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # torch has read the variable before it was set
    _install_devices()
    _install_streams()
    _install_rng()
    # torch lists what `with torch.device(...)` redirects once, when first asked: asked after the replacement
    # it would list the wrappers, and loading on the meta device would break.
    _device_constructors()
    for name in _FACTORIES:
        replace(torch, name, _on_cpu(getattr(torch, name)))
    for owner in (torch.Tensor, torch.nn.Module):
        replace(owner, "cuda", lambda self, *args, **kwargs: self)
    # Megatron sorts parameters by the name of their type, 'torch.cuda.FloatTensor' for one.
    replace(torch.Tensor, "type", _named_as_cuda(torch.Tensor.type))


def _install_devices() -> None:
    properties = SimpleNamespace(name="cpu", major=9, minor=0, total_memory=0, multi_processor_count=1)
    replace(torch.cuda, "current_device", lambda: _CPU)
    replace(torch.cuda, "set_device", lambda device: None)
    # With 0 devices Megatron's initialize skips the model-parallel groups and the seeds.
    replace(torch.cuda, "device_count", lambda: 1)
    # Megatron's argument checks ask for compute capability 8 in places, and for settings below 9.
    replace(torch.cuda, "get_device_capability", lambda device=None: (properties.major, properties.minor))
    replace(torch.cuda, "get_device_properties", lambda device=None: properties)


class _Completed:
    """A Stream or an Event whose work is always done: on CPU every operation has finished when it returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return (0, 0)

    def __enter__(self) -> _Completed:
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, end_event: _Completed) -> float:
        return 0.0

    def record_event(self, event: _Completed | None = None) -> _Completed:
        return event or _Completed()

    def record(self, stream: _Completed | None = None) -> None:
        pass

    def wait(self, stream: _Completed | None = None) -> None:
        pass

    def wait_event(self, event: _Completed) -> None:
        pass

    def wait_stream(self, stream: _Completed) -> None:
        pass

    def synchronize(self) -> None:
        pass


def _install_streams() -> None:
    only_stream = _Completed()
    for name in ("Stream", "Event"):
        replace(torch.cuda, name, _Completed)
    for name in ("current_stream", "default_stream"):
        replace(torch.cuda, name, lambda device=None: only_stream)
    replace(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    for name in ("synchronize", "empty_cache"):
        replace(torch.cuda, name, lambda *args, **kwargs: None)
    replace(torch.Tensor, "record_stream", lambda self, stream: None)


def _install_rng() -> None:
    """The CPU generator plays the device's: its state is the one that dropout and initialisation use."""
    for owner in (torch.cuda, torch.cuda.random):
        replace(owner, "get_rng_state", lambda device="cuda": torch.get_rng_state())
        replace(owner, "set_rng_state", lambda new_state, device="cuda": torch.set_rng_state(new_state))
        replace(owner, "manual_seed", lambda seed: torch.default_generator.manual_seed(seed))


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if isinstance(device, int) or (device is not None and torch.device(device).type == "cuda"):
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False  # needs a driver
        return factory(*args, **kwargs)

    return create


def _named_as_cuda(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if isinstance(result, str) and result.startswith("torch.") and self.device == _CPU:
            return "torch.cuda." + result.removeprefix("torch.")
        return result

    return type_name
