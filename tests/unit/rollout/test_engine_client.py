"""The rollout side without a server: replies, flags, seeds, error messages."""

import asyncio
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_vespo.algorithms.accuracy import mean_interval
from megatron_vespo.rollout.collector import Collector
from megatron_vespo.rollout.engine_client import generate_payload
from megatron_vespo.rollout.evaluate import evaluate
from megatron_vespo.rollout.generate_reply import GenerateReplyError, NonFiniteLogProbsError
from megatron_vespo.rollout.router import CollectError
from megatron_vespo.rollout.sampler import completion_seed
from megatron_vespo.rollout.server_arguments import known_flags, parse_sglang_flags, server_arguments
from megatron_vespo.rollout.sglang_server import EngineError, SGLangServer
from megatron_vespo.system.plugins import WEIGHT_LOADER
from megatron_vespo.types import Prompt, SamplingParams
from tests.support.builders import make_completion, make_group
from tests.support.refusals import check_refusal

PROMPT = Prompt(prompt_id=17, token_ids=[5, 9, 2], answer="42", text="6 * 7 = ?")
SAMPLING = SamplingParams(temperature=0.7, max_new_tokens=8, stop_token_ids=(1,))


def test_payload_samples_the_untruncated_distribution():
    assert generate_payload(PROMPT, SAMPLING, 5, routes_start=7) == {
        "input_ids": [5, 9, 2],
        "return_logprob": True,
        "return_routed_experts": True,
        "routed_experts_start_len": 7,
        "sampling_params": {
            "temperature": 0.7,
            "max_new_tokens": 8,
            "stop_token_ids": [1],
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "sampling_seed": 5,
        },
    }
    plain = generate_payload(PROMPT, SAMPLING, None, routes_start=None)
    assert "sampling_seed" not in plain["sampling_params"]
    assert plain["return_routed_experts"] is False and "routed_experts_start_len" not in plain
    assert generate_payload(PROMPT, SAMPLING, None, routes_start=0)["return_routed_experts"] is True


def test_completion_seeds_differ_and_repeat():
    seeds = {completion_seed(1, prompt, index) for prompt in range(50) for index in range(20)}
    assert len(seeds) == 1000 and all(0 <= seed < 2**31 for seed in seeds)
    assert completion_seed(1, 3, 4) == completion_seed(1, 3, 4) != completion_seed(2, 3, 4)


# --sglang-* flags


def test_flags_are_split_from_ours():
    argv = "train --lr 1e-5 --sglang-tp-size=2 --sglang-disable-radix-cache --seed 3".split()
    argv += "--sglang-lora-paths a=x b=y --sglang-random-seed -1 --no-bias".split()
    flags, rest = parse_sglang_flags(argv)
    assert flags == "--tp-size 2 --disable-radix-cache --lora-paths a=x b=y --random-seed -1".split()
    assert rest == "train --lr 1e-5 --seed 3 --no-bias".split()


def test_a_flag_takes_only_its_own_values():
    assert parse_sglang_flags(["--sglang-sleep-on-idle", "rest"]) == (["--sleep-on-idle"], ["rest"])
    assert parse_sglang_flags(["--sglang-tp-size", "2", "rest"]) == (["--tp-size", "2"], ["rest"])
    optional = "--sglang-model-checksum"  # SGLang takes it with a value and without
    assert parse_sglang_flags([optional, "--lr", "1"]) == (["--model-checksum"], ["--lr", "1"])
    assert parse_sglang_flags([optional, "x", "rest"]) == (["--model-checksum", "x"], ["rest"])


