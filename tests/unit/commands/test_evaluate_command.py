"""megatron-vespo evaluate against an engine that answers by rule."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
from collections import Counter
from datetime import datetime
from itertools import combinations
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_vespo.commands.evaluate import settings as evaluation_settings
from megatron_vespo.commands.evaluate.flags import parse_args
from megatron_vespo.commands.evaluate.report import (
    Progress,
    format_table,
    prompt_set_summary,
    reservations,
    shown_ks,
)
from megatron_vespo.commands.evaluate.serving import engine_dtype, engine_settings
from megatron_vespo.commands.evaluate.settings import weights_digest
from megatron_vespo.commands.main import run
from megatron_vespo.system.preemption import SIGNALS
from tests.support.engine_stub import EngineStub
from tests.support.evaluation_rewards import by_the_letter

EOS = 1
FUNCTION = f"{by_the_letter.__module__}:{by_the_letter.__name__}"


@pytest.fixture(autouse=True)
def handlers():
    """The command sets its own, for the life of its process."""
    numbers = (*SIGNALS, signal.SIGALRM)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A tokenizer of one token a character: the code point."""
    vocabulary = {chr(code): code for code in range(32, 127)} | {"<eos>": EOS, "<unk>": 0}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    folder = tmp_path_factory.mktemp("checkpoint")
    fast.save_pretrained(folder)
    return folder


def tokens(text: str) -> list[int]:
    return [*map(ord, text), EOS]


class ByTurns:
    """The n-th request for a prompt gets the n-th of its answers."""

    def __init__(self, answers: dict[str, str]):
        self.answers, self.turns = answers, Counter()

    def __call__(self, body: dict) -> tuple[list[int], str]:
        prompt = "".join(map(chr, body["input_ids"]))
        answers = self.answers[prompt]
        letter = answers[self.turns[prompt] % len(answers)]
        self.turns[prompt] += 1
        return (tokens("xxxx")[:4], "length") if letter == "-" else (tokens(letter), "stop")


def command(checkpoint: Path, out: Path, url: str, *flags: str) -> list[str]:
    return [
        "evaluate", "--checkpoint", str(checkpoint), "--output-dir", str(out), "--engine-url", url,
        "--reward-function", FUNCTION, "--reward-timeout", "0.5", "--max-completion-tokens", "4", *flags,
    ]  # fmt: skip


def write_set(path: Path, answers: dict[str, str]) -> Path:
    path.write_text("".join(json.dumps({"question": q, "answer": "y"}) + "\n" for q in answers))
    return path


EASY = {"a": "yyny", "b": "nnnn", "c": "yyyy"}
HARD = {"d": "n-n!", "e": "yn?-"}


@pytest.fixture
def sets(tmp_path) -> list[str]:
    files = {name: write_set(tmp_path / f"{name}.jsonl", answers) for name, answers in
             {"easy": EASY, "hard": HARD}.items()}  # fmt: skip
    return ["--data", *(f"{name}={path}" for name, path in files.items())]


@pytest.fixture
def engine():
    with EngineStub(ByTurns(EASY | HARD)) as engine:
        yield engine


@pytest.mark.long
def test_numbers_against_a_count_by_hand(checkpoint, tmp_path, engine, sets, capsys):
    out = tmp_path / "out"
    flags = [*sets, "--num-completions", "4", "--temperature", "0.6", "--top-p", "0.95", "--top-k", "20"]
    assert run([*command(checkpoint, out, engine.url, *flags), "--save-responses"]) == 0
    assert len(engine.requests) == 20
    for body in engine.requests:
        sampling = body["sampling_params"]
        assert [sampling[name] for name in ("temperature", "top_p", "top_k")] == [0.6, 0.95, 20]
        assert sampling["max_new_tokens"] == 4 and sampling["stop_token_ids"] == [EOS]
        assert not body["return_routed_experts"]
    summary = json.loads((out / "summary.json").read_text())
    for name, answers in {"easy": EASY, "hard": HARD}.items():
        found = summary["sets"][name]
        assert found["prompts"] == len(answers) and found["completions"] == 4
        assert found["avg"] == sum(text.count("y") for text in answers.values()) / (4 * len(answers))
        for k in range(1, 5):
            passing = [["y" in subset for subset in combinations(text, k)] for text in answers.values()]
            expected = sum(sum(subsets) / len(subsets) for subsets in passing) / len(answers)
            assert found["pass"][str(k)] == pytest.approx(expected, abs=1e-15)
            low, high = found["pass_interval"][str(k)]
            assert 0 <= low <= expected <= high <= 1
    hard = summary["sets"]["hard"]
    assert (hard["truncated"], hard["reward_errors"], hard["reward_timeouts"]) == (2, 1, 1)
    assert hard["truncated_share"] == 0.25 and hard["length_mean"] == (6 * 2 + 2 * 4) / 8
    output = capsys.readouterr().out
    assert re.search(r"^easy +3 +58\.3% .* to .* +58\.3% .* +66\.7% ", output, re.MULTILINE)
    assert "hard: 2 of 8 responses reached --max-completion-tokens and count as 0" in output
    assert "hard: 2 of 8 rewards timed out or failed and count as 0" in output
    records = [json.loads(line) for line in (out / "prompts.jsonl").read_text().splitlines()][1:]
    by_prompt = {(record["set"], record["prompt"]): record for record in records}
    assert sorted(by_prompt["hard", 0]["responses"]) == ["!", "n", "n", "x x x x"]


