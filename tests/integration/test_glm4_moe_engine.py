"""GLM-4.5's family: a real engine against the trainer at TP2 x PP2 x EP2, log-probs and experts."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from megatron_vespo.rollout.collector import Collector
from megatron_vespo.rollout.generate_reply import RouteShape
from megatron_vespo.types import Prompt, SamplingParams, TrainingSample
from tests.support.launch import PROGRAMS, TIMEOUT_S, launch
from tests.support.named_layouts import LAYOUTS
from tests.support.servers import TOPK, VOCAB_SIZE, make_tiny_glm, tiny_engine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
LAYERS, DENSE = 4, 1
TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_tiny_glm(tmp_path_factory.mktemp("glm"), 1, num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def samples(tmp_path_factory, model) -> list[TrainingSample]:
    """Sampled by an engine, with the experts that it chose."""
    engine = tiny_engine(model, tmp_path_factory.mktemp("engine") / "engine.log")
    engine.start()
    draw = np.random.default_rng(0)
    prompts = [Prompt(i, draw.integers(3, VOCAB_SIZE, 8 + i).astype(np.int32), "", "") for i in range(4)]
    try:
        collector = Collector(
            [engine.url], routes=RouteShape(LAYERS, TOPK), request_timeout_s=60, check=engine.check
        )
        groups = collector.collect(prompts, SamplingParams(TEMPERATURE, 40, (1,)), num_completions=4, seed=0)
    finally:
        engine.stop(timeout_s=0)
    return [
        TrainingSample(
            token_ids=np.concatenate([completion.prompt.token_ids, completion.token_ids]),
            prompt_length=len(completion.prompt.token_ids),
            behavior_log_probs=completion.log_probs,
            policy_versions=completion.policy_versions,
            advantage=(-1.0) ** i,
            reward=0.0,
            temperature=completion.temperature,
            group_id=completion.prompt.prompt_id,
            routed_experts=completion.routed_experts,
            routes_version=completion.policy_versions.last,
        )
        for group in groups
        for i, completion in enumerate(group)
    ]


@pytest.fixture(scope="module")
def run(samples, tmp_path_factory):
    file = tmp_path_factory.mktemp("samples") / "samples.pkl"
    file.write_bytes(pickle.dumps(samples))

    def start(folder: Path, *flags: str):
        num_ranks, layout = LAYOUTS["tp2 pp2 ep2"]
        arguments = ["--hf-checkpoint", str(folder), "--samples", str(file), *layout.split(), *flags]
        return launch(
            PROGRAMS / "replay.py", num_ranks, arguments, TIMEOUT_S, tmp_path_factory.mktemp("ranks")
        )

    return start


def test_engine_against_trainer(run, model, samples):
    """With routers that choose for themselves on both sides."""
    behavior = np.concatenate([sample.behavior_log_probs for sample in samples])
    sent = np.concatenate([np.sort(sample.routed_experts, axis=-1) for sample in samples])
    assert (sent[:, :DENSE] == 0).all() and len(np.unique(sent[:, DENSE:])) > TOPK
    for result in run(model, "--routing-replay", "R2"):
        difference = np.abs(result["log_probs"] - behavior).max()
        print(f"engine against trainer: {difference:.1e} over {len(behavior)} tokens")
        assert difference <= 1e-4
        np.testing.assert_array_equal(result["chosen"], sent)


def test_the_engines_experts_run_in_every_pass(run, samples, tmp_path):
    """Of another model's routers, which would choose others."""
    other = make_tiny_glm(tmp_path / "other", 7, num_hidden_layers=LAYERS)
    sent = np.concatenate([np.sort(sample.routed_experts, axis=-1) for sample in samples])
    for result in run(other, "--routing-replay", "R3"):
        np.testing.assert_array_equal(result["chosen"], sent)
        np.testing.assert_array_equal(result["chosen_after"], sent)
        assert result["passes"].tolist() == [1, 1]
    [free, *_] = run(other, "--routing-replay", "R2")
    assert (free["chosen"][:, DENSE:] != sent[:, DENSE:]).any(-1).mean() > 0.1