@pytest.mark.parametrize(
    "row",
    [
        ("--sglang-atention-backend x", "has no flag --atention-backend",
         "did you mean --sglang-attention-backend?"),
        ("--sglang-zzzzqqqq", "has no flag --zzzzqqqq"),
        ("--sglang-model-path x", "sets SGLang's --model-path itself; remove the flag"),
        ("--sglang-tp-size", "--tp-size needs a value"),
        ("--sglang-tp-size --lr 1", "--tp-size needs a value"),
        ("--sglang-sleep-on-idle=1", "--sleep-on-idle takes no value", "'1'"),
    ],
)  # fmt: skip
def test_flags_that_sglang_does_not_take(row):
    argv, *words = row
    with pytest.raises(ValueError) as error:
        parse_sglang_flags(argv.split())
    line = str(error.value)
    check_refusal(line, argv.partition(" ")[0], *words)
    assert ("did you mean" in line) == ("did you mean" in words[-1])


def test_reading_the_flags_does_not_import_sglang():
    known_flags.cache_clear()
    before = {name for name in sys.modules if name.startswith("sglang")}
    known = known_flags()
    assert {name for name in sys.modules if name.startswith("sglang")} == before
    assert len(known) > 400
    assert (known["--tp-size"], known["--tensor-parallel-size"]) == ("one", "one")
    assert (known["--disable-radix-cache"], known["--lora-paths"]) == ("none", "many")
    assert "--disable-cuda-graph" in known  # registered by hand, not from a field


def test_server_arguments():
    arguments = server_arguments(
        ["--tp-size", "2"], device="cuda", routes=True, dtype="bfloat16", seed=3, longest_step_s=1800.0
    )
    assert " ".join(arguments) == (
        "--skip-tokenizer-init --weight-version 0 --custom-weight-loader "
        f"{WEIGHT_LOADER} --enable-return-routed-experts --device cuda "
        "--dtype bfloat16 --random-seed 3 --log-level warning --watchdog-timeout 1800 --dist-timeout 1800 "
        "--disable-shared-experts-fusion --tp-size 2"
    )
    arguments = server_arguments(
        ["--dtype", "bfloat16"],
        device="cpu",
        routes=False,
        dtype="float32",
        seed=3,
        longest_step_s=0.5,
        weight_version=7,
    )
    assert " ".join(arguments) == (
        "--skip-tokenizer-init --weight-version 7 --custom-weight-loader "
        f"{WEIGHT_LOADER} --device cpu --random-seed 3 --log-level warning "
        "--watchdog-timeout 1 --dist-timeout 1 --attention-backend torch_native --max-running-requests 256 "
        "--max-total-tokens 32768 --sleep-on-idle --dtype bfloat16"
    )


# engine and collector, the parts that need no server


def test_engine_that_was_not_started():
    engine = SGLangServer("m", "127.0.0.1", 30000, [], Path("log"), 1.0)
    with pytest.raises(EngineError, match=r"^engine http://127.0.0.1:30000 is not running$"):
        engine.check()
    engine.stop(timeout_s=0)


def test_collector_needs_an_engine():
    with pytest.raises(ValueError, match="^a collector needs at least one engine url$"):
        Collector([], request_timeout_s=1.0)


class FaultyEngine:
    """Fails the first draws whose seeds are in `faulty`, which the test fills."""

    faulty: set[int] = set()

    def __init__(self, *_):
        self.url = "http://engine"

    async def generate(self, prompt, sampling, seed, begun=None):
        if seed in self.faulty:
            raise NonFiniteLogProbsError(f"seed {seed}: log-prob nan")
        return make_completion(prompt, 1)


def collected(monkeypatch, faulty_indices, num_completions):
    monkeypatch.setattr("megatron_vespo.rollout.collector.HttpEngineClient", FaultyEngine)
    FaultyEngine.faulty = {completion_seed(5, PROMPT.prompt_id, index) for index in faulty_indices}
    collector = Collector(["http://engine"], request_timeout_s=1.0)
    return collector.collect([PROMPT], SAMPLING, num_completions=num_completions, seed=5)[0]


