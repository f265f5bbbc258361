"""Block-FP8 as Qwen publishes it for engines: e4m3 weights and one bf16 scale for every 128 x 128 block.

`X.weight` w becomes q = round(w / s) in float8_e4m3fn. `X.weight_scale_inv` holds s = max |w| of the block /
448, with the shape of w / 128 (rounded up). An engine multiplies q by s. Only linear layers are quantised:
embeddings, norms, routers and the head stay as they are. The engine quantises the activations.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_vespo.checkpoints.safetensors_file import TensorInfo
from megatron_vespo.checkpoints.spans import TensorReader

BLOCK = 128
DTYPE = torch.float8_e4m3fn
_SCALE_DTYPE = torch.bfloat16
_SCALE_SUFFIX = "_scale_inv"
# float32 weights processed at once, which bounds the memory: of a reader, and of a stream on a GPU
_STRIP_BYTES, _STREAM_BYTES = 8 * 2**20, 256 * 2**20


def is_quantised(name: str) -> bool:
    """Whether the HF tensor is the matrix of a linear layer inside the model."""
    return name.endswith("_proj.weight")


def quantisation_config(names: Mapping[str, Any]) -> dict[str, Any]:
    """config.json's `quantization_config` for a model of these HF tensors."""
    kept = [name.removesuffix(".weight") for name in names if not is_quantised(name)]
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": [name for name in kept if not name.endswith("embed_tokens")],
    }


def quantise(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Float [rows, columns] as e4m3 and bf16 scales, one per block. ValueError for NaN or infinity."""
    rows, columns = weights.shape
    shape = -(-rows // BLOCK) * BLOCK, -(-columns // BLOCK) * BLOCK
    padded = torch.zeros(shape, dtype=torch.float32, device=weights.device)
    padded[:rows, :columns] = weights
    blocks = padded.view(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)
    largest = blocks.abs().amax(dim=(1, 3))
    if not largest.isfinite().all():
        raise ValueError("holds NaN or infinity")
    limit = torch.finfo(DTYPE).max
    scales = (largest / limit).to(_SCALE_DTYPE)
    scales[scales == 0] = 1  # a block of zeros
    # bf16 may have rounded the scale down, so a quotient may exceed the limit
    quotients = (blocks / scales.float()[:, None, :, None]).clamp_(-limit, limit)
    return quotients.view_as(padded)[:rows, :columns].to(DTYPE), scales


def quantised(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The stream of full HF tensors as an engine loads it: a linear layer's scales follow its weights.

    ValueError, with the tensor's name, for NaN or infinity.
    """
    for name, tensor in tensors:
        if not is_quantised(name):
            yield name, tensor
            continue
        rows = max(1, _STREAM_BYTES // (BLOCK * tensor.shape[1] * 4)) * BLOCK
        try:
            values, scales = zip(*map(quantise, tensor.split(rows)), strict=True)
        except ValueError as error:
            raise ValueError(f"{name} {error}: it has no FP8 weights") from error
        yield name, torch.cat(values)
        yield name + _SCALE_SUFFIX, torch.cat(scales)


class BlockFP8Reader:
    """The tensors of another reader, quantised as they are read."""

    def __init__(self, reader: TensorReader, tensors: Mapping[str, TensorInfo]):
        self.folder = reader.folder
        self._reader, self._plain = reader, tensors
        self._tensors: dict[str, TensorInfo] = {}
        for name, info in tensors.items():
            if is_quantised(name):
                blocks = tuple(-(-size // BLOCK) for size in info.shape)
                self._tensors[name] = TensorInfo(DTYPE, info.shape)
                self._tensors[name + _SCALE_SUFFIX] = TensorInfo(_SCALE_DTYPE, blocks)
            else:
                self._tensors[name] = info

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read_rows(self, name: str, start: int, stop: int, out: Tensor) -> None:
        """Fill `out`, uint8 [bytes of those rows]. Safe to call from several threads."""
        weight_name = name.removesuffix(_SCALE_SUFFIX)
        if not is_quantised(weight_name):
            self._reader.read_rows(name, start, stop, out)
            return
        of_scales = name != weight_name
        target = out.view(self._tensors[name].dtype).view(stop - start, -1)
        blocks = range(start, stop) if of_scales else range(start // BLOCK, -(-stop // BLOCK))
        step = max(1, _STRIP_BYTES // (BLOCK * self._plain[weight_name].shape[1] * 4))
        for first in blocks[::step]:
            row, values, scales = self._strip(weight_name, first, min(first + step, blocks.stop))
            wanted, begin = (scales, first) if of_scales else (values, row)
            # a span of weights may begin and end inside a block
            low, high = max(start, begin), min(stop, begin + len(wanted))
            target[low - start : high - start] = wanted[low - begin : high - begin]

    def _strip(self, name: str, first: int, last: int) -> tuple[int, Tensor, Tensor]:
        """Quantise the rows of blocks `first` to `last`. Returns the first row and `quantise`'s result."""
        info = self._plain[name]
        start, stop = first * BLOCK, min(last * BLOCK, info.rows)
        source = torch.empty((stop - start) * info.row_bytes, dtype=torch.uint8)
        self._reader.read_rows(name, start, stop, source)
        try:
            return start, *quantise(source.view(info.dtype).view(stop - start, -1))
        except ValueError as error:
            raise ValueError(f"{self.folder}: {name}[{start}:{stop}] {error}") from error
