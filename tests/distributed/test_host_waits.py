"""How often an optimizer step waits for the device to hand values to the host."""

from __future__ import annotations

import json

import pytest


@pytest.fixture(scope="module")
def waits(on_task) -> dict[str, tuple[int, dict[str, int]]]:
    [result] = on_task("host_waits.py", 1, "--max-tokens-per-gpu", "128")
    return {name: (int(number), json.loads(places)) for name, (number, places) in result.items()}


def test_a_step_waits_once_for_all_its_metrics(waits):
    """And once per micro-batch for the tokens that need no backward pass through the output layer.

    Supports of truncated sampling are found without waiting.
    """
    for number, places in waits.values():
        ours = {place: n for place, n in places.items() if not place.startswith("core/")}
        assert ours == {
            "trainer/step_result.py:reduced": 2,  # `.cpu()`, and `.numpy()` of what it returned
            "algorithms/linear_log_probs.py:backward": number,
        }


def test_more_micro_batches_wait_no_more_often_for_metrics(waits):
    (fewer, some), (more, all_places) = waits["half"], waits["whole"]
    assert fewer < more
    of_megatrons_step = {"core/optimizer/clip_grads.py:get_grad_norm_fp32", "trainer/step_result.py:reduced"}
    assert {p: some[p] for p in of_megatrons_step} == {p: all_places[p] for p in of_megatrons_step}
