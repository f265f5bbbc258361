"""Evaluations on real engines: killed and gone on with; a Megatron checkpoint against its HF folder."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.runs import ROOT, Run, nothing_left

TIMEOUT_S = 240
QUESTIONS = {"add": [f"{i} + 1 = ?" for i in range(6)], "count": [f"Count to {i}." for i in range(4)]}


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("sets")
    for name, questions in QUESTIONS.items():
        rows = [{"question": question, "answer": "7"} for question in questions]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--data", *(f"{name}={folder}/{name}.jsonl" for name in QUESTIONS)]


def command(checkpoint: Path, out: Path, sets: list[str], *flags: str) -> list[str]:
    return [
        sys.executable, "-m", "megatron_vespo", "evaluate", "--checkpoint", str(checkpoint),
        "--output-dir", str(out), *sets, "--reward-function", "tests.support.run_rewards:first_letters",
        "--save-responses", *flags,
    ]  # fmt: skip


def finished(out: Path) -> int:
    path = out / "prompts.jsonl"
    return max(0, path.read_bytes().count(b"\n") - 1) if path.exists() else 0


def records(out: Path) -> dict[tuple[str, int], dict]:
    rows = [json.loads(line) for line in (out / "prompts.jsonl").read_text().splitlines()[1:]]
    found = {(row["set"], row["prompt"]): row for row in rows}
    assert len(found) == len(rows), "a prompt was evaluated twice"
    return found


def wait_for_records(run: Run, out: Path, number: int) -> None:
    run.wait_until(lambda: finished(out) >= number)


def all_prompts() -> set[tuple[str, int]]:
    return {(name, index) for name, questions in QUESTIONS.items() for index in range(len(questions))}


def test_killed_and_gone_on_with(engine, tiny_model, tmp_path, sets):
    out = tmp_path / "out"
    flags = ["--engine-url", engine.url, "--num-completions", "8", "--max-completion-tokens", "400"]
    run = Run(command(tiny_model, out, sets, *flags), tmp_path / "first.log")
    wait_for_records(run, out, 2)
    run.process.send_signal(signal.SIGKILL)
    run.wait(30)
    kept = (out / "prompts.jsonl").read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1]
    with (out / "prompts.jsonl").open("ab") as file:
        file.write(b'{"set": "add", "prom')  # as a kill in the middle of a line leaves it
    assert nothing_left(run, 10)

    refused = Run(command(tiny_model, out, sets, *flags, "--seed", "5"), tmp_path / "refused.log")
    assert refused.wait(TIMEOUT_S) == 2
    assert "prompts.jsonl was made with --seed 1, now it is 5" in refused.output

    run = Run(command(tiny_model, out, sets, *flags), tmp_path / "second.log")
    assert run.wait(TIMEOUT_S) == 0, run.output
    assert (out / "prompts.jsonl").read_bytes().startswith(kept)
    assert records(out).keys() == all_prompts()
    summary = json.loads((out / "summary.json").read_text())["sets"]
    for name, questions in QUESTIONS.items():
        rows = [row for (of, _), row in records(out).items() if of == name]
        rewards = [reward for row in rows for reward in row["rewards"]]
        assert len(rewards) == 8 * len(questions)
        assert summary[name]["avg"] == pytest.approx(sum(rewards) / len(rewards), abs=1e-12)
        assert summary[name]["truncated"] == sum(row["finish_reasons"].count("length") for row in rows)
        assert f"{name} " in run.output
    engine.check()


@pytest.mark.slow
def test_a_megatron_checkpoint_says_what_its_hf_folder_says(engine, tiny_model, tmp_path, sets):
    """Greedy responses, token by token; an interrupt in between leaves nothing but what has finished."""
    greedy = ["--temperature", "0", "--num-completions", "1", "--max-completion-tokens", "48"]
    live = tmp_path / "live"
    run = Run(command(tiny_model, live, sets, *greedy, "--engine-url", engine.url), tmp_path / "live.log")
    assert run.wait(TIMEOUT_S) == 0, run.output

    checkpoint, out = tmp_path / "checkpoint", tmp_path / "out"
    convert = [sys.executable, "-m", "megatron_vespo", "convert", "hf-to-megatron"]
    subprocess.run(
        [*convert, str(tiny_model), str(checkpoint), "--quiet"], cwd=ROOT, check=True, timeout=TIMEOUT_S
    )
    own = [*greedy, "--sglang-max-total-tokens", "16384", "--sglang-context-length", "1024"]
    # the first run is slow on purpose: one request at a time
    slow = [*own, "--sglang-max-running-requests", "1"]
    run = Run(command(checkpoint, out, sets, *slow), tmp_path / "first.log")
    wait_for_records(run, out, 1)
    run.interrupt()
    assert run.wait(60) == 130, run.output
    assert nothing_left(run, 10)
    assert "prompts are finished and kept: the same command goes on" in run.output
    assert not list(out.glob("*converted*"))
    number = finished(out)
    assert 1 <= number < len(all_prompts())

    run = Run(command(checkpoint, out, sets, *slow), tmp_path / "second.log")
    assert run.wait(TIMEOUT_S) == 0, run.output
    assert f"{number} of 10 prompts were finished before" in run.output
    assert nothing_left(run, 10)
    assert not list(out.glob("*converted*"))
    ours, theirs = records(out), records(live)
    assert ours.keys() == theirs.keys() == all_prompts()
    for key in ours:
        assert ours[key]["responses"] == theirs[key]["responses"], key
