"""Reads and writes manifest.json: each tensor that a conversion wrote, under its HF name in both formats."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_vespo.checkpoints.names import MANIFEST_NAME
from megatron_vespo.checkpoints.safetensors_file import TensorInfo
from megatron_vespo.checkpoints.spans import HASH


def entry_of(tensor: TensorInfo, digest: str) -> dict[str, Any]:
    """The manifest entry of one tensor."""
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "hash": digest,
    }


def write_manifest(folder: Path, source: Path, tensors: Mapping[str, Mapping[str, Any]]) -> None:
    """`tensors`: {HF name: dtype, shape, hash}. Only the source's name is stored, because folders move."""
    content = {"source": source.name, "hash": HASH, "tensors": dict(sorted(tensors.items()))}
    (folder / MANIFEST_NAME).write_text(json.dumps(content, indent=1) + "\n")


def read_manifest(folder: Path) -> dict[str, dict[str, Any]] | None:
    """The tensors of the manifest, or None without a manifest. ValueError for a broken one."""
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
