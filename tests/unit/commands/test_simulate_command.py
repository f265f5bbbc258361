"""megatron-vespo simulate: what it says, and what it learns from a run's own files."""

import json
from dataclasses import astuple

import numpy as np
import pytest

from megatron_vespo.commands.main import run
from megatron_vespo.commands.simulate.calibration import driver_phases, fit, measure
from megatron_vespo.commands.simulate.rates import Cost
from megatron_vespo.commands.simulate.run import Settings, simulate
from megatron_vespo.data.rollout_file import RolloutRecord, batch_path, recorded_lengths, write_record
from megatron_vespo.observability.metrics import dump_json
from megatron_vespo.observability.tracing import Trace
from megatron_vespo.types import Completion
from tests.support.builders import make_group, make_prompt

SMALL = ["--rollout-batch-size", "16", "--group-size", "2", "--rollout-batches", "4"]
A, B = 0.004, 0.0002  # seconds a token of each of r requests: A + B r
RANKS, FORWARD = 4, 2e-4  # seconds a token of the log-prob pass
PREFILL = 1 / FORWARD / RANKS  # a rank's tokens a second
BATCHES, PROMPTS, COMPLETIONS, STEPS, PROMPT_TOKENS = 12, 6, 3, 2, 5


@pytest.fixture(scope="module")
def recorded_run(tmp_path_factory):
    """The folder of a synchronous run, as if these were its costs."""
    folder, random = tmp_path_factory.mktemp("run"), np.random.default_rng(0)
    spans, now, lines = [], 0, []

    def span(name: str, seconds: float) -> None:
        nonlocal now
        spans.append((name, now, now := now + round(seconds * 1e9)))

    span("start Ray", 9.0)
    span("sync", 0.8)
    for batch in range(BATCHES):
        lengths = random.integers(1, 200, (PROMPTS, COMPLETIONS))
        tokens = int(lengths.sum()) + PROMPTS * COMPLETIONS * PROMPT_TOKENS
        extra = 2.0 if batch == 0 else 0.0
        decode = sum(A + B * (lengths > token).sum() for token in range(lengths.max()))
        span("generate", extra + decode + PROMPTS * COMPLETIONS * PROMPT_TOKENS / PREFILL)
        span("reward", 0.01 * PROMPTS * COMPLETIONS)
        span("log-probs", FORWARD * tokens)
        for _ in range(STEPS):
            span("train", extra + 0.5 + 1e-3 * tokens / STEPS)
        span("sync", 0.4)
        now += 50_000_000  # between the phases
        write_record(
            batch_path(folder / "rollouts", batch),
            RolloutRecord([group(i, row) for i, row in enumerate(lengths)], {}, (batch + 1) * PROMPTS, {}),
        )
        lines.append(dump_json({"step": (batch + 1) * STEPS, "time": 0.0, "policy/version": 0.0}))
    span("export", 7.0)
    with Trace(folder / "trace.json") as trace:
        for name, start, end in spans:
            trace.phase(name, trace._origin + start, trace._origin + end)
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    layout = {"engines": 1, "trainer_ranks": RANKS}
    summary = {"layout": layout, "paths": {"rollouts": str(folder / "rollouts")}}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def group(number: int, lengths) -> list[Completion]:
    return make_group(make_prompt(number, [3] * PROMPT_TOKENS), lengths, reward=0.0)


def assert_same(cost: Cost, expected: Cost) -> None:
    assert astuple(cost) == pytest.approx(astuple(expected), rel=1e-4, abs=1e-7)


def test_a_runs_rates_are_what_its_files_say(recorded_run):
    measured = measure(recorded_run)
    rates = measured.rates
    assert_same(rates.engine.decode, Cost(A, B, 2.0))
    assert rates.engine.prefill == pytest.approx(PREFILL, rel=1e-6)
    assert_same(rates.log_probs, Cost(0.0, FORWARD))
    assert_same(rates.train, Cost(0.5, 1e-3, 4.0))
    assert_same(rates.sync, Cost(0.4, 0.0, 0.4))
    assert_same(rates.reward, Cost(0.0, 0.01))
    assert (measured.num_engines, measured.trainer_ranks, measured.num_batches) == (1, 4, BATCHES)
    assert measured.lengths.completions.shape == (BATCHES * PROMPTS, COMPLETIONS)
    settings = Settings(
        train_steps=BATCHES * STEPS, steps_per_rollout=STEPS, rollout_batch_size=PROMPTS,
        group_size=COMPLETIONS, num_engines=1,
    )  # fmt: skip
    # of lengths drawn anew
    assert simulate(settings, rates, measured.lengths).seconds == pytest.approx(measured.seconds, rel=0.05)


def test_a_trace_that_was_cut_off_is_read(recorded_run, tmp_path):
    text = (recorded_run / "trace.json").read_text()
    cut = tmp_path / "trace.json"
    cut.write_text(text.rstrip().removesuffix("]"))
    assert driver_phases(cut) == driver_phases(recorded_run / "trace.json")
    assert [name for name, _, _ in driver_phases(cut)][:3] == ["sync", "generate", "reward"]