@pytest.mark.long
def test_pass_at_10_of_programs(checkpoint, tmp_path, capsys):
    """Ten programs per prompt, of which three and none are right; a changed limit is another evaluation."""
    model = shutil.copytree(checkpoint, tmp_path / "model")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["\n"] = ord("\n")
    tokenizer["decoder"] = {"type": "Fuse"}  # no spaces between characters
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    right = {"a": "yyynnnnnnn", "b": "nnnnnnnnnn"}
    by_turns = ByTurns(right)

    def program(body: dict) -> tuple[list[int], str]:
        letters, end = by_turns(body)
        operator = "+" if letters == tokens("y") else "-"
        return tokens(f"```python\ndef f(a, b):\n    return a {operator} b\n```"), end

    data = tmp_path / "code.jsonl"
    tests = json.dumps({"type": "calls", "function": "f", "cases": [[[1, 2], 3], [[5, 5], 10]]})
    data.write_text("".join(json.dumps({"question": q, "answer": tests}) + "\n" for q in right))
    flags = ["--data", f"code={data}", "--num-completions", "10", "--reward-function", "code"]
    flags += ["--reward-timeout", "10", "--max-completion-tokens", "64"]
    with EngineStub(program) as engine:
        line = command(model, tmp_path / "out", engine.url, *flags)
        assert run(line) == 0
        assert "pass@10" in capsys.readouterr().out
        assert run([*line, "--code-test-timeout", "2"]) == 2
        assert "was made with --code-test-timeout 4.0, now it is 2.0" in capsys.readouterr().err
    found = json.loads((tmp_path / "out/summary.json").read_text())["sets"]["code"]
    assert found["pass"]["1"] == pytest.approx(0.15) and found["pass"]["10"] == 0.5
    assert found["reward_errors"] == found["reward_timeouts"] == 0


@pytest.mark.long
@pytest.mark.parametrize(("turn_rewards", "reward"), [("sum", 6.0), ("last", 3.0)])
def test_episodes_are_kept_with_their_turns(checkpoint, tmp_path, turn_rewards, reward):
    out, data = tmp_path / "out", write_set(tmp_path / "x.jsonl", {"count": ""})
    flags = ["--data", f"x={data}", "--num-completions", "2", "--max-completion-tokens", "100"]
    flags += ["--environment", "tests.support.environments:RewardsTurns", "--reward-function", "environment"]
    with EngineStub(lambda body: (tokens("four"), "stop")) as engine:
        flags += ["--turn-rewards", turn_rewards, "--save-responses"]
        assert run(command(checkpoint, out, engine.url, *flags)) == 0
    record = json.loads((out / "prompts.jsonl").read_text().splitlines()[1])
    assert record["rewards"] == [reward] * 2
    assert record["lengths"] == [15] * 2  # three turns of four letters and the end
    for response in record["responses"]:
        assert [turn["writer"] for turn in response["turns"]] == [*["policy", "environment"] * 2, "policy"]
        assert [turn["text"] for turn in response["turns"][::2]] == ["f o u r"] * 3
        assert response["turn_rewards"] == [1.0, 2.0, 3.0] and response["reward"] == reward
        assert (response["sampled_tokens"], response["finish_reason"]) == (15, "stop")
        assert response["given_tokens"] > 20


