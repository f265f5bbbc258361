"""`megatron-vespo check layout` as a user runs it: the table, the exit code, and nothing left running."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.torch import load_file, save_file

from tests.support.runs import ROOT, Run, nothing_left
from tests.support.servers import VOCAB_SIZE

TIMEOUT_S = 240.0
COMMAND = [sys.executable, "-m", "megatron_vespo", "check", "layout"]


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory) -> Path:
    """`tiny_model` with matrices as small as a fresh model's: rounding grows with the logits."""
    folder = tmp_path_factory.mktemp("check") / "model"
    shutil.copytree(tiny_model, folder)
    [file] = folder.glob("*.safetensors")
    weights = {name: w if w.ndim == 1 else w / 4 for name, w in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    return folder


def check(tmp_path: Path, *flags: str) -> tuple[int, str]:
    """Exit code and output of a finished check that left no process."""
    with Run([*COMMAND, *flags], tmp_path / "check.log") as run:
        code = run.wait(TIMEOUT_S)
        assert nothing_left(run)
    print(run.output)
    return code, run.output


def rows(table: Path) -> dict[str, list[str]]:
    """Cells of a markdown table's body by the first one, that itself left out."""
    lines = [line for line in table.read_text().splitlines() if line.startswith("|")][2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {name: rest for name, *rest in cells}


@pytest.mark.timeout(TIMEOUT_S + 60)
def test_layouts_that_agree(model, tmp_path):
    code, output = check(
        tmp_path, "--hf-checkpoint", str(model), "--candidate", "tp2", "pp2,ep2", "--steps", "2",
        "--samples", "16", "--markdown", str(tmp_path / "table.md"),
    )  # fmt: skip
    assert code == 0, output
    assert (
        "pp2,ep2: --trainer-ranks 4 --pipeline-model-parallel-size 2 --expert-model-parallel-size 2" in output
    )
    table = rows(tmp_path / "table.md")
    assert list(table) == ["tp1", "tp2", "pp2,ep2"]
    assert [cells[-1] for cells in table.values()] == ["reference", "ok", "ok"]
    assert [cells[0] for cells in table.values()] == ["1", "2", "4"]
    # cutting matrices changes the order of sums: no difference at all would mean that nothing was compared
    assert all(0 < float(number) < 1e-5 for number in (table["tp2"][i] for i in (1, 2, 3, 5)))


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S + 60)
def test_a_bound_that_is_exceeded_on_a_given_batch(model, tmp_path):
    draw = np.random.default_rng(0)
    batch = tmp_path / "batch.jsonl"
    lines = [
        {
            "token_ids": draw.integers(0, VOCAB_SIZE, 12).tolist(),
            "prompt_length": 4,
            "advantage": float(draw.normal()),
            "behavior_log_probs": [-4.0] * 8,
        }
        for _ in range(6)
    ]
    batch.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, output = check(
        tmp_path, "--hf-checkpoint", str(model), "--candidate", "tp2", "--batch", str(batch),
        "--max-log-w-difference", "1e-12", "--ratio-denominator", "rollout",
    )  # fmt: skip
    assert code == 1, output
    assert re.search(r"tp2: 2 ranks, \d+ s, above the bound: log_w\n", output)


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S + 60)
def test_supports_do_not_depend_on_the_layout(model, tmp_path):
    """Half of the samples have supports. Behavior log-probs come from the first layout, over them."""
    draw = np.random.default_rng(0)
    lines = []
    for i in range(8):
        token_ids = draw.integers(0, VOCAB_SIZE, 12).tolist()
        line = {"token_ids": token_ids, "prompt_length": 4, "advantage": float(draw.normal(0.5))}
        if i % 2:
            others = [draw.choice(VOCAB_SIZE, draw.integers(0, 20)).tolist() for _ in token_ids[4:]]
            pairs = zip(token_ids[4:], others, strict=True)
            line["supports"] = [sorted({token, *ids}) for token, ids in pairs]
        lines.append(line)
    batch = tmp_path / "batch.jsonl"
    batch.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, output = check(
        tmp_path, "--hf-checkpoint", str(model), "--candidate", "tp2", "cp2", "--batch", str(batch),
        "--markdown", str(tmp_path / "table.md"),
    )  # fmt: skip
    assert code == 0, output
    assert [cells[-1] for cells in rows(tmp_path / "table.md").values()] == ["reference", "ok", "ok"]


def writers(run: Run, folder: Path) -> list[psutil.Process]:
    """The run's processes whose output goes to a file in `folder`."""
    return [p for p in run.survivors() if Path(f"/proc/{p.pid}/fd/1").resolve().parent == folder]


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S + 60)
def test_a_layout_that_breaks_does_not_stop_the_others(model, tmp_path):
    flags = ["--hf-checkpoint", str(model), "--candidate", "tp2", "dp2", "--samples", "8"]
    output_flags = ["--output-dir", str(tmp_path / "out"), "--markdown", str(tmp_path / "table.md")]
    with Run([*COMMAND, *flags, *output_flags], tmp_path / "check.log") as run:
        run.wait_until(lambda: writers(run, tmp_path / "out" / "tp2"))
        writers(run, tmp_path / "out" / "tp2")[0].kill()
        run.finish(TIMEOUT_S, code=1)
    print(run.output)
    assert re.search(r"^tp2: trainer rank [01] died in ", run.output, re.MULTILINE)
    assert f"{tmp_path / 'out' / 'tp2' / 'trainer-'}" in run.output, "the log of the dead rank"
    assert [cells[-1] for cells in rows(tmp_path / "table.md").values()] == ["reference", "broke", "ok"]


MISTAKES = [
    ("", "--candidate is required: a layout such as tp2,pp2,ep2; see --help"),
    ("--candidate tp2,zp2", "layout 'tp2,zp2': no word 'zp2'; a layout is some of tpN ppN "),
    ("--candidate tp4",
     "layout 'tp4': --tensor-model-parallel-size is 4, which does not divide key-value heads 2"),
    ("--candidate dp3",
     "layout 'dp3': 32 samples cannot be shared by dp3 equally: --samples needs a multiple of 3"),
    ("--candidate pp2,vpp2 --samples 9",
     "layout 'pp2,vpp2': 9 samples cannot be shared by dp1 x pp2 (virtual stages need so many "
     "micro-batches) equally: --samples needs a multiple of 2"),
    ("--candidate tp2 --trainer-ranks 2", "--trainer-ranks is part of a layout: say it in --reference and "),
    ("--candidate tp2 --steps-per-rollout=4", "--steps-per-rollout: this command makes its own batch"),
    ("--candidate tp2 --steps 0", "--steps is 0, must be positive"),
    ("--candidate tp2 --batch none.jsonl", "none.jsonl: no such file; it must be a JSONL file of samples"),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "message"), MISTAKES)
def test_a_mistake_is_one_line_and_starts_nothing(model, flags, message):
    done = subprocess.run(
        [*COMMAND, "--hf-checkpoint", str(model), *flags.split()],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith(f"megatron-vespo: {message}") and done.stderr.count("\n") == 1
    assert done.stdout == ""
