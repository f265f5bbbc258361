"""The checkpoint that a run will go on from, read before Ray and Megatron start."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from megatron_vespo.arguments.resume import resumed_folder
from megatron_vespo.arguments.train_settings import TrainSettings
from megatron_vespo.checkpoints.chunk_index import ChunkIndex
from megatron_vespo.checkpoints.resumable import changes, check_resumable
from megatron_vespo.checkpoints.saved_arguments import saved_arguments
from megatron_vespo.checkpoints.torch_dist_file import METADATA_NAME


@dataclass(frozen=True)
class FoundCheckpoint:
    """What a run goes on from."""

    folder: Path
    step: int  # optimizer steps done
    changes: list[str] = field(default_factory=list)  # flags that it was saved with, and that differ now


def find_checkpoint(settings: TrainSettings) -> FoundCheckpoint | None:
    """None where training starts anew. ValueError for one that these flags cannot go on from."""
    folder = resumed_folder(settings.save)
    if folder is None or not (folder / METADATA_NAME).is_file():
        return None
    saved = saved_arguments(ChunkIndex(folder))
    check_resumable(folder, saved, settings.megatron)
    return FoundCheckpoint(folder, saved["rollout_state"]["iteration"], changes(saved, settings.megatron))
