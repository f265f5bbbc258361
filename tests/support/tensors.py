"""Tensors of HF folders."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every file, whatever the index says; no name may come twice."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                assert name not in tensors, f"{name} is also in {path}"
                tensors[name] = file.get_tensor(name)
    return tensors


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and tensor.equal(other[name]), name
