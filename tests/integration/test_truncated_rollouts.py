"""Truncated sampling in a real engine: supports and mu by transformers, log W by the trainer."""

from __future__ import annotations

import asyncio
import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_vespo.driver.training_samples import training_sample
from megatron_vespo.rollout.collector import Collector
from megatron_vespo.rollout.sampled_distribution import training_sampling
from megatron_vespo.rollout.sampler import RejectedDraws
from megatron_vespo.types import Completion, Prompt, SamplingParams
from tests.support.launch import PROGRAMS, TIMEOUT_S, launch
from tests.support.references import (
    completion_log_probs,
    completion_logits,
    support_masks,
    truncated_log_probs,
)
from tests.support.servers import ROUTES, VOCAB_SIZE, tiny_engine

PLAIN = SamplingParams(1.0, 60, ())
KINDS = {
    "top-p": {"top_p": 0.9},
    "top-k": {"top_k": 20},
    "min-p": {"min_p": 0.05},
    "all at 0.7": {"temperature": 0.7, "top_p": 0.95, "top_k": 30, "min_p": 0.02},
}
LENGTH = 240  # tokens of the responses whose log W is measured


def expected_masks(logits: torch.Tensor, sampling: SamplingParams) -> np.ndarray:
    """The definition, token by token: top-k and top-p of the whole distribution, then min-p. bool [N, V]."""
    kept = np.zeros(tuple(logits.shape), bool)
    for row, probs in zip(kept, logits.double().softmax(-1).numpy(), strict=True):
        order = np.argsort(-probs)
        before = np.cumsum(probs[order]) - probs[order]
        chosen = order[(before <= sampling.top_p) & (np.arange(len(order)) < sampling.top_k)]
        row[chosen[probs[chosen] >= sampling.min_p * probs.max()]] = True
    return kept


def check(reference, completions: list[Completion], sampling: SamplingParams) -> tuple[float, float, float]:
    """The largest error of mu, the share of other supports, and the mean support."""
    errors, others, sizes = [], [], []
    for completion in completions:
        mu = truncated_log_probs(reference, completion, sampling.temperature)
        errors.append(np.abs(mu - completion.log_probs).max())
        expected = expected_masks(completion_logits(reference, completion, sampling.temperature), sampling)
        others.append((expected != support_masks(completion, VOCAB_SIZE)).any(-1))
        sizes.append(completion.supports.counts)
    return float(max(errors)), float(np.concatenate(others).mean()), float(np.concatenate(sizes).mean())


def collector_of(engine) -> Collector:
    return Collector([engine.url], routes=ROUTES, request_timeout_s=120.0, check=engine.check)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", KINDS)
def test_supports_and_mu_against_transformers(engine, reference, prompts, kind):
    sampling = training_sampling(replace(PLAIN, **KINDS[kind]), [])
    groups = collector_of(engine).collect(prompts, sampling, num_completions=4, seed=0)
    completions = [completion for group in groups for completion in group]
    error, others, size = check(reference, completions, sampling)
    full = max(
        np.abs(c.log_probs - completion_log_probs(reference, c, sampling.temperature)).max()
        for c in completions
    )
    print(f"{kind}: {size:.1f} tokens per support, mu differs by {error:.1e}, other supports: {others:.2%}")
    print(f"log-probs of the whole vocabulary differ from mu by up to {full:.2f}")
    assert error <= 1e-4 and full > 1e-2
    assert others <= 0.005  # a probability at the cut, which rounding moves over it
    assert 1 < size < VOCAB_SIZE


async def _drawn_in_pieces(
    engine, prompts: list[Prompt], sampling: SamplingParams
) -> tuple[list[Completion], int]:
    """All at once; the engine hands everything back twice in between. And how many beginnings it did."""
    known: list[list[Completion | None]] = [[None] for _ in range(3 * len(prompts))]
    beginnings = 0
    async with collector_of(engine).connect() as sampler:
        draws = [
            asyncio.create_task(sampler.draw(prompt, sampling, i, 0, 1, RejectedDraws(10), partials))
            for i, (prompt, partials) in enumerate(zip(prompts * 3, known, strict=True))
        ]
        for _ in range(2):
            await asyncio.sleep(0.5)
            await sampler.hold(60.0)
            beginnings += sum(part is not None and part.finish_reason == "abort" for [part] in known)
            sampler.release()
        return await asyncio.gather(*draws), beginnings


