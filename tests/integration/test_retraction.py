"""SGLang runs out of memory for keys and values in the middle of responses: what it answers then."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megatron_vespo.driver.training_samples import lost_routes, training_sample
from megatron_vespo.observability.metrics import batch_records, read_metrics
from megatron_vespo.rollout.collector import Collector
from megatron_vespo.rollout.sampled_distribution import training_sampling
from megatron_vespo.types import Completion, SamplingParams
from tests.support.references import completion_log_probs, truncated_log_probs
from tests.support.runs import finished, train_command, write_questions
from tests.support.servers import NUM_LAYERS, ROUTES, TOPK, tiny_engine

RETRACTING = ["--max-total-tokens", "1024", "--schedule-conservativeness", "0.05"]
LENGTH, NUM_COMPLETIONS = 300, 48
SAMPLING = SamplingParams(temperature=1.0, max_new_tokens=LENGTH, stop_token_ids=())


def _retract_now_and_then(environment: pytest.MonkeyPatch) -> None:
    """SGLang's own switch: memory alone may be enough, as lengths are drawn at random."""
    environment.setenv("SGLANG_TEST_RETRACT", "true")
    environment.setenv("SGLANG_TEST_RETRACT_INTERVAL", "100")


@pytest.fixture(scope="module")
def retracting_engine(tiny_model, tmp_path_factory):
    """It admits requests as if they would end early, and has memory for a few that do not."""
    log = tmp_path_factory.mktemp("retracting") / "engine.log"
    with pytest.MonkeyPatch.context() as environment:
        _retract_now_and_then(environment)
        with tiny_engine(tiny_model, log, *RETRACTING) as engine:
            yield engine


@pytest.fixture(scope="module")
def completions(retracting_engine, prompts) -> list[Completion]:
    collector = Collector([retracting_engine.url], routes=ROUTES, request_timeout_s=120)
    [group] = collector.collect(prompts[3:4], SAMPLING, num_completions=NUM_COMPLETIONS, seed=0)
    return group


@pytest.mark.timeout(400)
def test_retracted_responses_are_trained_without_their_routes(completions):
    retracted = [c for c in completions if c.num_retractions]
    print(f"{len(retracted)} of {len(completions)} were retracted, {[c.num_retractions for c in retracted]}")
    assert 0 < len(retracted) < len(completions)
    for completion in completions:
        entering = len(completion.prompt.token_ids) + len(completion.token_ids) - 1
        sample = training_sample(completion, 0.5, 0, "R3")
        assert sample.replays == (completion.num_retractions == 0)
        if sample.replays:
            assert sample.routed_experts.shape == (entering, NUM_LAYERS, TOPK) and sample.routes_version == 0
        else:
            assert completion.routed_experts is None and sample.routed_experts is None
    samples = [training_sample(completion, 0.5, 0, "R3") for completion in completions]
    assert f"{len(retracted)} of {len(completions)} responses" in lost_routes(samples)


@pytest.mark.timeout(400)
def test_tokens_and_log_probs_outlive_a_retraction(completions, reference):
    """And are those of the pass that sampled: what is lost are its routes alone."""
    for completion in completions:
        expected = completion_log_probs(reference, completion)
        assert np.abs(completion.log_probs - expected).max() <= 1e-4


@pytest.mark.timeout(400)
def test_supports_outlive_a_retraction(retracting_engine, prompts, reference):
    sampling = training_sampling(replace(SAMPLING, top_p=0.9), [])
    collector = Collector([retracting_engine.url], request_timeout_s=120)
    [group] = collector.collect(prompts[3:4], sampling, num_completions=NUM_COMPLETIONS, seed=0)
    retracted = [completion for completion in group if completion.num_retractions]
    print(f"{len(retracted)} of {len(group)} were retracted")
    assert retracted
    for completion in group:
        assert len(completion.supports) == len(completion.token_ids)
        assert np.abs(truncated_log_probs(reference, completion) - completion.log_probs).max() <= 1e-4


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_trains_on_them_and_says_so(tiny_model, tmp_path, monkeypatch):
    _retract_now_and_then(monkeypatch)
    questions = write_questions(tmp_path / "questions.jsonl")
    flags = "--routing-replay R3 --train-iters 2 --max-completion-tokens 300 --group-size 12 --no-hf-export"
    flags += " --reward-function tests.support.run_rewards:first_letters --max-logprob-difference 1e-3"
    engine = " ".join(RETRACTING).replace("--", "--sglang-")
    command = train_command(tiny_model, questions, tmp_path / "out", *flags.split(), *engine.split())
    output = finished(command, tmp_path / "log", 500)
    records = batch_records(read_metrics(tmp_path / "out/metrics.jsonl"))
    shares = [record["rollout/retracted_share"] for record in records]
    print(shares, [record["check/max_logprob_difference"] for record in records])
    assert len(shares) == 2 and 0 < min(shares) and max(shares) < 1
    for share in shares:
        assert f"{round(share * 48)} of 48 responses are trained without routing replay" in output
