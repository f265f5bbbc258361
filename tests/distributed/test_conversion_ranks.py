"""Conversions that several processes share, and what a failing one means for the others."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.launch import PROGRAMS, TIMEOUT_S, launch
from tests.support.tensors import read_tensors


@pytest.fixture
def convert(tmp_path):
    """Run it on ranks; returns their exit codes and what they said."""
    launched = 0

    def run(num_ranks: int, *words: object) -> tuple[list[int], list[str]]:
        nonlocal launched
        launched += 1
        folder = tmp_path / f"launch {launched}"
        results = launch(PROGRAMS / "convert.py", num_ranks, list(map(str, words)), TIMEOUT_S, folder)
        return [int(result["code"]) for result in results], [str(result["err"]) for result in results]

    return run


def test_round_trip_on_two_ranks(task, convert, tmp_path):
    megatron, target = tmp_path / "megatron", tmp_path / "target"
    done = [0, 0], ["", ""]
    assert convert(2, "hf-to-megatron", task.model, megatron) == done
    files = {path.name for path in (megatron / "release").glob("*.distcp")}
    assert {"__0_0.distcp", "__1_0.distcp"} <= files
    assert convert(2, "verify", megatron, task.model) == done
    assert convert(2, "megatron-to-hf", megatron, target, "--max-shard-size", "1e-5") == done
    assert convert(2, "verify", target) == done
    source, found = read_tensors(task.model), read_tensors(target)
    assert found.keys() == source.keys()
    assert all(found[name].equal(tensor) for name, tensor in source.items())


def test_one_bad_tensor_ends_all_ranks(task, convert, tmp_path):
    source = shutil.copytree(task.model, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    last = list(tensors)[-1]
    tensors[last].view(-1)[-1] = torch.nan
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    codes, said = convert(2, "hf-to-megatron", source, tmp_path / "out")
    assert codes == [2, 2]
    assert all(text.count("\n") == 1 and "holds NaN or infinity" in text for text in said)
    assert sum(text.startswith("megatron-vespo: rank ") for text in said) == 1
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_a_failing_rank_fails_all(tmp_path):
    zero, one = launch(PROGRAMS / "failing_ranks.py", 2, [], TIMEOUT_S, tmp_path)
    assert zero["said"].tolist() == [
        "ValueError: rank 1: broken", "ValueError: broken",
        "ValueError: rank 1: broken", "OSError: broken",
        "RuntimeError: rank 1: 'broken'", "KeyError: 'broken'",
    ]  # fmt: skip
    assert one["said"].tolist() == [
        "ValueError: broken", "ValueError: rank 0: broken",
        "OSError: broken", "ValueError: rank 0: broken",
        "KeyError: 'broken'", "RuntimeError: rank 0: 'broken'",
    ]  # fmt: skip
    for result in (zero, one):
        assert result["together"].tolist() == [0, 10] and result["first"] == 7
