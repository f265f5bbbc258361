"""Writes HF checkpoint folders from the whole tensors that a running policy provides."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from megatron_vespo.checkpoints.names import CONFIG_NAME, INDEX_NAME, MANIFEST_NAME
from megatron_vespo.models.prediction_layers import without_prediction_layers

# everything but the weights: configuration, tokenizer, chat template, licence
_COMPANIONS = ("*.json", "*.txt", "*.jinja", "*.model", "LICENSE*")


def copy_companions(source: Path, target: Path) -> None:
    """Copy the configuration and tokenizer of an HF folder, without its index and manifest.

    The configuration counts no layers for multi-token prediction, whose weights nothing here writes.
    """
    for pattern in _COMPANIONS:
        for path in source.glob(pattern):
            if path.name not in (INDEX_NAME, MANIFEST_NAME):
                shutil.copyfile(path, target / path.name)
    if (source / CONFIG_NAME).is_file():
        config = json.loads((source / CONFIG_NAME).read_text())
        kept = without_prediction_layers(config)
        if kept != config:
            (target / CONFIG_NAME).write_text(json.dumps(kept, indent=2) + "\n")


def write_index(folder: Path, weight_map: dict[str, str], total_size: int) -> None:
    """Write the index. `total_size` is the number of bytes of all tensors."""
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def write_shards(tensors: Iterator[dict[str, Tensor]], folder: Path, prefix: str) -> dict[str, str]:
    """Write each bucket as one file `prefix-00000.safetensors`, ...; returns {tensor name: file name}."""
    weight_map: dict[str, str] = {}
    for number, bucket in enumerate(tensors):
        file_name = f"{prefix}-{number:05d}.safetensors"
        save_file({k: v.cpu().contiguous() for k, v in bucket.items()}, folder / file_name, {"format": "pt"})
        weight_map.update(dict.fromkeys(bucket, file_name))
    return weight_map


def finish_checkpoint(
    source: Path,
    staging: Path,
    target: Path,
    weight_map: dict[str, str],
    total_size: int,
    quantisation: Mapping[str, Any] | None = None,
) -> None:
    """Add index, and `source`'s config and tokenizer, to the shards of `staging`; rename it `target`.

    `quantisation` is config.json's `quantization_config` where the shards have such weights.
    """
    copy_companions(source, staging)
    if quantisation is not None:
        config = json.loads((staging / CONFIG_NAME).read_text()) | {"quantization_config": quantisation}
        (staging / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
    write_index(staging, weight_map, total_size)
    if target.exists():
        shutil.rmtree(target)
    staging.rename(target)
