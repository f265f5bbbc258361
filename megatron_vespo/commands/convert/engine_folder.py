"""Reads a quantised HF folder as engines load it: tensors without a model family. No conversion reads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vespo.checkpoints.hf_checkpoint import HFCheckpointReader
from megatron_vespo.checkpoints.safetensors_file import TensorInfo
from megatron_vespo.checkpoints.sources import Source, is_hf, opened
from megatron_vespo.models.hf_config import read_unchecked


@dataclass(frozen=True)
class EngineFolder:
    """A quantised folder's tensors, to describe them and to compare them with its manifest."""

    folder: Path
    hf_config: Mapping[str, Any]
    reader: HFCheckpointReader
    kind = "HF, quantised"

    @property
    def manifest_folder(self) -> Path:
        return self.folder

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self.reader.tensors

    @property
    def architectures(self) -> list[str]:
        return list(map(str, self.hf_config.get("architectures") or []))

    @property
    def quantisation(self) -> str:
        """The method, and the format if the method has several."""
        config = self.hf_config["quantization_config"]
        words = [config.get("quant_method"), config.get("quant_algo") or config.get("fmt")]
        blocks = config.get("weight_block_size")
        return " ".join(map(str, filter(None, words))) + (f" in blocks of {blocks}" if blocks else "")


@contextmanager
def opened_as_stored(path: Path, hf_config: Path | None = None) -> Iterator[Source | EngineFolder]:
    """Opens what `sources.opened` opens, or a quantised folder."""
    config = read_unchecked(path) if is_hf(path) else {}
    if not isinstance(config.get("quantization_config"), dict):
        with opened(path, hf_config) as source:
            yield source
        return
    with HFCheckpointReader(path) as reader:
        yield EngineFolder(path, config, reader)
