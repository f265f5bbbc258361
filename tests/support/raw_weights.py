"""What an engine's parameters are, byte for byte: SGLang's own checksums are of dequantised weights."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import torch
from torch import Tensor, nn

from megatron_vespo.weight_sync.engine_admin import EngineAdmin

LOADER = "tests.support.raw_weights.write_sums"  # for --custom-weight-loader


def write_sums(model: nn.Module, named_tensors: list[tuple[str, Tensor]]) -> None:
    """Called in each rank of an engine: {name: [type, shape, digest]} into the file that it is given."""
    [(path, _)] = named_tensors
    sums = {
        name: [str(tensor.dtype), list(tensor.shape), _digest(tensor)]
        for name, tensor in model.named_parameters()
    }
    Path(path).write_text(json.dumps(sums))


def _digest(tensor: Tensor) -> str:
    data = tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy()
    return hashlib.sha256(data.tobytes()).hexdigest()


def raw_sums(admin: EngineAdmin, size: int, folder: Path) -> list[dict[str, list]]:
    """Of the one engine of `admin`, by its `size` ranks."""
    paths = [folder / f"raw-{rank}.json" for rank in range(size)]
    admin.call("/begin_weight_update", {})
    payload = {"load_format": LOADER, "flush_cache": False, "selector": "target"}
    admin.call(
        "/update_weights_from_tensor", payload | {"serialized_named_tensors": list(map(_packed, paths))}
    )
    admin.call("/end_weight_update", {})
    return [json.loads(path.read_text()) for path in paths]


def _packed(path: Path) -> str:
    stream = io.BytesIO()
    ForkingPickler(stream).dump([(str(path), torch.empty(0))])
    return base64.b64encode(stream.getvalue()).decode()
