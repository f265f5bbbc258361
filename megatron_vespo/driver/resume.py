"""Finds and checks the checkpoint that a run continues from, before Ray and Megatron start."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from megatron_vespo.arguments.resume import resumed_folder
from megatron_vespo.arguments.train_settings import TrainSettings
from megatron_vespo.checkpoints.chunk_index import ChunkIndex
from megatron_vespo.checkpoints.names import METADATA_NAME
from megatron_vespo.checkpoints.resumable import changes, check_resumable
from megatron_vespo.checkpoints.saved_arguments import saved_arguments


@dataclass(frozen=True)
class FoundCheckpoint:
    """The checkpoint that a run continues from."""

    folder: Path
    step: int  # optimizer steps done
    changes: list[str] = field(default_factory=list)  # log lines about flags that differ from the saved ones


def find_checkpoint(settings: TrainSettings) -> FoundCheckpoint | None:
    """None if training starts from the beginning; ValueError if the flags do not fit the checkpoint."""
    folder = resumed_folder(settings.save)
    if folder is None or not (folder / METADATA_NAME).is_file():
        return None
    saved, flags = saved_arguments(ChunkIndex(folder)), vars(settings.megatron)
    check_resumable(folder, saved, flags)
    return FoundCheckpoint(folder, saved["rollout_state"]["iteration"], changes(saved, flags))
