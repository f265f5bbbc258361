"""The flags that only `megatron-vespo check layout` has, parsed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_vespo.system.settings import Settings


@dataclass(frozen=True)
class CheckLayoutOptions(Settings):
    """A bound of None is computed by `rounding_bounds`."""

    hf_checkpoint: Path  # the weights of all layouts
    reference: str  # a layout, such as tp2,pp2,ep2
    candidate: tuple[str, ...]  # layouts
    batch: Path | None  # None: random samples
    samples: int  # number of random samples
    max_prompt_tokens: int
    max_completion_tokens: int
    seed: int
    steps: int  # optimizer steps
    markdown: Path | None
    output_dir: Path | None  # None: a temporary folder
    max_log_w_difference: float | None
    max_loss_difference: float | None
    max_grad_norm_difference: float | None
    max_parameter_norm_difference: float | None
    max_experts_difference: float | None
