"""One rollout batch as numbers."""

import numpy as np
import pytest

from megatron_vespo.rollout_metrics import rollout_metrics, step_metrics
from megatron_vespo.types import Completion, Prompt


def completion(reward: float, length: int, finish_reason: str = "stop") -> Completion:
    return Completion(
        prompt=Prompt(prompt_id=0, token_ids=[1, 2, 3], answer="", text=""),
        token_ids=[7] * length,
        log_probs=np.zeros(length, np.float32),
        policy_versions=np.zeros(length, np.int64),
        routed_experts=None,
        finish_reason=finish_reason,
        temperature=1.0,
        reward=reward,
    )


def test_rollout_metrics():
    groups = [
        [completion(1.0, 4), completion(0.0, 8, "length")],
        [completion(0.5, 1), completion(0.5, 3)],
        [completion(0.0, 8, "length"), completion(0.0, 6)],
        [completion(1.0, 2), completion(0.0, 0, "abort")],
    ]
    groups[0][1].rejections, groups[2][0].rejections = ("NaN", "NaN"), ("inf",)
    assert rollout_metrics(groups) == {
        "reward/mean": 3 / 8,
        "rollout/zero_advantage_share": 2 / 4,
        "response/length_mean": 32 / 8,
        "response/truncated_share": 2 / 8,
        "rollout/tokens": 32.0,
        "rollout/nonfinite_log_probs": 3.0,
    }


def step(**changes) -> dict:
    return {
        "log_w": np.array([0.0, 2.0], np.float32),
        "phi": np.array([1.0, 0.0], np.float32),
        "engine_gap": np.array([0.5, -0.5], np.float32),
        "loss": 0.25,
        "grad_norm": 3.0,
        "entropy": 2.0,
        "learning_rate": 1e-4,
        "padding_share": 0.1,
        "imbalance": 0.0,
        "num_tokens": 100,
        "lag": 0.0,
    } | changes


STEPS = [
    step(),
    step(
        log_w=np.array([-4.0, 2.0], np.float32),
        phi=np.array([0.5, 0.5], np.float32),
        engine_gap=np.array([1.5, -1.5], np.float32),
        loss=0.75,
        grad_norm=1.0,
        entropy=1.0,
        learning_rate=2e-4,
        padding_share=0.3,
        imbalance=0.5,
        num_tokens=50,
        lag=1.0,
    ),
]


def test_step_metrics():
    metrics = step_metrics(STEPS, np.array([1.0, -1.0, 1.0, -1.0], np.float32))
    assert metrics == pytest.approx(
        {
            "vespo/log_w_mean": 0.0,
            "vespo/log_w_std": np.sqrt(6.0),
            "vespo/log_w_abs_max": 4.0,
            "vespo/phi_mean": 0.5,
            "vespo/ess": 4.0 / (4 * 1.5),
            "vespo/dead_share": 0.25,
            "vespo/phi_mean_positive": 0.75,
            "vespo/phi_mean_negative": 0.25,
            "vespo/engine_gap_std": np.sqrt(1.25),
            "train/loss": 0.5,
            "train/grad_norm": 2.0,
            "train/learning_rate": 2e-4,
            "train/entropy": 1.5,
            "train/padding_share": 0.2,
            "train/imbalance": 0.25,
            "train/tokens": 150.0,
            "policy/lag_mean": 0.5,
        }
    )
    assert {type(value) for value in metrics.values()} == {float}


def test_an_unknown_engine_gap_is_left_out():
    steps = [STEPS[0], STEPS[1] | {"engine_gap": np.full(2, np.nan, np.float32)}]
    metrics = step_metrics(steps, np.ones(4, np.float32))
    assert "vespo/engine_gap_std" not in metrics
    assert metrics["vespo/phi_mean"] == 0.5
