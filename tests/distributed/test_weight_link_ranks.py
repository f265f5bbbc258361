"""A weight sync that fails at one rank fails at all of them, and all go on."""

from __future__ import annotations

from tests.support.launch import PROGRAMS, TIMEOUT_S, launch


def test_all_ranks_know_of_a_failure_and_can_repeat_the_sync(tmp_path):
    results = launch(PROGRAMS / "weight_link.py", 4, [], TIMEOUT_S, tmp_path)
    for result in results:
        assert result["outcomes"].tolist() == [
            "served",
            "EnginesLostError: weight sync failed: engine http://b: gone",
            "served",
            "WeightSyncError: refused",
        ]
        # the gathers are collectives: whoever cannot send takes part in them nevertheless
        assert result["gathered"] == 4 * 4
    assert [result["sent"].tolist() for result in results] == [[-1, -1, -1, -1], [], [-1], []]
