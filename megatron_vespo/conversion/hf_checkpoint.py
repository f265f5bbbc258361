"""Reading and writing HF checkpoint folders (safetensors) without holding them in memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

INDEX_NAME = "model.safetensors.index.json"
# everything but the weights: configuration, tokenizer, chat template, licence
_COMPANIONS = ("*.json", "*.txt", "*.jinja", "*.model", "LICENSE*")


class HFCheckpointReader:
    """Random access to the tensors of a folder; files are opened when first needed. A context manager."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._files = _tensor_files(folder)
        self._stack = ExitStack()
        self._open: dict[Path, safe_open] = {}

    def __enter__(self) -> HFCheckpointReader:
        return self

    def __exit__(self, *error) -> None:
        self._stack.close()
        self._open.clear()

    def names(self) -> set[str]:
        return set(self._files)

    def get(self, name: str) -> Tensor:
        """One tensor, on CPU, in its stored dtype; ValueError naming the file if it is missing or broken."""
        if name not in self._files:
            raise ValueError(f"--hf-checkpoint {self.folder}: tensor {name} is missing")
        path = self._files[name]
        try:
            if path not in self._open:
                self._open[path] = self._stack.enter_context(safe_open(path, framework="pt"))
            return self._open[path].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"--hf-checkpoint: cannot read {name} from {path}: {error}") from error


def _tensor_files(folder: Path) -> dict[str, Path]:
    index = folder / INDEX_NAME
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
        except (ValueError, KeyError) as error:
            raise ValueError(f"--hf-checkpoint: {index} is no index of safetensors: {error!r}") from error
        files = {name: folder / file for name, file in weight_map.items()}
        missing = sorted({str(path) for path in files.values() if not path.is_file()})
        if missing:
            raise ValueError(f"--hf-checkpoint: {index} names files that do not exist: {', '.join(missing)}")
        return files
    single = folder / "model.safetensors"
    if not single.is_file():
        raise ValueError(f"--hf-checkpoint {folder}: neither {INDEX_NAME} nor model.safetensors is there")
    try:
        with safe_open(single, framework="pt") as file:
            return {name: single for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"--hf-checkpoint: cannot read {single}: {error}") from error


def write_shards(tensors: Iterator[dict[str, Tensor]], folder: Path, prefix: str) -> dict[str, str]:
    """Write each bucket as one file `prefix-00000.safetensors`, ...; returns {tensor name: file name}."""
    weight_map: dict[str, str] = {}
    for number, bucket in enumerate(tensors):
        file_name = f"{prefix}-{number:05d}.safetensors"
        save_file({k: v.cpu().contiguous() for k, v in bucket.items()}, folder / file_name, {"format": "pt"})
        weight_map.update(dict.fromkeys(bucket, file_name))
    return weight_map


def finish_checkpoint(
    source: Path, staging: Path, target: Path, weight_map: dict[str, str], total_size: int
) -> None:
    """Add index, and `source`'s config and tokenizer, to the shards of `staging`; rename it `target`."""
    for pattern in _COMPANIONS:
        for path in source.glob(pattern):
            shutil.copyfile(path, staging / path.name)
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    (staging / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
    if target.exists():
        shutil.rmtree(target)
    staging.rename(target)
