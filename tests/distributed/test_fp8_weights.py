"""What FP8 engines get does not depend on the trainer's layout: it is what `convert` writes."""

from __future__ import annotations

import json

import pytest
import torch

from tests.support.named_layouts import LAYOUTS
from tests.support.tensors import read_tensors
from tests.support.tiny_checkpoints import convert


@pytest.fixture(scope="module")
def converted(task, tmp_path_factory):
    """The folder of engines that `convert` makes of the task's model."""
    folder = tmp_path_factory.mktemp("converted")
    assert convert("hf-to-megatron", task.model, folder / "megatron") == 0
    assert convert("megatron-to-hf", folder / "megatron", folder / "fp8", "--dtype", "fp8") == 0
    return folder / "fp8"


@pytest.mark.parametrize("layout", ["one rank", "etp2", "tp2 pp2 ep2"])
def test_bit_for_bit_what_convert_writes(on_task, converted, tmp_path, layout):
    num_ranks, flags = LAYOUTS[layout]
    results = on_task("fp8_weights.py", num_ranks, "--export", str(tmp_path / "fp8"), *flags.split())
    expected, found = read_tensors(converted), read_tensors(tmp_path / "fp8")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].view(torch.uint8).equal(tensor.view(torch.uint8)), name
    assert sum(tensor.dtype == torch.float8_e4m3fn for tensor in found.values()) > 100
    configs = [json.loads((folder / "config.json").read_text()) for folder in (converted, tmp_path / "fp8")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    by_stage = {int(result["stage"]): result for result in results}
    sent = sum(int(result["fp8"]) for result in by_stage.values())
    assert sent == sum(tensor.nbytes for tensor in found.values())
