"""A run with nothing left to do."""

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from megatron_vespo.driver.finished import finished_by_files, why_finished
from megatron_vespo.driver.resume import find_checkpoint
from tests.support.settings import flat_settings

FOUND = Path("/saved/iter_0000016"), 16


@pytest.fixture()
def args(tmp_path) -> Namespace:
    """Of a run that has ended."""
    (tmp_path / "hf").mkdir()
    paths = {"checkpoint": "/saved", "HF export": "out/hf"}
    (tmp_path / "summary.json").write_text(json.dumps({"steps": 16, "paths": paths}))
    return Namespace(load="/saved", ckpt_step=None, train_iters=16, output_dir=tmp_path, hf_export=True)


def test_it_is_said(args):
    out = args.output_dir
    assert why_finished(args, *FOUND) == (
        f"16 of 16 steps are done: /saved/iter_0000016; HF export in {out}/hf, summary in {out}/summary.json"
    )
    args.hf_export = False
    assert why_finished(args, *FOUND) == (
        f"16 of 16 steps are done: /saved/iter_0000016, summary in {out}/summary.json"
    )


@pytest.mark.parametrize("step", [15, 8])
def test_steps_are_left(args, step):
    assert why_finished(args, Path("/saved"), step) is None


def test_an_export_that_is_missing_is_made(args):
    (args.output_dir / "hf").rmdir()
    assert why_finished(args, *FOUND) is None


@pytest.mark.parametrize(
    "summary",
    [
        None,
        "{",
        json.dumps({"steps": 12, "paths": {"checkpoint": "/saved", "HF export": "out/hf"}}),
        json.dumps({"steps": 16, "paths": {"checkpoint": "/others", "HF export": "out/hf"}}),
        json.dumps({"steps": 16, "paths": {"checkpoint": "/saved"}}),
        json.dumps({"steps": 16, "paths": "/saved"}),
        "[]",
    ],
)
def test_what_another_run_has_left_does_not_count(args, summary):
    (args.output_dir / "summary.json").unlink()
    if summary is not None:
        (args.output_dir / "summary.json").write_text(summary)
    assert why_finished(args, *FOUND) is None


@pytest.fixture()
def saved(args, tmp_path) -> Path:
    """Its checkpoints, named by its summary."""
    folder = tmp_path / "checkpoints"
    (folder / "iter_0000016").mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("16")
    summary = args.output_dir / "summary.json"
    summary.write_text(summary.read_text().replace("/saved", str(folder)))
    return folder


def test_the_command_line_says_it_without_torch(args, saved):
    """In a process of its own, which is timed by what it imports."""
    flags = f"--train-iters 16 --load {saved} --output-dir {args.output_dir} --lr 1e-6 --bf16"
    code = (
        "import sys; from megatron_vespo.commands.main import run; code = run(sys.argv[1:]); "
        "assert not {'torch', 'numpy', 'ray', 'megatron'} & sys.modules.keys(); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "train", *flags.split()], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"16 of 16 steps are done: {saved}/iter_0000016; HF export in ")


@pytest.mark.parametrize(
    "more",
    [
        "--train-iters 32",
        "--train-iters x",
        "--ckpt-step 8",
        "--load /nowhere",
        "--load",
        "--output-dir $UNSET_VARIABLE/out",
    ],
)
def test_what_the_files_do_not_tell(args, saved, more):
    flags = f"--train-iters 16 --load {saved} --output-dir {args.output_dir} {more}"
    assert finished_by_files(flags.split()) is None


def test_nothing_to_go_on_from(tmp_path):
    assert find_checkpoint(flat_settings(load=None, ckpt_step=None)) is None
    assert find_checkpoint(flat_settings(load=str(tmp_path), ckpt_step=None)) is None
