"""The flags of the subcommands of `megatron-vespo convert`, parsed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_vespo.system.settings import Settings


@dataclass(frozen=True)
class ReadingOptions(Settings):
    """How tensors are read."""

    memory_budget: float  # GiB per process
    workers: int | None  # threads per process
    quiet: bool  # no progress bar


@dataclass(frozen=True)
class HfToMegatronOptions(ReadingOptions):
    source: Path
    target: Path
    force: bool  # replace what is at `target`
    check_logits: int | None  # tokens; None: no check
    dtype: str | None  # of the output; None: as stored


@dataclass(frozen=True)
class HfToHfOptions(HfToMegatronOptions):
    max_shard_size: float  # GB


@dataclass(frozen=True)
class MegatronToHfOptions(HfToHfOptions):
    hf_config: Path | None  # None: the HF folder in the checkpoint


@dataclass(frozen=True)
class VerifyOptions(ReadingOptions):
    source: Path
    other: Path | None  # None: the manifest of `source`
    hf_config: Path | None


@dataclass(frozen=True)
class InspectOptions(Settings):
    source: Path
    hf_config: Path | None
    tensors: bool  # list every tensor


@dataclass(frozen=True)
class ModelOptOptions(Settings):
    source: Path
    target: Path
    force: bool
    format: str
    calibration: Path | None  # None: random tokens
    samples: int
    max_tokens: int  # per sample