@pytest.mark.timeout(300)
def test_responses_that_are_aborted_and_continued(engine, reference, prompts):
    sampling = training_sampling(replace(PLAIN, max_new_tokens=LENGTH, top_p=0.9), [])
    completions, beginnings = asyncio.run(_drawn_in_pieces(engine, prompts, sampling))
    error, others, size = check(reference, completions, sampling)
    print(f"{beginnings} beginnings; mu differs by {error:.1e}, other supports: {others:.2%} of {size:.1f}")
    assert beginnings >= 5 and all(len(c.token_ids) == len(c.supports) for c in completions)
    assert error <= 1e-4 and others <= 0.005


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("flags", ["--tp-size 2", "--disable-overlap-schedule", "--chunked-prefill-size 16"])
def test_other_engines(tiny_model, reference, prompts, tmp_path, flags):
    sampling = training_sampling(replace(PLAIN, top_p=0.9, min_p=0.01), [])
    with tiny_engine(tiny_model, tmp_path / "engine.log", *flags.split()) as engine:
        groups = collector_of(engine).collect(prompts, sampling, num_completions=4, seed=5)
    error, others, _ = check(reference, [completion for group in groups for completion in group], sampling)
    print(f"{flags}: mu differs by {error:.1e}, other supports: {others:.2%}")
    assert error <= 1e-4 and others <= 0.005


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_seeds_of_deterministic_inference(tiny_model, reference, prompts, tmp_path):
    sampling = training_sampling(replace(PLAIN, top_p=0.9), [])
    with tiny_engine(tiny_model, tmp_path / "engine.log", "--enable-deterministic-inference") as engine:
        first, again = (
            collector_of(engine).collect(prompts[:3], sampling, num_completions=2, seed=5) for _ in range(2)
        )
    for one, other in zip(sum(first, []), sum(again, []), strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-5)
        assert one.supports.token_ids.tolist() == other.supports.token_ids.tolist()
    error, others, _ = check(reference, sum(first, []), sampling)
    assert error <= 1e-4 and others <= 0.005


@pytest.mark.timeout(400)
def test_log_w_at_equal_weights_is_zero_with_the_masks_only(engine, tiny_model, prompts, tmp_path):
    """log W = log(pi / mu) of whole responses: the trainer's log pi against the engine's mu."""
    sampling = training_sampling(replace(PLAIN, max_new_tokens=LENGTH, top_p=0.9), [])
    groups = collector_of(engine).collect(prompts, sampling, num_completions=12, seed=0)
    long = [completion for group in groups for completion in group if len(completion.token_ids) >= 200]
    masked = [training_sample(completion, 0.5, 0, None) for completion in long]
    forgotten = [replace(sample, supports=None) for sample in masked]
    (tmp_path / "samples.pkl").write_bytes(pickle.dumps(masked + forgotten))
    (tmp_path / "cases.json").write_text(json.dumps({"rollout": ["--ratio-denominator", "rollout"]}))
    flags = f"--hf-checkpoint {tiny_model} --samples {tmp_path / 'samples.pkl'} "
    flags += f"--cases {tmp_path / 'cases.json'} --max-prompt-tokens 60 --max-completion-tokens {LENGTH}"
    flags += " --tensor-model-parallel-size 2 --expert-tensor-parallel-size 1 --max-tokens-per-gpu 600"
    flags += " --expert-model-parallel-size 2"
    results = launch(PROGRAMS / "log_w_is_zero.py", 2, flags.split(), TIMEOUT_S, tmp_path / "ranks")
    with_masks, without = np.split(results[0]["rollout"][0], 2)
    print(f"|log W| of {len(masked)} responses of 200 to {LENGTH} tokens: {np.abs(with_masks).max():.1e}")
    print(f"without the masks: {np.abs(without).min():.2f} to {np.abs(without).max():.2f}")
    assert len(masked) >= 5
    assert np.abs(with_masks).max() <= 1e-4
    assert np.abs(without).min() > 1
