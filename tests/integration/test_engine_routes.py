"""R3: the trainer runs the experts that SGLang chose, exactly, even where its own weights would not."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from megatron_vespo.rollout.collector import Collector
from megatron_vespo.types import Completion, SamplingParams, TrainingSample
from tests.support.launch import PROGRAMS, TIMEOUT_S, launch
from tests.support.servers import ROUTES, make_tiny_model

LAYOUT = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 1 --expert-model-parallel-size 2"


def training_sample(completion: Completion, advantage: float) -> TrainingSample:
    return TrainingSample(
        token_ids=np.concatenate([completion.prompt.token_ids, completion.token_ids]),
        prompt_length=len(completion.prompt.token_ids),
        behavior_log_probs=completion.log_probs,
        policy_versions=completion.policy_versions,
        advantage=advantage,
        reward=0.0,
        temperature=completion.temperature,
        group_id=completion.prompt.prompt_id,
        routed_experts=completion.routed_experts,
        routes_version=completion.policy_versions.last,
    )


@pytest.fixture(scope="module")
def samples(engine, prompts) -> list[TrainingSample]:
    collector = Collector([engine.url], routes=ROUTES, request_timeout_s=60, check=engine.check)
    groups = collector.collect(prompts, SamplingParams(1.0, 40, (1,)), num_completions=8, seed=0)
    return [training_sample(c, (-1.0) ** i) for group in groups for i, c in enumerate(group)]


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("other_model"), seed=7)


@pytest.fixture
def run(samples, tmp_path):
    """programs/replay.py on the engine's samples, at tensor 2 x expert 2."""
    file = tmp_path / "samples.pkl"
    file.write_bytes(pickle.dumps(samples))

    def start(model, *flags: str):
        arguments = ["--hf-checkpoint", str(model), "--samples", str(file), *LAYOUT.split(), *flags]
        arguments += ["--expert-tensor-parallel-size", "1"]
        return launch(PROGRAMS / "replay.py", 2, arguments, TIMEOUT_S, tmp_path / "ranks")

    return start


def test_the_engines_experts_run_in_every_pass(run, samples, other_model):
    sent = np.concatenate([np.sort(sample.routed_experts, axis=-1) for sample in samples])
    own = run(other_model, "--routing-replay", "R2")[0]["chosen"]
    assert (own != sent).any(-1).mean() > 0.5  # the trainer's weights, another model's, would choose others
    for result in run(other_model, "--routing-replay", "R3"):
        np.testing.assert_array_equal(result["chosen"], sent)
        np.testing.assert_array_equal(result["chosen_after"], sent)
        assert result["passes"].tolist() == [1, 1]


def test_with_the_engines_weights_nothing_changes(run, samples, tiny_model):
    sent = np.concatenate([np.sort(sample.routed_experts, axis=-1) for sample in samples])
    behavior = np.concatenate([sample.behavior_log_probs for sample in samples])
    free, replayed = (run(tiny_model, "--routing-replay", replay)[0] for replay in ("R2", "R3"))
    np.testing.assert_array_equal(free["chosen"], sent)
    for result in (free, replayed):
        difference = np.abs(result["log_probs"] - behavior).max()
        print(f"engine and trainer: {difference:.1e}")
        assert difference < 1e-4
