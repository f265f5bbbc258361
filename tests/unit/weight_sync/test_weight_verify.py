"""What checksums of engines are compared with; engines are stood in for by their answers."""

import pytest

from megatron_vespo.weight_sync import verify
from megatron_vespo.weight_sync.engine_admin import EngineAdmin, WeightSyncError

A, B, C = "http://a:1", "http://b:1", "http://c:1"


def answer(*ranks: dict[str, str]) -> dict:
    return {
        "success": True,
        "ranks": [
            {"checksums": sums, "parallelism_info": [{"role": "target", "rank": number}]}
            for number, sums in enumerate(ranks)
        ],
    }


class Admin:
    """Answers of several engines to /weights_checker."""

    def __init__(self, answers: dict[str, dict]):
        self.urls, self._answers = list(answers), list(answers.values())

    def call(self, path: str, payload: dict) -> list[dict]:
        assert (path, payload) == ("/weights_checker", {"action": "checksum"})
        return self._answers


def test_equal_engines_agree():
    sums = {"embed": "0a", "norm": "0b"}
    admin = Admin({url: answer(sums) for url in (A, B, C)})
    assert verify.check_engines_agree(admin, 3) == [sums] * 3


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"embed": "0a", "norm": "ff"}, f"engine {C} has checksum ff of norm, engine {A} has 0b (1 of 2"),
        ({"embed": "0a"}, f"engine {C} has checksum none of norm, engine {A} has 0b (1 of 2"),
        ({"embed": "0a", "norm": "0b", "x": "01"}, f"engine {C} has checksum 01 of x, engine {A} has none"),
        ({}, f"engine {C} has checksum none of embed, engine {A} has 0a (2 of 2"),
    ],
)
def test_the_engine_that_differs_is_named(other, said):
    sums = {"embed": "0a", "norm": "0b"}
    admin = Admin({A: answer(sums), B: answer(sums), C: answer(other)})
    with pytest.raises(WeightSyncError) as error:
        verify.check_engines_agree(admin, 3)
    assert "after the sync of version 3" in str(error.value)
    assert said in str(error.value)


def test_ranks_of_an_engine_are_compared_one_by_one():
    left, right = {"qkv": "01"}, {"qkv": "02"}
    admin = Admin({A: answer(left, right), B: answer(left, left)})
    with pytest.raises(WeightSyncError, match="checksum 01 of qkv on rank 1, engine http://a:1 has 02"):
        verify.check_engines_agree(admin, 3)
    assert verify.weight_sums(admin)[0] == {"qkv on rank 0": "01", "qkv on rank 1": "02"}


@pytest.mark.parametrize("pause", ["retract", None])
def test_no_request_runs_while_the_weights_are_random(tmp_path, pause):
    calls = []

    class Recording(EngineAdmin):
        def call(self, path: str, payload: dict, timeout_s: float | None = None) -> list[dict]:
            calls.append((self.urls, path, payload.get("mode") or payload.get("action")))
            return [answer({"embed": "0a"})]

    verify.check_against_checkpoint(Recording([A, B], 1.0, pause), {"embed": "0a"}, tmp_path, 3, 1.0)
    loading = [
        ([A], "/weights_checker", "checksum"),
        ([A], "/weights_checker", "reset_tensors"),
        ([A], "/update_weights_from_disk", None),
        ([A], "/weights_checker", "checksum"),
    ]
    if pause is not None:
        loading = [([A], "/pause_generation", pause), *loading, ([A], "/continue_generation", None)]
    assert calls == loading
