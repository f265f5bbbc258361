"""SGLang 0.5.23 without CUDA; SGLang loads this by itself through its entry point group sglang.srt.plugins.

When a plugin fails, SGLang only logs it: look for "Executed general plugin: megatron_vespo_cpu" in its log.
"""

from __future__ import annotations

import functools
import os
from types import ModuleType
from typing import Any

import torch

from megatron_vespo_cpu import sglang_fp8
from megatron_vespo_cpu.replace import replace
from megatron_vespo_cpu.swiglu_experts import local_experts_forward


def activate() -> None:
    """Applies the fixes if SGLANG_USE_CPU_ENGINE=1, as megatron_vespo_cpu.activate() sets it."""
    if os.environ.get("SGLANG_USE_CPU_ENGINE") != "1":
        return
    # With TP > 1 the NCCL wrapper turns itself off only if it cannot load the library, which torch brings.
    os.environ.setdefault("SGLANG_NCCL_SO_PATH", "/nonexistent/libnccl.so")
    _fix_device_module()
    _fix_thread_binding()
    _fix_host_buffers()
    _fix_expert_parallel_moe()
    sglang_fp8.install()
    _allow_deterministic_inference()


def _fix_device_module() -> None:
    """A torch built with CUDA answers torch.cuda even where no driver is."""
    original = torch.get_device_module

    @functools.cache  # torch reads get_device_module.__wrapped__
    def get_device_module(device: torch.device | str | None = None) -> ModuleType:
        return torch.cpu if device is None else original(device)

    replace(torch, "get_device_module", get_device_module)


def _fix_thread_binding() -> None:
    """Binding allows one rank a NUMA node; only the AMX kernels, absent here, use its result."""
    from sglang.srt.utils import numa_utils

    replace(numa_utils, "init_threads_binding", lambda *, numa_index, world_size: None)


def _fix_host_buffers() -> None:
    """The buffer that records routed experts is pinned by cudaHostRegister."""
    from sglang.srt.mem_cache.pool_host import common

    def allocate_unpinned(*args: Any, **kwargs: Any) -> torch.Tensor:
        return common.alloc_with_host_register(*args, **(kwargs | {"pin_memory": False}))

    common.ALLOC_MEMORY_FUNCS["cpu"] = allocate_unpinned


def _fix_expert_parallel_moe() -> None:
    """The native MoE does not know expert -1, which marks an expert of another rank."""
    from sglang.srt.layers.moe import fused_moe_native

    original = fused_moe_native.moe_forward_native

    def moe_forward_native(layer: Any, x: torch.Tensor, topk_output: Any, config: Any) -> torch.Tensor:
        if layer.moe_ep_size == 1:
            return original(layer, x, topk_output, config)
        plain = config.gemm1_alpha is None and not config.apply_router_weight_on_input
        if config.activation != "silu" or not plain:
            raise NotImplementedError("expert parallelism on CPU serves only plain SwiGLU experts")
        topk_weights, topk_ids, _ = topk_output
        return local_experts_forward(x, topk_weights, topk_ids, layer.w13_weight, layer.w2_weight)

    replace(fused_moe_native, "moe_forward_native", moe_forward_native)


def _allow_deterministic_inference() -> None:
    """--enable-deterministic-inference gives each request a seed; its batch-invariant kernels need Triton."""
    from sglang.srt.arg_groups import choices
    from sglang.srt.model_executor.model_runner import ModelRunner

    choices.add_deterministic_attention_backend_choices(["torch_native"])
    choices.add_radix_supported_deterministic_attention_backend_choices(["torch_native"])
    replace(ModelRunner, "maybe_enable_batch_invariant_mode", lambda self: None)
