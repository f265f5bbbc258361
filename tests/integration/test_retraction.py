"""SGLang runs out of memory for keys and values in the middle of responses: what it answers then."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from servers import NUM_LAYERS, ROUTES, TOPK, tiny_engine

from megatron_vespo.rollout.collector import Collector
from megatron_vespo.training_samples import lost_routes, training_sample
from megatron_vespo.types import Completion, SamplingParams

LENGTH, NUM_COMPLETIONS = 300, 48
SAMPLING = SamplingParams(temperature=1.0, max_new_tokens=LENGTH, stop_token_ids=())


@pytest.fixture(scope="module")
def retracting_engine(tiny_model, tmp_path_factory):
    """It admits requests as if they would end early, and has memory for a few that do not."""
    flags = ["--max-total-tokens", "1024", "--schedule-conservativeness", "0.05"]
    with tiny_engine(tiny_model, tmp_path_factory.mktemp("retracting") / "engine.log", *flags) as engine:
        yield engine


@pytest.fixture(scope="module")
def completions(retracting_engine, prompts) -> list[Completion]:
    collector = Collector([retracting_engine.url], routes=ROUTES, request_timeout_s=120)
    [group] = collector.collect(prompts[3:4], SAMPLING, num_completions=NUM_COMPLETIONS, seed=0)
    return group


@pytest.fixture(scope="module")
def reference(tiny_model):
    from transformers import Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


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
        tokens = completion.prompt.token_ids + completion.token_ids
        with torch.no_grad():
            logits = reference(torch.tensor([tokens])).logits[0, len(completion.prompt.token_ids) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0].numpy()
        assert np.abs(completion.log_probs - expected).max() <= 1e-4
