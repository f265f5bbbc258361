"""Weights shard to shard over every way that they can take, between real processes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron_vespo.models.family import FAMILIES
from tests.support.launch import PROGRAMS, TIMEOUT_S, launch
from tests.support.sync_layouts import engine_weights, model_shape, weights

MOE, DENSE = "Qwen3MoeForCausalLM", "Qwen3ForCausalLM"
TWO_BY_TWO = {"tp": 2, "pp": 2, "ep": 2}
ONE_HOST = [("a", "a")] * 4
A_GPU_EACH = [("a", "gpu 0"), ("a", "gpu 1"), ("b", "gpu 2"), ("b", "gpu 3")]


def sync(folder: Path, **case) -> list[int]:
    """Sync engines whose ranks are at `engine_places`, check their weights; bytes sent by trainer ranks."""
    family = FAMILIES[case["family"]]
    shape = model_shape(4, False, 4 if "num_experts" in family.sizes else 0)
    num_ranks, num_engines = len(case["trainer_places"]), len(case["engine_places"])
    arguments = [str(folder), json.dumps(case)]
    results = launch(PROGRAMS / "exact_sync.py", num_ranks + num_engines, arguments, TIMEOUT_S, folder)
    hf = weights(family, shape)
    for engine in range(num_engines):
        for rank in range(case["engine"][0]):
            expected = engine_weights(hf, shape, rank, *case["engine"])
            found = np.load(folder / f"engine-{engine}-{rank}.npz")
            assert set(found) == set(expected)
            for name, tensor in expected.items():
                # the last of two connections has sent twice
                np.testing.assert_array_equal(found[name], 4 * tensor.numpy().astype(np.float32), name)
    return [int(result["packed"]) for result in results[:num_ranks]]


def shard_bytes(engine: Sequence[int], family: str) -> int:
    """Of all ranks of an engine, without the rows of padding."""
    shape = model_shape(4, False, 4 if "num_experts" in FAMILIES[family].sizes else 0)
    hf = weights(FAMILIES[family], shape)
    found = [engine_weights(hf, shape, rank, *engine) for rank in range(engine[0])]
    return 4 * sum(int((tensor != 0).sum()) for of_rank in found for tensor in of_rank.values())


@pytest.mark.parametrize("staging", [False, True], ids=["", "staging"])
@pytest.mark.parametrize(
    ("family", "layout", "trainer_places", "engine", "engine_places"),
    [
        pytest.param(MOE, TWO_BY_TWO, ONE_HOST, (2, 2), [ONE_HOST[:2]] * 2, id="one host"),
        pytest.param(MOE, TWO_BY_TWO, A_GPU_EACH, (2, 1), [A_GPU_EACH[:2], A_GPU_EACH[2:]], id="colocated"),
        pytest.param(
            MOE, TWO_BY_TWO, A_GPU_EACH, (2, 2), [[("c", "gpu 4"), ("c", "gpu 5")]] * 2, id="apart"
        ),
        pytest.param(
            DENSE, {"tp": 2, "replicas": 2}, A_GPU_EACH, (1, 1), [[("b", "gpu 2")], [("c", "gpu 4")]],
            id="one colocated, one apart, replicas on each host",
        ),
        pytest.param(
            DENSE, {"pp": 2}, [("a", "a"), ("b", "b")], (2, 1), [[("a", "a")] * 2], id="half of it on a host"
        ),
    ],
)  # fmt: skip
def test_engines_get_their_shards(tmp_path, family, layout, trainer_places, engine, engine_places, staging):
    num_engines = len(engine_places)
    packed = sync(
        tmp_path, family=family, trainer=layout, engine=engine, trainer_places=trainer_places,
        engine_places=engine_places, buffer_bytes=1500, staging=staging,
    )  # fmt: skip
    planned = shard_bytes(engine, family)
    # engines with the same sources read the same bytes
    assert sum(packed) in (planned, num_engines * planned)