@pytest.mark.long
def test_it_goes_on_where_it_was_ended(checkpoint, tmp_path, sets, capsys):
    out, by_turns = tmp_path / "out", ByTurns(EASY | HARD)
    path = out / "prompts.jsonl"
    lock, over = threading.Lock(), threading.Event()

    def ends(body: dict) -> tuple[list[int], str]:
        """What a scheduler does after six of ten requests; the others are not answered any more."""
        with lock:
            if sum(by_turns.turns.values()) < 6:
                return by_turns(body)
        while not over.wait(0.02):
            if path.read_bytes().count(b"\n") > 1:  # six answers to five prompts, two each: one is complete
                os.kill(os.getpid(), signal.SIGTERM)
                over.wait(30)
        return by_turns(body)

    flags = [*sets, "--num-completions", "2"]
    with EngineStub(ends) as engine:
        assert run(command(checkpoint, out, engine.url, *flags)) == 75
        over.set()
    error = capsys.readouterr().err.splitlines()[-1]
    number = int(re.fullmatch(
        r"megatron-vespo: ended by SIGTERM: (\d) of 5 prompts are finished and kept: .*",
        error,
    )[1])  # fmt: skip
    kept = path.read_text()
    assert 0 <= kept.count("\n") - 1 - number <= 1, "one may be written while the line is"
    number = kept.count("\n") - 1
    assert 1 <= number <= 3
    with EngineStub(ByTurns(EASY | HARD)) as engine:
        changed = [*flags, "--temperature", "0.5"]
        assert run(command(checkpoint, out, engine.url, *changed)) == 2
        assert "was made with --temperature 1.0, now it is 0.5" in capsys.readouterr().err
        assert run(command(checkpoint, out, engine.url, *flags)) == 0
        asked = len(engine.requests)
        assert asked == 2 * (5 - number)
        assert path.read_text().startswith(kept)
        done = [(row["set"], row["prompt"]) for row in map(json.loads, path.read_text().splitlines()[1:])]
        assert sorted(done) == [("easy", 0), ("easy", 1), ("easy", 2), ("hard", 0), ("hard", 1)]
        # all is there: nothing is asked for again
        assert run(command(checkpoint, out, engine.url, *flags)) == 0
        assert len(engine.requests) == asked


def with_template(checkpoint: Path, folder: Path, template: str) -> Path:
    shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
    (folder / "chat_template.jinja").write_text(template)
    return folder


def keep_finished(path: Path, number: int) -> None:
    """As if it had been stopped after so many prompts."""
    path.write_text("".join(path.read_text().splitlines(keepends=True)[: 1 + number]))


@pytest.mark.long
def test_another_chat_template_is_refused(checkpoint, tmp_path, engine, sets, capsys):
    out, template = tmp_path / "out", "{{ messages[0].content }}"
    model = with_template(checkpoint, tmp_path / "model", template)
    line = command(model, out, engine.url, *sets)
    assert run(line) == 0
    keep_finished(out / "prompts.jsonl", 2)
    with_template(checkpoint, model, template + "{{ suffix | default('?') }}")
    capsys.readouterr()
    assert run(line) == 2
    error = capsys.readouterr().err
    assert "was made with prompts as tokens (tokenizer and chat template) {" in error
    with_template(checkpoint, model, template + "{{ suffix | default('') }}")  # the same text
    assert run([*line, "--chat-template-arguments", '{"suffix": "?"}']) == 2
    assert "--chat-template-arguments {}, now it is {" in capsys.readouterr().err
    assert run(line) == 0


@pytest.mark.long
def test_an_evaluation_of_an_older_version_goes_on(checkpoint, tmp_path, engine, sets):
    """Its file has not all the settings of now."""
    path = tmp_path / "out/prompts.jsonl"
    line = command(checkpoint, tmp_path / "out", engine.url, *sets)
    assert run(line) == 0
    keep_finished(path, 2)
    header, *rows = path.read_text().splitlines()
    settings = json.loads(header)["settings"]
    for name in (evaluation_settings.DATE, evaluation_settings.TOKENS, "--chat-template-arguments"):
        del settings[name]
    path.write_text("\n".join([json.dumps({"settings": settings}), *rows, ""]))
    assert run([*line, "--chat-template-arguments", '{"x": 1}']) == 2
    assert run(line) == 0
    assert len(path.read_text().splitlines()) == 1 + 5