def test_non_finite_completions_are_drawn_anew_and_named(monkeypatch):
    group = collected(monkeypatch, {7, 107}, 100)
    assert len(group) == 100
    assert {i: len(c.rejections) for i, c in enumerate(group) if c.rejections} == {7: 2}
    assert group[7].rejections == tuple(
        f"seed {completion_seed(5, PROMPT.prompt_id, index)}: log-prob nan" for index in (7, 107)
    )


@pytest.mark.parametrize(("num_completions", "faulty"), [(100, {1, 2, 3, 4}), (8, {0, 8})])
def test_too_many_non_finite_completions_end_the_run(monkeypatch, num_completions, faulty):
    message = (
        rf"^{len(faulty)} of {num_completions} completions had non-finite log-probs, more than 3%; the last"
    )
    with pytest.raises(CollectError, match=message):
        collected(monkeypatch, faulty, num_completions)


class SlowEngine(FaultyEngine):
    """Takes 20 milliseconds; the engine named "broken" then fails."""

    def __init__(self, url, *_):
        self.url = url

    async def generate(self, prompt, sampling, seed, begun=None):
        await asyncio.sleep(0.02)
        if "broken" in self.url:
            raise GenerateReplyError("broken")
        return make_completion(prompt, 1)


@pytest.mark.parametrize("urls", [["http://a", "http://b"], ["http://a", "http://broken"]])
def test_collector_says_when_each_engine_was_at_work(monkeypatch, urls):
    monkeypatch.setattr("megatron_vespo.rollout.collector.HttpEngineClient", SlowEngine)
    seen = []
    collector = Collector(urls, request_timeout_s=1.0, on_requests=lambda *span: seen.append(span))
    before = time.time_ns()
    try:
        collector.collect([PROMPT], SAMPLING, num_completions=5, seed=5)
    except GenerateReplyError:
        assert "http://broken" in urls
    after = time.time_ns()
    # to whichever has fewer outstanding: every second one; what was cancelled counts as well
    assert [(engine, number) for engine, _, _, number in seen] == [(0, 3), (1, 2)]
    for _, start, end, _ in seen:
        assert before <= start and end <= after and end - start >= 0.02e9


class FixedCollector:
    """Two completions of 2 and 4 tokens, whatever the prompts."""

    def collect(self, prompts, sampling, *, num_completions, seed, for_training=True):
        assert (num_completions, seed) == (2, 9)
        return [make_group(prompt, [2, 4], temperature=sampling.temperature) for prompt in prompts]


def test_evaluate():
    rewards, seen = [1.0, 0.0, 0.5, 1.0], []

    def score(completions):
        seen.extend(completions)
        return rewards

    result = evaluate(FixedCollector(), [PROMPT, PROMPT], SAMPLING, score, 9, 2, None, 1.0)
    assert {completion.temperature for completion in seen} == {SAMPLING.temperature}
    low, high = mean_interval(np.array([0.5, 0.75]), 2)
    pass_low, pass_high = mean_interval(np.array([1.0, 1.0]), 2)
    assert result.metrics() == {
        "eval/accuracy": 0.625,
        "eval/interval_low": low,
        "eval/interval_high": high,
        "eval/length_mean": 3.0,
        "eval/pass_at_2": 1.0,
        "eval/pass_at_2_interval_low": pass_low,
        "eval/pass_at_2_interval_high": pass_high,
    }
    result = evaluate(FixedCollector(), [PROMPT, PROMPT], SAMPLING, score, 9, 2, None, 1.5)
    assert result.passes[2][0] == 0.0
    with pytest.raises(ValueError, match="^evaluation needs at least one prompt$"):
        evaluate(FixedCollector(), [], SAMPLING, lambda completions: [], 9, 1, None, 1.0)


def test_evaluate_at_its_own_temperature():
    seen = []
    evaluate(FixedCollector(), [PROMPT], SAMPLING, lambda cs: seen.extend(cs) or [1.0, 1.0], 9, 2, 0.5, 1.0)
    assert [completion.temperature for completion in seen] == [0.5, 0.5]