def test_the_fit_is_never_negative():
    sizes = np.array([[1.0, 10], [1, 20], [1, 30], [1, 40]])
    found, first = fit(np.array([99.0, 20, 30, 40]), sizes)
    assert found == pytest.approx([0, 1]) and first == pytest.approx(89)
    found, _ = fit(np.array([9.0, 4, 3, 2]), sizes)  # less for more
    assert found == pytest.approx([3, 0])


def test_a_folder_that_is_no_whole_synchronous_run_is_refused(recorded_run, tmp_path, capsys):
    def refused(*flags: str) -> str:
        assert run(["simulate", *SMALL, *flags]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        return message

    assert "summary.json: no such file; --from-run takes" in refused("--from-run", str(tmp_path))
    for name in ("trace.json", "summary.json"):
        (tmp_path / name).write_text((recorded_run / name).read_text())
    metrics = tmp_path / "metrics.jsonl"
    lines = (recorded_run / "metrics.jsonl").read_text().splitlines()
    metrics.write_text("\n".join(lines[:5]) + "\n")
    assert "5 batches in metrics.jsonl, 72 recorded groups" in refused("--from-run", str(tmp_path))
    metrics.write_text("\n".join(lines[:6]) + "\n")
    assert "12 phases 'generate' of 6 batches" in refused("--from-run", str(tmp_path))
    stale = [line.replace("{", '{"staleness/total_mean": 1.0, ') for line in lines]
    metrics.write_text("\n".join(stale) + "\n")
    assert "an asynchronous run does not say" in refused("--from-run", str(tmp_path))
    summary = json.loads((recorded_run / "summary.json").read_text())
    (tmp_path / "summary.json").write_text(json.dumps(summary | {"paths": {}}))
    assert "run it with --save-rollouts" in refused("--from-run", str(tmp_path))
    (tmp_path / "trace.json").write_text("[{")
    assert "not what a run has written" in refused("--from-run", str(tmp_path), "--lengths-from",
                                                    str(recorded_run / "rollouts"))  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpus", "1"], "--gpus 1: an engine takes 2 of them and the trainer needs one"),
        (["--gpus", "0"], "--gpus 0: must be positive"),
        (["--max-staleness", "2"], "--steps-per-rollout 4 and --sync-interval 4 alone make samples 3"),
        (["--sync-interval", "3", "--max-staleness", "9"], "--sync-interval 3 must be a divisor or"),
        (["--steps-per-rollout", "3"], "--rollout-batch-size 16 must be a multiple of --steps-per-rollout 3"),
        (["--trainer-share", "1.5"], "--trainer-share 1.5: must be 0 to 1"),
        (["--length-mean", "-1"], "--length-mean -1.0: must be positive"),
        (["--decode-ms", "0", "0"], "--decode-ms 0 0: decoding takes time"),
        (["--recovery-seconds", "-1"], "--recovery-seconds -1.0: must be zero or more"),
        (["--lengths-from", "nowhere"], "nowhere: not the batches of one run with --save-rollouts"),
    ],
)
def test_a_mistake_is_one_line(flags, message, capsys):
    assert run(["simulate", *SMALL, *flags]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"megatron-vespo: {message}") or message in captured.err
    assert captured.err.count("\n") == 1 and captured.out == ""


@pytest.mark.long
def test_the_table_and_the_picture(tmp_path, capsys):
    picture = tmp_path / "new" / "throughput.png"
    assert run(["simulate", *SMALL, "--gpus", "8", "16", "--picture", str(picture)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:4] for line in lines[1:11]] == [
        [gpus, "GPUs", trainer, bound]
        for gpus, trainer in (("8", "2"), ("16", "4")) for bound in ("sync", "4", "7", "8", "16")
    ]  # fmt: skip
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size < 150_000


def test_flags_win_over_a_run(recorded_run, capsys):
    command = ["simulate", *SMALL, "--steps-per-rollout", "2", "--from-run", str(recorded_run),
               "--max-staleness", "0"]  # fmt: skip

    def step_seconds(*flags: str) -> float:
        assert run([*command, *flags]) == 0
        return float(capsys.readouterr().out.splitlines()[1].split()[4])

    base = step_seconds()
    assert step_seconds("--sync-seconds", "10.4") == pytest.approx(base + 5.0, abs=0.02)
    assert step_seconds("--decode-ms", "400", "0") > 5 * base


def test_a_run_tells_its_own_scale(recorded_run, capsys):
    assert run(["simulate", "--from-run", str(recorded_run), "--max-staleness", "0", "3"]) == 0
    *_, last = capsys.readouterr().out.splitlines()
    took, simulated = (float(part.split(" s for 12")[0].split()[-1]) for part in last.split(";"))
    assert simulated == pytest.approx(took, rel=0.05)


def test_the_help_fits_on_a_few_screens(capsys):
    with pytest.raises(SystemExit) as ended:
        run(["simulate", "--help"])
    assert ended.value.code == 0
    assert len(capsys.readouterr().out.splitlines()) < 150


def test_lengths_of_a_record(recorded_run):
    prompts, completions = recorded_lengths(recorded_run / "rollouts")
    assert (prompts == PROMPT_TOKENS).all() and completions.shape == (BATCHES * PROMPTS, COMPLETIONS)