@pytest.mark.long
def test_zeros_of_a_reward_function_that_never_works_are_not_kept(checkpoint, tmp_path, engine, sets, capsys):
    line = command(checkpoint, tmp_path / "out", engine.url, *sets)
    broken = [*line, "--reward-function", "tests.support.evaluation_rewards:fails"]
    for _ in range(2):
        assert run(broken) == 1
        assert "the environment does not work" in capsys.readouterr().err.splitlines()[-1]
    assert len((tmp_path / "out/prompts.jsonl").read_text().splitlines()) == 1


@pytest.mark.long
def test_a_template_writes_the_date_of_the_start(checkpoint, tmp_path, sets, monkeypatch):
    class Clock(datetime):
        today = datetime(2026, 2, 28)

        @classmethod
        def now(cls, tz=None):
            return cls.today

    monkeypatch.setattr(evaluation_settings, "datetime", Clock)
    model = with_template(checkpoint, tmp_path / "model", "{{ strftime_now('%d') }}{{ messages[0].content }}")
    dated = {f"{day}{question}": "y" for question in EASY | HARD for day in ("28", "01")}
    results = tmp_path / "out/prompts.jsonl"
    with EngineStub(ByTurns(dated)) as engine:
        line = command(model, tmp_path / "out", engine.url, *sets, "--num-completions", "1")
        assert run(line) == 0
        keep_finished(results, 2)
        Clock.today = datetime(2026, 3, 1)
        assert run(line) == 0
        assert len(engine.requests) == 5 + 3
        assert {"".join(map(chr, body["input_ids"][:2])) for body in engine.requests} == {"28"}
        keep_finished(results, -1)  # nothing is left of it, not even its settings
        assert run(line) == 0
        assert "".join(map(chr, engine.requests[-1]["input_ids"][:2])) == "01"


@pytest.mark.long
def test_a_key_from_the_environment(checkpoint, tmp_path, sets, capsys, monkeypatch):
    with EngineStub(ByTurns(EASY | HARD), api_key="secret") as engine:
        line = command(checkpoint, tmp_path / "out", engine.url, *sets)
        assert run(line) == 2
        assert "/model_info answered 401" in capsys.readouterr().err
        monkeypatch.setenv("ENGINE_KEY", "secret")
        assert run([*line, "--api-key-env", "ENGINE_KEY"]) == 0
    assert "secret" not in (tmp_path / "out" / "summary.json").read_text()


def test_an_engine_without_a_numbered_version(checkpoint, tmp_path, sets, capsys):
    with EngineStub(ByTurns(EASY | HARD), version="default") as engine:
        assert run(command(checkpoint, tmp_path / "out", engine.url, *sets)) == 2
    assert capsys.readouterr().err == (
        f"megatron-vespo: --engine-url {engine.url}: its weight version is 'default', no number: "
        "start it with --weight-version 0\n"
    )


@pytest.mark.long
def test_an_engine_that_is_gone_ends_in_one_line(checkpoint, tmp_path, engine, sets, capsys):
    line = command(checkpoint, tmp_path / "out", engine.url, *sets, "--max-request-retries", "1")
    engine.answer = lambda body: [][0]  # the connection breaks
    assert run(line) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.match(rf"megatron-vespo: engine {engine.url}: connection lost at prompt \d", last)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--data easy.jsonl", "--data easy.jsonl: write NAME=FILE, for example aime24=aime24.jsonl"),
        ("--data a=x a=y", "--data a=y: there is a set 'a' already; give each its own name"),
        ("--data a=x.jsonl", "--data x.jsonl: no such file"),
        ("--temperature -1", "--temperature -1: must be positive, or 0 for greedy"),
        ("--temperature 0", "--temperature 0 makes the same completion 8 times: one is enough"),
        ("--top-p 0", "--top-p 0: must be above 0, at most 1"),
        ("--pass-reward=-inf", "--pass-reward -inf: must be finite"),
        ("--top-k 0", "--top-k 0: must be positive, or -1 for all tokens"),
        ("--num-prompts 0", "--num-prompts is 0, must be positive"),
        ("--generate-timeout 0", "--generate-timeout is 0, must be positive"),
        ("--api-key-env NOT_THERE", "--api-key-env NOT_THERE: no such environment variable, or"),
        (
            "--reward-function code --code-timeout 1",
            "--code-timeout 1 must be less than --reward-timeout 0.5: ",
        ),
        ("--sglang-tp-size 2", "--sglang-tp-size is for engines that are started; those at"),
        ("--engine-url host:1", "--engine-url host:1: write http://HOST:PORT"),
    ],
)
def test_mistakes(checkpoint, tmp_path, capsys, argv, said):
    data = [] if argv.startswith("--data") else ["--data", "a=x"]
    assert run(command(checkpoint, tmp_path / "out", "http://127.0.0.1:9", *data, *argv.split())) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"megatron-vespo: {said}") and line.count("\n") == 1


