"""Describes which implementation runs each part of the model on this machine, and why."""

from __future__ import annotations

import inspect
from argparse import Namespace

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.models.backends import HAVE_APEX
from megatron.core.transformer.moe import moe_utils
from megatron.core.utils import get_te_version

from megatron_vespo.system.optional_packages import TRANSFORMER_ENGINE, import_error
from megatron_vespo.trainer.attention import PackedAttention
from megatron_vespo.trainer.initialize import device


def describe(args: Namespace) -> list[str]:
    """One line per part, for the log: 'part: what runs it (why)'."""
    use_te = args.transformer_impl == "transformer_engine"
    parts = _with_te(args) if use_te else _without_te(args)
    adam = megatron_optimizer.Adam
    package = adam.__module__.partition(".")[0]
    fused = "neither Transformer Engine nor Apex is installed" if package == "torch" else "it is installed"
    on_cuda = device().type == "cuda"
    return [
        *(f"{part}: {what}" for part, what in parts.items() if args.num_experts or part != "experts"),
        f"optimizer: {package} {adam.__name__} ({fused})",
        "log-probs: " + ("Triton kernels" if on_cuda else "torch (no CUDA device)"),
    ]


def check_router(args: Namespace, where: str) -> None:
    """ValueError if Megatron's router weighs experts differently with gradients than without.

    Without patches/megatron-core-0.19.2/0003-router-sorted-topk it does, from three experts per token on.
    Then log W of an unchanged policy is not 0. `where` names this process.
    """
    wrong = "sorted=torch.is_grad_enabled()" in inspect.getsource(moe_utils.topk_routing_with_score_function)
    if wrong and args.num_experts and args.moe_router_topk > 2 and not args.moe_router_fusion:
        raise ValueError(
            f"{where}: megatron-core lacks the diff 0003-router-sorted-topk, W of an unchanged policy would "
            "not be 1: python patches/apply.py apply"
        )


def _with_te(args: Namespace) -> dict[str, str]:
    te = "Transformer Engine"
    if args.params_dtype == torch.float32:
        attention = f"{te}, unfused (its flash attention and cuDNN's take 16 bits)"
    else:
        attention = f"{te}, by flash attention or cuDNN (--attention-backend {args.attention_backend.name})"
    grouped = "grouped GEMM" if args.moe_grouped_gemm else "one GEMM each (no --moe-grouped-gemm)"
    permuted = "fused" if args.moe_permute_fusion else "by torch (no --moe-permute-fusion)"
    fused = args.gradient_accumulation_fusion
    return {
        "layers": f"{te} {get_te_version()}",
        "attention": attention,
        "norms": te,
        "experts": f"{grouped}, permutation of tokens {permuted}",
        "weight gradients": "added to the sum by their GEMM, but for the output layer's"
        if fused
        else "added to the sum afterwards (--no-gradient-accumulation-fusion)",
    }


def _without_te(args: Namespace) -> dict[str, str]:
    error = import_error(TRANSFORMER_ENGINE)
    why = f"no Transformer Engine: {error}" if error else "asked for by --transformer-impl"
    if PackedAttention.uses_kernel(args.params_dtype, device()):
        attention = f"torch's variable-length flash attention ({why})"
    else:
        no_kernel = f"no such kernel for {args.params_dtype}" if device().type == "cuda" else "no CUDA device"
        attention = f"torch SDPA on a padded batch ({why}; {no_kernel})"
    return {
        "layers": f"Megatron's local spec ({why})",
        "attention": attention,
        "norms": f"torch RMSNorm ({why}{'; Megatron uses Apex for LayerNorm only' if HAVE_APEX else ''})",
        "experts": f"one GEMM each ({why})",
    }
