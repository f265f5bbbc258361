"""Selects what to recompute in the backward pass instead of whole layers."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_vespo.arguments.train_settings import TrainSettings
from megatron_vespo.commands.plan.trainer_memory import kept_by_experts
from megatron_vespo.models.stage import Stage

MARGIN = 0.1  # share of the GPU's memory: activations are estimates
UNEVEN = 2.0  # tokens of the busiest experts' rank, relative to the mean: an allowance
FLAGS = ("--recompute-granularity", "--recompute-method", "--recompute-num-layers", "--recompute-modules")


def selections(settings: TrainSettings) -> list[list[str]]:
    """Names for --recompute-modules. The selection that recomputes least comes first, beginning with nothing.

    Attention is never selected: kernels keep no scores, and Megatron has no name for its projections. Norms
    of a dense model are parts of Transformer Engine's linear layers. Without Transformer Engine, Megatron
    recomputes neither norms nor activation functions.
    """
    if settings.trainer.num_experts is None:
        return [[], ["mlp"]]
    if settings.trainer.transformer_impl != "transformer_engine":
        return [[], ["moe"]]
    return [[], ["layernorm", "moe_act"], ["layernorm", "moe"]]


def margin(settings: TrainSettings, stages: Sequence[Stage], memory: float) -> float:
    """Bytes of a GPU's `memory` to leave free: more if what experts keep varies with the routing."""
    kept = max(kept_by_experts(settings, stage.layers, index) for index, stage in enumerate(stages))
    return MARGIN * memory + (UNEVEN - 1) * kept


def without_recomputation(flags: Sequence[str]) -> list[str]:
    """`flags` without those of recomputation and their values."""
    kept: list[str] = []
    inside = False
    for flag in flags:
        if flag.startswith("--"):
            inside = flag.partition("=")[0] in FLAGS
        if not inside:
            kept.append(flag)
    return kept
