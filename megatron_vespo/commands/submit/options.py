"""The options of `megatron-vespo submit`, parsed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_vespo.system.settings import Settings


@dataclass(frozen=True)
class SubmitOptions(Settings):
    """Names and values are the flags'; with `engine_nodes`, the nodes are the trainer's only."""

    recipe: Path
    nodes: int
    gpus_per_node: int  # 0: the job requests none
    gpu: str  # a name of hardware.GPUS, or "other"
    time: str | None  # in sbatch's format
    sbatch: tuple[str, ...]  # NAME or NAME=VALUE
    engine_nodes: int | None
    engine_gpus_per_node: int | None
    engine_gpu: str | None
    engine_sbatch: tuple[str, ...]
    chain: int  # number of jobs
    venv: Path
    smoke: bool
    container: str | None
    container_runtime: Literal["pyxis", "apptainer"]
    mounts: tuple[str, ...]
    dry_run: bool
