"""All items, the most valuable first: when the time is up, the rest is skipped. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Item:
    name: str
    function: str  # module:function, below tests.gpu.items
    limit_s: float
    on_cpu: bool = False  # can also be run with --device cpu
    modules: tuple[str, ...] = ("torch",)  # what it imports that a machine may lack
    environment: dict[str, str] = field(default_factory=dict)  # set before its process starts


PROJECT = ("torch", "numpy")
MEGATRON = (*PROJECT, "megatron.core", "megatron.training", "xxhash", "tqdm")
# the models of these items are random ones that transformers makes
MODEL = (*MEGATRON, "transformers", "safetensors")

ITEMS = (
    Item("ceilings", "ceilings:ceilings", 60, on_cpu=True),
    Item("kernels, values", "kernels:values", 90, on_cpu=True, modules=(*PROJECT, "triton")),
    Item("kernels, speed", "kernels:speed", 60, modules=(*PROJECT, "triton")),
    Item("supports, values", "supports:values", 60, on_cpu=True, modules=(*PROJECT, "triton")),
    Item("supports, speed", "supports:speed", 60, modules=(*PROJECT, "triton")),
    Item("policy, fp32", "policy:fp32", 150, on_cpu=True, modules=MODEL),
    Item("policy, bf16", "policy:bf16", 150, on_cpu=True, modules=MODEL),
    Item("packed attention", "attention:attention", 60, modules=MEGATRON),
    Item("offload", "policy:offload", 120, on_cpu=True, modules=MODEL),
    Item(
        "CUDA IPC",
        "sharing:exported",
        60,
        modules=("torch", "cuda.bindings"),
        environment={"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
    ),
    Item("NCCL, one rank", "nccl:one_rank", 90, modules=PROJECT),
    Item("NCCL, two ranks on one GPU", "nccl:two_ranks", 60, modules=PROJECT),
    Item("repeated passes", "policy:repeated_passes", 120, on_cpu=True, modules=MODEL),
    Item("unpermute", "moe:unpermute_passes", 60, on_cpu=True, modules=MEGATRON),
    Item("router", "moe:router", 30, on_cpu=True),
    Item("fp32 logits", "logits:fp32_logits", 30),
)
