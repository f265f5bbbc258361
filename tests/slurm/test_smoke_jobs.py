"""`megatron-vespo submit --smoke` on two nodes of a real SLURM: real Ray, Megatron and SGLang on both."""

from __future__ import annotations

import json

import pytest

from tests.support.slurm_jobs import SubmittedJob

pytestmark = [pytest.mark.timeout(1200), pytest.mark.slow]
LONG_S = 900.0
RECIPE = """\
--hf-checkpoint nowhere --prompt-data nowhere --output-dir out --save c --load c
--train-iters 8 --lr 1e-6 --trainer-ranks 2 --pipeline-model-parallel-size 2
--rollout-engines 2
"""


def smoke(slurm, folder, *more: str) -> SubmittedJob:
    folder.mkdir()
    recipe = folder / "two_nodes.flags"
    recipe.write_text(RECIPE)
    words = [str(recipe), "--smoke", "--nodes", "2", "--gpus-per-node", "0", "--time", "20", *more]
    return SubmittedJob(slurm, folder, *words)


def test_two_nodes(slurm, tmp_path):
    job = smoke(slurm, tmp_path / "job")
    job.check_end(LONG_S, JobState="COMPLETED", NumNodes="2", Restarts="0")
    told = json.loads((job.folder / "out/smoke.json").read_text())
    assert told["ok"] and told["nodes"] == "2 nodes, 4 CPU cores"
    assert told["layout"] == "pp2 on 2 ranks, 2 engines of 1"
    assert job.nothing_left()


def test_what_fails_fails_the_job(slurm, tmp_path):
    job = smoke(slurm, tmp_path / "job", "--sglang-load-format", "nonsense")
    job.check_end(LONG_S, JobState="FAILED", ExitCode="1:0", Restarts="0")
    assert "FAIL start SGLang: engine " in job.output and "     try: " in job.output
    assert job.nothing_left()
