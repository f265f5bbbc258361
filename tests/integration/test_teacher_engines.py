"""Teachers in whole runs, and a real teacher's scores against transformers."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from megatron_vespo.data.rollout_file import read_record
from megatron_vespo.observability.metrics import batch_records, read_metrics
from megatron_vespo.rollout.router import LostRequests
from megatron_vespo.rollout.teachers import TeacherEngines, Teachers
from megatron_vespo.types import Completion
from tests.support.builders import make_completion, make_prompt, make_segments
from tests.support.references import completion_log_probs, transformers_model
from tests.support.runs import Run, finished, train_command, write_questions
from tests.support.servers import VOCAB_SIZE, make_tiny_model

pytestmark = pytest.mark.timeout(900)

FLAGS = "--train-iters 4 --steps-per-rollout 2 --lr 1e-3 --no-hf-export "
FLAGS += "--reward-function tests.support.run_rewards:first_letters "
WITHOUT_TEACHER = FLAGS
FLAGS += "--distillation-coefficient 0.5 "
OF_THE_CLOCK = ("engines/", "time", "train/tokens_per_second", "rollout/tokens_per_second", "sync/")


def random_completions() -> list[Completion]:
    """Of one token to two hundred after prompts of one to forty; some with given tokens."""
    draw = np.random.default_rng(0)
    found = []
    for number, (prompt, length) in enumerate([(1, 1), (1, 30), (40, 200), (7, 12), (7, 50), (3, 2)]):
        segments = make_segments(length // 3, length // 3, length - 2 * (length // 3)) if number % 2 else None
        tokens = draw.integers(0, VOCAB_SIZE, length)
        tokens[-1] = VOCAB_SIZE - 1  # which SGLang reports under another id
        ids = draw.integers(0, VOCAB_SIZE, prompt).tolist()
        found.append(make_completion(make_prompt(number, ids), tokens.tolist(), segments=segments))
    return found


def test_scores_against_transformers(engine, reference):
    """Asked twice: the second time the engine has the prompts in its prefix cache."""
    teachers = Teachers(
        [TeacherEngines("teacher", None, [engine.url], LostRequests(), engine.check)], "data_source",
        timeout_s=60.0, max_attempts=1,
    )  # fmt: skip
    for _ in range(2):
        completions = random_completions()
        teachers.score(completions)
        worst = 0.0
        for completion in completions:
            expected = completion_log_probs(reference, completion)
            assert completion.teacher_log_probs.shape == expected.shape == (completion.num_sampled,)
            worst = max(worst, float(np.abs(completion.teacher_log_probs - expected).max()))
        print(f"teacher against transformers: {worst:.1e} at most")
        assert worst <= 1e-4
    halved = completion_log_probs(reference, completions[2], temperature=0.5)
    assert np.abs(completions[2].teacher_log_probs - halved).max() > 1e-2  # the comparison can tell


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("teacher"), seed=7, num_hidden_layers=1)


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    return write_questions(tmp_path_factory.mktemp("questions") / "questions.jsonl")


@pytest.fixture(scope="module")
def recorded(tiny_model, teacher, questions, tmp_path_factory) -> Path:
    """The output folder of a run with a teacher of one layer, of three for the student."""
    output = tmp_path_factory.mktemp("distilled") / "out"
    flags = [
        *FLAGS.split(),
        "--teacher-checkpoint",
        str(teacher),
        "--save-rollouts",
        str(output / "rollouts"),
    ]
    print(finished(train_command(tiny_model, questions, output, *flags), output.with_suffix(".log")))
    return output


def numbers(output: Path) -> list[dict[str, float]]:
    records = batch_records(read_metrics(output / "metrics.jsonl"))
    return [{name: value for name, value in r.items() if not name.startswith(OF_THE_CLOCK)} for r in records]


def recorded_completions(folder: Path) -> list[Completion]:
    paths = sorted(folder.glob("batch-*.npz"))
    return [completion for path in paths for group in read_record(path).groups for completion in group]


@pytest.mark.slow
def test_a_run_trains_on_what_its_teacher_says(recorded, teacher):
    completions = recorded_completions(recorded / "rollouts")
    assert len(completions) == 32
    model = transformers_model(teacher)
    for completion in completions:
        expected = completion_log_probs(model, completion)
        assert np.abs(completion.teacher_log_probs - expected).max() <= 1e-4
    batches = batch_records(read_metrics(recorded / "metrics.jsonl"))
    assert [record["step"] for record in batches] == [2, 4]
    first = completions[:16]
    kl = [c.log_probs - c.teacher_log_probs for c in first]
    assert batches[0]["distillation/reverse_kl"] == pytest.approx(float(np.concatenate(kl).mean()), rel=1e-5)
    assert all(record["time/teacher"] > 0 for record in batches)


@pytest.mark.slow
def test_its_records_give_the_same_numbers_without_engines(recorded, tiny_model, teacher, tmp_path):
    flags = [*FLAGS.split(), "--teacher-checkpoint", str(teacher)]
    command = train_command(tiny_model, Path("none"), tmp_path / "out", *flags)
    at = command.index("--prompt-data")
    del command[at : at + 2]
    said = finished([*command, "--train-from", str(recorded / "rollouts")], tmp_path / "log")
    assert "start SGLang" not in said
    again = numbers(tmp_path / "out")
    for ours, theirs in zip(numbers(recorded), again, strict=True):
        shared = ours.keys() & theirs.keys()
        assert "distillation/reverse_kl" in shared and "train/loss" in shared
        assert {name: ours[name] for name in shared} == {name: theirs[name] for name in shared}
    assert [record["train/grad_norm"] for record in again] == [
        record["train/grad_norm"] for record in numbers(recorded)
    ]


@pytest.mark.slow
def test_records_without_scores_are_refused_by_one_line(tiny_model, teacher, questions, tmp_path):
    flags = [*WITHOUT_TEACHER.split(), "--rollout-only"]
    command = train_command(tiny_model, questions, tmp_path / "out", *flags)
    finished([*command, "--save-rollouts", str(tmp_path / "rollouts")], tmp_path / "log")
    command = train_command(tiny_model, questions, tmp_path / "again", *FLAGS.split())
    more = ["--teacher-checkpoint", str(teacher), "--train-from", str(tmp_path / "rollouts")]
    said = finished([*command, *more], tmp_path / "refused", code=2)
    assert "batch-000000.npz has no log-probs of a teacher" in said and "Traceback" not in said


@pytest.mark.slow
def test_an_asynchronous_run_survives_the_death_of_its_teacher(tiny_model, teacher, questions, tmp_path):
    """The killed engine is started again; until then, responses wait for their scores."""
    rollouts = tmp_path / "rollouts"
    flags = (
        "--train-iters 24 --steps-per-rollout 1 --max-staleness 2 --max-completion-tokens 200 --no-hf-export "
    )
    flags += "--reward-coefficient 0 --reward-function tests.support.run_rewards:first_letters"
    command = train_command(
        tiny_model, questions, tmp_path / "out", *flags.split(), "--teacher-checkpoint", str(teacher),
        "--save-rollouts", str(rollouts), "--save", str(tmp_path / "save"), "--save-interval", "4",
    )  # fmt: skip
    with Run(command, tmp_path / "log") as run:
        run.wait_until(lambda: (rollouts / "batch-000002.npz").exists())
        [scheduler] = run.schedulers(1)  # engine 0 is the student's
        scheduler.kill()
        run.finish(600)
    said = run.output
    assert re.search(r"teacher: engine http://\S+ died .*engine 1 is started again \(restart 1 of 3\)", said)
    assert "teacher: engine 1 serves again (1 of 1 engines serve)" in said
    completions = recorded_completions(rollouts)
    model = transformers_model(teacher)
    assert len(completions) == 24 * 16
    for completion in completions[:: len(completions) // 40]:
        expected = completion_log_probs(model, completion)
        assert np.abs(completion.teacher_log_probs - expected).max() <= 1e-4
    batches = batch_records(read_metrics(tmp_path / "out" / "metrics.jsonl"))
    assert len(batches) == 24 and all("distillation/reverse_kl" in record for record in batches)


@pytest.mark.slow
def test_a_synchronous_run_survives_the_death_of_its_teacher(tiny_model, teacher, questions, tmp_path):
    flags = "--train-iters 8 --steps-per-rollout 1 --no-hf-export --reward-coefficient 0 "
    flags += "--reward-function tests.support.run_rewards:first_letters"
    command = train_command(
        tiny_model, questions, tmp_path / "out", *flags.split(), "--teacher-checkpoint", str(teacher)
    )
    with Run(command, tmp_path / "log") as run:
        run.wait_for_output("\n2/8 ")
        [scheduler] = run.schedulers(1)
        scheduler.kill()
        run.finish(600)
    assert "teacher: engine 1 serves again" in run.output
    assert len(batch_records(read_metrics(tmp_path / "out" / "metrics.jsonl"))) == 8


@pytest.mark.slow
def test_a_running_server_is_a_teacher(engine, tiny_model, questions, tmp_path):
    """It serves the student's own weights, so the first batch has nothing to learn."""
    flags = [*FLAGS.split(), "--teacher-url", engine.url]
    said = finished(train_command(tiny_model, questions, tmp_path / "out", *flags), tmp_path / "log")
    assert "Traceback" not in said
    [first, *_] = batch_records(read_metrics(tmp_path / "out" / "metrics.jsonl"))
    assert first["distillation/log_ratio_abs_max"] <= 1e-4
