"""What teachers make of completions on their way to the trainer."""

import numpy as np
import pytest

from megatron_vespo.arguments.distillation import DistillationSettings, Teacher
from megatron_vespo.driver.training_samples import training_samples
from megatron_vespo.observability.rollout_metrics import rollout_metrics
from tests.support.builders import make_completion, make_prompt, make_segments

SCORES = [np.array(values, np.float32) for values in ([-1.0, -2.0, -0.5], [-0.25])]


def group():
    """A conversation whose policy sampled three of five tokens, and a response of one token."""
    prompt = make_prompt(0, [1])
    return [
        make_completion(
            prompt, 5, segments=make_segments(2, 2, 1), log_probs=np.array([-1, -1, -1], np.float32),
            reward=1.0, teacher_log_probs=SCORES[0],
        ),
        make_completion(
            prompt, 1, log_probs=np.array([-1], np.float32), reward=0.0, teacher_log_probs=SCORES[1]
        ),
    ]  # fmt: skip


def settings(**changes) -> DistillationSettings:
    values = {
        "teachers": (Teacher(None, url="http://x"),), "teacher_key": "data_source", "teacher_engines": 1,
        "teacher_tp_size": None, "distillation_coefficient": 1.0, "distillation_clip": None,
        "reward_coefficient": 1.0,
    }  # fmt: skip
    return DistillationSettings(**values | changes)


def test_tokens_have_advantages_beside_the_responses():
    samples = training_samples([group()], "group-mean", None, distillation=settings())
    assert [sample.advantage for sample in samples] == [0.5, -0.5]
    assert samples[0].token_advantages == pytest.approx([0.0, -1.0, 0.5])
    assert samples[1].token_advantages == pytest.approx([0.75])
    assert samples[0].token_advantages.dtype == np.float32 and samples[0].num_trained == 3


def test_a_mixture_weighs_both():
    mixed = settings(reward_coefficient=0.5, distillation_coefficient=2.0, distillation_clip=0.6)
    samples = training_samples([group()], "group-mean", None, distillation=mixed)
    assert [sample.advantage for sample in samples] == [0.25, -0.25]
    assert samples[0].token_advantages == pytest.approx([0.0, -1.2, 1.0])


def test_the_teacher_alone():
    samples = training_samples([group()], "group-mean", None, distillation=settings(reward_coefficient=0.0))
    assert [sample.advantage for sample in samples] == [0.0, 0.0]
    assert samples[1].token_advantages == pytest.approx([0.75])


@pytest.mark.parametrize("distillation", [None, settings(teachers=())])
def test_without_teachers_nothing_changes(distillation):
    """Also where a recorded batch has scores that this run does not want."""
    samples = training_samples([group()], "group-mean", None, distillation=distillation)
    assert [sample.advantage for sample in samples] == [0.5, -0.5]
    assert all(sample.token_advantages is None for sample in samples)


def test_metrics_are_those_of_what_was_scored():
    completions = group()
    metrics = rollout_metrics([completions], "group-mean")
    assert metrics["distillation/reverse_kl"] == pytest.approx(-(0.0 - 1.0 + 0.5 + 0.75) / 4)
    completions[1].teacher_log_probs = None  # left out by dynamic sampling
    metrics = rollout_metrics([completions], "group-mean")
    assert metrics["distillation/reverse_kl"] == pytest.approx(0.5 / 3)
    completions[0].teacher_log_probs = None
    assert not [name for name in rollout_metrics([completions], "group-mean") if "distillation" in name]
