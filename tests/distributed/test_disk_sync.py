"""Weights through files, between real processes: engines get their shards, files hold what has changed."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megatron_vespo.models.family import FAMILIES
from tests.support.launch import PROGRAMS, TIMEOUT_S, launch
from tests.support.sync_layouts import changed_weights, engine_weights, model_shape

MOE, DENSE = "Qwen3MoeForCausalLM", "Qwen3ForCausalLM"
STEPS = [0.0, 0.0, 0.05, 0.3, 1.0]  # shares of the elements that change before a sync


@pytest.mark.parametrize(
    ("family", "layout", "engine", "num_engines"),
    [
        pytest.param(MOE, {"tp": 2, "pp": 2, "ep": 2}, (2, 2), 2, id="two engines of experts"),
        pytest.param(DENSE, {"tp": 2, "replicas": 2}, (2, 1), 1, id="replicas"),
    ],
)
def test_engines_read_what_has_changed(tmp_path, family, layout, engine, num_engines):
    place = ["a", "a"]
    case = dict(
        family=family, trainer=layout, engine=engine, trainer_places=[place] * 4,
        engine_places=[[place] * engine[0]] * num_engines, buffer_bytes=1500, num_syncs=2, steps=STEPS,
    )  # fmt: skip
    results = launch(
        PROGRAMS / "disk_sync.py", 4 + num_engines, [str(tmp_path), json.dumps(case)], TIMEOUT_S, tmp_path
    )
    shape = model_shape(4, False, 4 if "num_experts" in FAMILIES[family].sizes else 0)

    def shards(number: int) -> list[dict[str, np.ndarray]]:
        hf = changed_weights(FAMILIES[family], shape, STEPS[:number])
        return [
            {name: tensor.numpy() for name, tensor in engine_weights(hf, shape, rank, *engine).items()}
            for rank in range(engine[0])
        ]

    for number in range(num_engines):
        for rank, expected in enumerate(shards(len(STEPS))):
            found = np.load(tmp_path / f"engine-{number}-{rank}.npz")
            assert set(found) == set(expected)
            for name, tensor in expected.items():
                np.testing.assert_array_equal(found[name], tensor, name)
    versions = [shards(number + 1) for number in range(len(STEPS))]
    everything = sum(int((tensor != 0).sum()) for of_rank in versions[0] for tensor in of_rank.values())
    changed = [
        sum(int((new[name] != old[name]).sum()) for new, old in zip(*pair, strict=True) for name in new)
        for pair in zip(versions[1:], versions, strict=False)
    ]
    for result in results[:4]:
        # another connection begins with everything
        assert result["changed"].tolist() == 2 * [everything, *changed]
        written = result["written"].tolist()
        assert written == result["found"].tolist(), "files have other sizes"
        assert written[:2] == [4 * everything, 0]
        assert written[4] == 4 * everything == 4 * changed[-1]
        for size, number in zip(written[2:4], changed[1:3], strict=True):
            num_parts = 4 * engine[0] * (4 * everything // 1500 + 4)
            assert 4 * number < size <= 4 * number + min(number, everything / 8) + 10 * num_parts
