"""A run with nothing left to do."""

import json
from argparse import Namespace
from pathlib import Path

import pytest

from megatron_vespo.resume import FoundCheckpoint, find_checkpoint, why_finished

FOUND = FoundCheckpoint(Path("/saved/iter_0000016"), 16)


@pytest.fixture()
def args(tmp_path) -> Namespace:
    """Of a run that has ended."""
    (tmp_path / "hf").mkdir()
    paths = {"checkpoint": "/saved", "HF export": "out/hf"}
    (tmp_path / "summary.json").write_text(json.dumps({"steps": 16, "paths": paths}))
    return Namespace(load="/saved", ckpt_step=None, train_iters=16, output_dir=tmp_path, hf_export=True)


def test_it_is_said(args):
    out = args.output_dir
    assert why_finished(args, FOUND) == (
        f"16 of 16 steps are done: /saved/iter_0000016; HF export in {out}/hf, summary in {out}/summary.json"
    )
    args.hf_export = False
    assert why_finished(args, FOUND) == (
        f"16 of 16 steps are done: /saved/iter_0000016, summary in {out}/summary.json"
    )


@pytest.mark.parametrize("step", [15, 8])
def test_steps_are_left(args, step):
    assert why_finished(args, FoundCheckpoint(Path("/saved"), step)) is None
    assert why_finished(args, None) is None


def test_an_export_that_is_missing_is_made(args):
    (args.output_dir / "hf").rmdir()
    assert why_finished(args, FOUND) is None


@pytest.mark.parametrize(
    "summary",
    [
        None,
        "{",
        json.dumps({"steps": 12, "paths": {"checkpoint": "/saved", "HF export": "out/hf"}}),
        json.dumps({"steps": 16, "paths": {"checkpoint": "/others", "HF export": "out/hf"}}),
        json.dumps({"steps": 16, "paths": {"checkpoint": "/saved"}}),
    ],
)
def test_what_another_run_has_left_does_not_count(args, summary):
    (args.output_dir / "summary.json").unlink()
    if summary is not None:
        (args.output_dir / "summary.json").write_text(summary)
    assert why_finished(args, FOUND) is None


def test_nothing_to_go_on_from(tmp_path):
    assert find_checkpoint(Namespace(load=None, ckpt_step=None)) is None
    assert find_checkpoint(Namespace(load=str(tmp_path), ckpt_step=None)) is None
