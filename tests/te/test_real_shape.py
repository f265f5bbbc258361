"""Qwen3-30B-A3B as its recipe cuts it: names, shapes and checkpoint keys under Transformer Engine."""

from __future__ import annotations

import ast
import functools
import json
from pathlib import Path

import pytest
import torch

from megatron_vespo.arguments.recipe import read_recipe
from megatron_vespo.checkpoints.torch_dist_names import addresses, extra_states
from megatron_vespo.models.family import family_of, is_expert, shape_of
from megatron_vespo.models.mappings import Direct
from tests.support.launch import REPOSITORY
from tests.support.published_config import QWEN3_30B_A3B

PROGRAM = Path(__file__).parent / "programs" / "real_shape.py"
RECIPE = REPOSITORY / "examples" / "qwen3_30b_a3b" / "synchronous_n8.flags"  # 16 ranks: TP 2, EP 8
EXPERTS = QWEN3_30B_A3B["num_experts"]
LAYERS = QWEN3_30B_A3B["num_hidden_layers"]
CASES = {  # rank, flags more than the recipe's, its layers, its experts
    "first": (0, "", range(LAYERS), range(EXPERTS // 8)),
    "last": (15, "", range(LAYERS), range(EXPERTS - EXPERTS // 8, EXPERTS)),
    "second stage": (
        8,
        "--pipeline-model-parallel-size 2 --expert-model-parallel-size 4",
        range(LAYERS // 2, LAYERS),
        range(EXPERTS // 4),
    ),
}


@pytest.fixture(scope="module")
def rank(launch, tmp_path_factory):
    """What the rank of a case has; each is built once."""
    model = tmp_path_factory.mktemp("model")
    (model / "config.json").write_text(json.dumps(QWEN3_30B_A3B))

    @functools.cache
    def build(case: str):
        number, flags, _, _ = CASES[case]
        arguments = [*read_recipe(RECIPE), "--hf-checkpoint", str(model), *flags.split()]
        [result] = launch(True, PROGRAM, 1, [str(number), *arguments, "--distributed-backend", "nccl"])
        return result

    return build


@pytest.fixture(scope="module")
def family():
    return family_of(QWEN3_30B_A3B)


@pytest.fixture(scope="module")
def shape():
    return shape_of(QWEN3_30B_A3B)


@pytest.mark.parametrize("case", CASES)
def test_names_and_shapes_are_those_of_the_conversion_table(rank, family, shape, case):
    """What an export would gather from the rank's parameters is what the HF model has in its place."""
    result = rank(case)
    assert result["transformer_impl"] == "transformer_engine"
    expected = family.hf_tensors(shape)
    found = set()
    for name, parameter_shape in zip(result["names"], result["shapes"], strict=True):
        mapping = family.mapping_for(name, shape)  # KeyError for a name that it does not know
        replicated = isinstance(mapping, Direct) and mapping.dim is None
        size = 1 if is_expert(name) or replicated else 2
        shard = torch.empty(ast.literal_eval(str(parameter_shape)), device="meta")
        for hf_name, tensor in mapping.merge([shard] * size).items():
            assert tuple(tensor.shape) == expected[hf_name], (name, hf_name)
            found.add(hf_name)
    assert found == {hf_name for hf_name in expected if belongs(hf_name, case)}


def belongs(hf_name: str, case: str) -> bool:
    """Whether the rank has a part of it: all but other stages' layers and other ranks' experts."""
    _, _, layers, experts = CASES[case]
    words = hf_name.split(".")
    if "layers" not in words:
        first, last = layers[0] == 0, layers[-1] == LAYERS - 1
        return first if "embed_tokens" in words else last
    here = int(words[words.index("layers") + 1]) in layers
    return here and ("experts" not in words or int(words[words.index("experts") + 1]) in experts)


@pytest.mark.parametrize("case", CASES)
def test_checkpoint_keys_are_those_that_conversions_write(rank, family, shape, case):
    result = rank(case)
    written = {
        repr((address.key, address.index, address.stack))
        for name in family.parameters(shape)
        for address in addresses(name, shape)
    }
    assert len(result["addresses"]) > 1000
    assert set(result["addresses"]) <= written
    assert len(result["objects"]) > 1000
    assert set(result["objects"]) <= set(extra_states(shape))
