"""What a trainer rank keeps where: packs in host memory, and all of its memory in the engines' turn."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.named_layouts import LAYOUTS, VIRTUAL_STAGES

SMALL_PACKS = "--max-tokens-per-gpu 64"
# of packs: at most so many of them are in flight, each on every model chunk
PACKS = {
    "one rank": (1, SMALL_PACKS, 1),
    "one rank, R2": (1, f"{SMALL_PACKS} --routing-replay R2", 1),
    "one rank, a loss that adapts": (1, f"{SMALL_PACKS} --policy-loss bapo", 1),
    "pp2 vpp2, R2": (2, f"{SMALL_PACKS} --pipeline-model-parallel-size 2 {VIRTUAL_STAGES} "
                        "--routing-replay R2", 2 * 2 + 2 + 1),
}  # fmt: skip
TURNS = {
    "one rank, bf16": (1, "--bf16 --async-save"),
    "dp2, overlap": LAYOUTS["dp2, overlap"],
    "tp2 pp2 ep2": (4, LAYOUTS["tp2 pp2 ep2"][1] + " --bf16 --async-save"),
}


@pytest.mark.parametrize("name", PACKS)
def test_packs_wait_in_host_memory(on_task, name):
    num_ranks, flags, in_flight = PACKS[name]
    for result in on_task("gpu_memory.py", num_ranks, *flags.split()):
        packs, host = int(result["1: packs"]), int(result["1: host"])
        assert packs >= 4 and result["4: packs"] == 4 * packs and result["4: host"] == 4 * host
        for size in (1, 4):
            assert result[f"{size}: device"] == result[f"{size}: device after a step"] == 0
        # of packs of about the same size, with the next one on its way
        assert 0 < result["4: peak"] <= (in_flight + 1) * 1.5 * host / packs
        assert result["4: peak"] == result["1: peak"]


@pytest.mark.parametrize("layout", TURNS)
def test_all_memory_is_given_back_and_comes_back_bit_for_bit(on_task, tmp_path, layout):
    num_ranks, flags = TURNS[layout]

    def run(folder: str, *more: str):
        arguments = "--folder", str(tmp_path / folder), *flags.split(), *more
        return on_task("gpu_memory.py", num_ranks, *arguments)

    with_it, without, resumed = (
        run("with"),
        run("without", "--colocate", "--no-colocate-offload"),
        run("with"),
    )
    for result, plain, again in zip(with_it, without, resumed, strict=True):
        there = {what: int(result[f"at work: {what}"]) for what in ("weights", "optimizer", "gradients")}
        assert min(there.values()) > 0
        for when, kept in {
            "in a sync": {"weights"}, "at rest": set(), "for log-probs": {"weights"},
            "for a save": {"weights", "optimizer"}, "at rest again": set(),
        }.items():  # fmt: skip
            for what, size in there.items():
                assert result[f"{when}: {what}"] == (size if what in kept else 0), (when, what)
                stays = what != "gradients"
                assert plain[f"{when}: {what}"] == (plain[f"at work: {what}"] if stays else 0)
        assert result["sent"] and result["log-probs"] and result["restored"]
        for name in ("losses", "log-probs after"):
            np.testing.assert_array_equal(result[name], plain[name])
        assert [int(again[what]) for what in there] == [0, 0, 0]
        np.testing.assert_array_equal(again["losses"], result["losses"][2:])
        np.testing.assert_array_equal(again["log-probs after"], result["log-probs after"])
