"""Reads experts that are stored as one tensor per layer as one tensor per expert.

transformers 5 holds a layer's experts as `experts.gate_up_proj` [experts, 2 x width, hidden], gate over up,
and `experts.down_proj` [experts, hidden, width] (Qwen3MoeExperts). It writes this form with
`save_pretrained(..., save_original_format=False)`. Each expert's matrices are consecutive bytes of such a
tensor, so splitting it copies nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from megatron_vespo.checkpoints.safetensors_file import StoredTensor

_FUSED = re.compile(r"(model\.layers\.\d+\.mlp\.experts\.)(gate_up_proj|down_proj)")
_MATRICES = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def is_fused(name: str) -> bool:
    """Whether the HF tensor holds all experts of a layer."""
    return _FUSED.fullmatch(name) is not None


def taken_apart(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """`tensors`, in order, with fused ones replaced by `experts.E.gate_proj.weight` and the like.

    ValueError for a fused tensor that cannot be split, and for an expert that exists in both forms.
    """
    apart: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        for own_name, part in _parts(name, tensor) if is_fused(name) else [(name, tensor)]:
            if own_name in apart:
                raise ValueError(f"{tensor.path}: {own_name} is there twice, once in a fused tensor")
            apart[own_name] = part
    return apart


def _parts(name: str, tensor: StoredTensor) -> Iterator[tuple[str, StoredTensor]]:
    found = _FUSED.fullmatch(name)
    assert found is not None
    prefix, kind = found.groups()
    matrices = _MATRICES[kind]
    if len(tensor.shape) != 3 or tensor.shape[1] % len(matrices):
        raise ValueError(
            f"{tensor.path}: {name} is {tensor.shape}, fused experts are (experts, {len(matrices)} x rows, "
            "columns)"
        )
    experts, rows, columns = tensor.shape
    shape = (rows // len(matrices), columns)
    offset = tensor.offset
    for expert in range(experts):
        for matrix in matrices:
            part = replace(tensor, shape=shape, offset=offset)
            yield f"{prefix}{expert}.{matrix}.weight", part
            offset += part.nbytes