def test_a_folder_without_weights(checkpoint, tmp_path, capsys):
    line = ["evaluate", "--checkpoint", str(checkpoint), "--data", "a=x", "--output-dir", str(tmp_path)]
    assert run(line) == 2
    said = "neither an HF folder with safetensors nor a Megatron checkpoint"
    assert capsys.readouterr().err == f"megatron-vespo: --checkpoint {checkpoint}: {said}\n"


def test_weights_are_told_apart(tmp_path):
    digests = set()
    for number in range(3):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        content = bytearray(3 * 2**20)
        content[-1] = number  # the end alone
        (folder / "model.safetensors").write_bytes(content)
        (folder / "tokenizer.json").write_text(str(number))
        digests.add(weights_digest(folder))
    assert len(digests) == 3
    (folder / "tokenizer.json").write_text("another")
    assert weights_digest(folder) in digests


def record(rewards: list[float], **changes) -> dict:
    number = len(rewards)
    return {
        "rewards": rewards,
        "lengths": [10] * number,
        "finish_reasons": ["stop"] * number,
        "statuses": ["ok"] * number,
        "policy_versions": [0, 0],
        "drawn_anew": 0,
    } | changes


def test_weights_that_change_and_draws_that_were_rejected_are_said():
    records = [record([1.0]), record([0.0], policy_versions=[2, 3], drawn_anew=1)]
    assert reservations({"a": prompt_set_summary(records, 1.0)}) == [
        "a: 1 responses had log-probs that are no numbers, drawn anew",
        "a: the engine's weights changed meanwhile, from version 0 to 3",
    ]


def test_rewards_that_are_no_shares():
    found = prompt_set_summary([record([-1.0, 1.0]), record([-1.0, -1.0]), record([1.0, 1.0])], 1.0)
    assert found["avg"] == 0.0 and found["pass"] == {"1": 0.5, "2": pytest.approx(2 / 3)}
    low, high = found["avg_interval"]
    assert -1 <= low < 0 < high <= 1
    table = format_table({"a": found})
    assert f"0.000  {low:.3f} to {high:.3f}" in table and "50.0%" in table  # avg is a number, pass@1 a share


@pytest.mark.parametrize(("number", "shown"), [(1, [1]), (4, [1, 2, 4]), (12, [1, 2, 4, 8, 12])])
def test_which_k_are_shown(number, shown):
    assert shown_ks(number) == shown


def test_progress(capsys):
    clock = [0.0]
    progress = Progress(total=4, done=1, now=lambda: clock[0])
    clock[0] = 100.0  # engines have started
    progress.start()
    for seconds, rewards in ((110.0, [1.0, 0.0]), (140.0, [0.0, 0.0]), (150.0, [1.0, 1.0])):
        clock[0] = seconds
        progress.finished(rewards)
    progress.close()
    assert capsys.readouterr().err.splitlines() == [
        "3/4 prompts, mean reward 0.250, 0:00:40 passed, about 0:00:20 left",
        "4/4 prompts, mean reward 0.500, 0:00:50 passed, about 0:00:00 left",
    ]


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"dtype": "float32"}, "float32"),
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({}, "auto"),
        ({"dtype": "float32", "quantization_config": {"quant_method": "fp8"}}, "bfloat16"),
        ({"dtype": "float16", "quantization_config": {"quant_method": "fp8"}}, "float16"),
    ],
)
def test_engines_compute_as_the_checkpoint_is_stored(tmp_path, config, dtype):
    """SGLang's FP8 layers take 16 bits alone."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert engine_dtype(tmp_path) == dtype


def test_settings_of_engines_that_are_started(tmp_path):
    flags = ["--checkpoint", str(tmp_path), "--data", "a=x", "--output-dir", str(tmp_path / "out")]
    options = parse_args([*flags, "--rollout-engines", "2", "--sglang-tp-size", "4"])
    settings = engine_settings(options, tmp_path / "hf")
    assert settings.hf_checkpoint == tmp_path / "hf" and settings.rollout_engines == 2
    assert settings.sglang_flags == ("--tp-size", "4") and settings.engine_api_key == "auto"
