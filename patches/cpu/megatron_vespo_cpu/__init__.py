"""Runs Megatron-Core and SGLang where there is no CUDA device. Everything here is about that lack.

environment     variables that child processes (SGLang servers) must inherit
torch_cuda      the parts of torch.cuda that Megatron-Core calls, on the CPU
megatron_core   the few Megatron-Core functions that torch.cuda alone cannot fix
sglang_plugin   fixes that SGLang loads by itself in each of its processes
sglang_fp8      its block-FP8 layers
"""

from __future__ import annotations

import functools
import logging


@functools.cache
def activate() -> None:
    """Make this process and its children run on CPU; does nothing when CUDA is available.

    Call it before anything imports Megatron. The first call imports megatron.core.
    """
    import torch

    if torch.cuda.is_available():
        return

    from megatron_vespo_cpu import environment, torch_cuda

    # it warns that there is no CUDA, which is why we are here
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    environment.set_defaults()
    torch_cuda.install()

    from megatron_vespo_cpu import megatron_core  # imports Megatron: only now

    megatron_core.install()
