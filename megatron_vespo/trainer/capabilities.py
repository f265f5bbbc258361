"""What this machine and its packages made of the model: which implementation runs each part, and why."""

from __future__ import annotations

from argparse import Namespace

from megatron.core import optimizer as megatron_optimizer
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.backends import HAVE_APEX

from megatron_vespo.trainer.attention import PackedAttention
from megatron_vespo.trainer.initialize import device


def describe(args: Namespace) -> list[str]:
    """One line a part, for people: 'part: what runs it (why)'."""
    use_te = args.transformer_impl == "transformer_engine"
    without_te = "asked for by --transformer-impl" if HAVE_TE else "Transformer Engine is not installed"
    on_cuda = device().type == "cuda"
    if use_te:
        attention = "Transformer Engine"
    elif PackedAttention.uses_kernel(args.params_dtype, device()):
        attention = f"torch's variable-length flash attention ({without_te})"
    else:
        why = f"no such kernel for {args.params_dtype}" if on_cuda else "no CUDA device"
        attention = f"torch SDPA on a padded batch ({without_te}; {why})"
    adam = megatron_optimizer.Adam
    if adam.__module__.startswith("torch."):
        fused = "neither Transformer Engine nor Apex is installed"
    else:
        fused = f"{adam.__module__.partition('.')[0]} is installed"
    norm_reason = without_te + ("; Megatron uses Apex for LayerNorm only" if HAVE_APEX else "")
    return [
        "layers: " + ("Transformer Engine" if use_te else f"Megatron's local spec ({without_te})"),
        f"attention: {attention}",
        "norms: " + ("Transformer Engine" if use_te else f"torch RMSNorm ({norm_reason})"),
        "experts: " + ("grouped GEMM" if args.moe_grouped_gemm else "one GEMM each (no --moe-grouped-gemm)"),
        f"optimizer: {adam.__module__.partition('.')[0]} {adam.__name__} ({fused})",
        "log-probs: " + ("Triton kernels" if on_cuda else "torch (no CUDA device)"),
    ]  # fmt: skip
