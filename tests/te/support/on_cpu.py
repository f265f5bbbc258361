"""Makes Transformer Engine's Python import, and its layers compute, without CUDA and its extension."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable

import permutation
import torch
from triton.runtime.autotuner import Autotuner

_TE = "transformer_engine."
TRITON_KERNELS: dict[str, Callable] = {}  # what stands in for them is compared with


def install() -> None:
    """Call it once, before anything imports Megatron; `transformer_engine_torch` here plays the extension."""
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # TE then loads no CUDA library
    with warnings.catch_warnings(action="ignore"):  # it says that there is no extension
        from transformer_engine import common
    common.load_framework_extension = lambda framework: None
    # TE refuses to work without CUDA. Only TE is told that it is there: others choose devices by it.
    is_cuda, is_available = torch.Tensor.is_cuda.__get__, torch.cuda.is_available
    torch.Tensor.is_cuda = property(lambda self: _asked_by_te() or is_cuda(self))
    torch.cuda.is_available = lambda: _asked_by_te() or is_available()
    to = torch.Tensor.to
    torch.Tensor.to = lambda self, *args, **kwargs: to(self, *_on_cpu(args), **_on_cpu(kwargs))
    torch.cuda.is_current_stream_capturing = lambda: False  # it asks the driver
    Autotuner._bench = lambda self, *args, config, **meta: [0.0]  # in Triton's interpreter all are slow
    import transformer_engine.pytorch
    from transformer_engine.pytorch.triton import permutation as kernels

    assert transformer_engine.pytorch.Linear
    for name in permutation.NAMES:
        TRITON_KERNELS[name] = getattr(kernels, name)
        setattr(kernels, name, getattr(permutation, name))


def _on_cpu(arguments: tuple | dict) -> tuple | dict:
    if isinstance(arguments, dict):
        return dict(zip(arguments, _on_cpu(tuple(arguments.values())), strict=True))
    return tuple("cpu" if isinstance(value, str) and value == "cuda" else value for value in arguments)


def _asked_by_te() -> bool:
    return sys._getframe(2).f_globals.get("__name__", "").startswith(_TE)
