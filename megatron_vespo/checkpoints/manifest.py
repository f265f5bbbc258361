"""manifest.json: what a conversion wrote, tensor by tensor, under HF names whatever the format is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_vespo.checkpoints.names import MANIFEST_NAME
from megatron_vespo.checkpoints.safetensors_file import TensorInfo
from megatron_vespo.checkpoints.spans import HASH


def entry_of(tensor: TensorInfo, digest: str) -> dict[str, Any]:
    """What a manifest says of one tensor."""
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "hash": digest,
    }


def write_manifest(folder: Path, source: Path, tensors: Mapping[str, Mapping[str, Any]]) -> None:
    """`tensors`: {HF name: dtype, shape, hash}; the source's name only, as folders move."""
    content = {"source": source.name, "hash": HASH, "tensors": dict(sorted(tensors.items()))}
    (folder / MANIFEST_NAME).write_text(json.dumps(content, indent=1) + "\n")


def read_manifest(folder: Path) -> dict[str, dict[str, Any]] | None:
    """Its tensors; None if there is no manifest, ValueError for a broken one."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
        tensors = content["tensors"]
        if content["hash"] != HASH or not all(
            {"dtype", "shape", "hash"} <= entry.keys() for entry in tensors.values()
        ):
            raise ValueError(f"its hashes are not {HASH}, or an entry lacks something")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise ValueError(f"{path} is no manifest: {error}") from error
    return tensors
