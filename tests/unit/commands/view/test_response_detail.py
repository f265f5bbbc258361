"""One response token by token: the parts of log(pi / mu), log W as it grows, text and turns."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_vespo.algorithms.vespo import RATIO_DENOMINATORS, GammaKernel, sequence_log_ratio
from megatron_vespo.commands.view.response_detail import Ratios, blocks, response_detail, token_texts
from megatron_vespo.types import Segments
from tests.support.builders import make_completion
from tests.support.step_records import StepShape, random_step


def with_denominator(record, denominator, **settings):
    return replace(record, settings={**record.settings, "ratio_denominator": denominator, **settings})


def trainers_log_w(record, denominator, truncation=2.0):
    """log W as `sequence_log_ratio` computes it for training, [M]."""
    mu = np.concatenate([one.log_probs for one in record.completions])
    ids = torch.repeat_interleave(torch.arange(len(record.completions)), torch.tensor(record.num_sampled))
    old = None if record.pi_old is None else torch.tensor(record.pi_old)
    return sequence_log_ratio(
        torch.tensor(record.pi), torch.tensor(mu), old, torch.ones(len(mu)), ids, len(record.completions),
        denominator, truncation,
    ).log_w_S.numpy()  # fmt: skip


@pytest.mark.parametrize("denominator", RATIO_DENOMINATORS)
def test_the_running_sum_ends_at_the_trainers_log_w(denominator):
    record = random_step(3)
    # a mismatch that the truncation changes
    record = replace(record, pi_old=record.pi_old + np.float32(0.06))
    log_w = trainers_log_w(record, denominator)
    record = with_denominator(replace(record, log_w=log_w), denominator, mismatch_truncation=2.0)
    for i in range(len(record.completions)):
        running = response_detail(record, i)["running"]
        assert running["log_w"][-1] == pytest.approx(log_w[i], abs=2e-5)
        assert abs(running["difference"]) < 2e-5
        assert sum(running["own"]) == pytest.approx(log_w[i], abs=1e-3)
        phi = GammaKernel().phi(torch.tensor(running["log_w"]), torch.full((len(running["log_w"]),),
                                float(record.advantages[i])))  # fmt: skip
        np.testing.assert_allclose(running["phi"], phi.numpy(), atol=1e-5)


def test_phi_of_a_token_goes_by_its_own_advantage():
    record = random_step(3)
    own = np.where(np.arange(len(record.pi)) % 2 == 0, 0.5, -0.5).astype(np.float32)
    found = response_detail(replace(record, advantages_per_token=own), 5)
    mine = record.per_sample(own)[5]
    assert found["advantages_per_token"] == mine.tolist()
    running = found["running"]
    phi = GammaKernel().phi(torch.tensor(running["log_w"]), torch.tensor(mine))
    np.testing.assert_allclose(running["phi"], phi.numpy(), atol=1e-5)
    of_the_response = response_detail(record, 5)
    assert of_the_response["advantages_per_token"] is None
    assert np.abs(np.subtract(of_the_response["running"]["phi"], running["phi"])).max() > 1e-3
    assert of_the_response["running"]["thresholds"] == running["thresholds"]


def test_denominators_differ_where_they_must():
    record = random_step(3)
    record = replace(record, pi_old=record.pi_old + np.float32(0.06))
    ends = {
        name: response_detail(with_denominator(record, name), 0)["running"]["log_w"][-1]
        for name in RATIO_DENOMINATORS
    }
    assert len({round(end, 3) for end in ends.values()}) >= 3


def test_numbers_of_a_token_are_the_files():
    record = random_step(2, StepShape(with_experts=True))
    start = int(record.num_sampled[:5].sum())
    found = response_detail(record, 5)
    mu = record.completions[5].log_probs
    assert found["given"] > 0 and found["length"] == len(mu) == len(found["total"])
    for name, expected in {
        "log_pi": record.pi[start : start + len(mu)], "log_pi_old": record.pi_old[start : start + len(mu)],
        "log_mu": mu, "total": record.pi[start : start + len(mu)] - mu,
    }.items():  # fmt: skip
        np.testing.assert_allclose(found[name], expected, atol=1e-6)
    parts = np.add(found["staleness_per_token"], found["mismatch_per_token"])
    np.testing.assert_allclose(parts, found["total"], atol=3e-6)
    assert found["expert_differences"] == record.expert_differences[start : start + len(mu)].tolist()
    assert found["token_ids"] == record.completions[5].token_ids.tolist()
    json.dumps(found, allow_nan=False)


def test_without_pi_old_the_parts_are_unknown():
    record = random_step(2, StepShape(with_old=False))
    unknown = np.full_like(record.log_w, np.nan)
    record = replace(record, log_mismatch=unknown, log_mismatch_in_w=unknown)
    found = response_detail(record, 0)
    assert found["staleness_per_token"] is found["mismatch_per_token"] is found["log_pi_old"] is None
    assert found["mismatch_in_w"] is found["staleness_in_w"] is found["expert_differences"] is None
    assert found["running"]["log_w"][-1] == pytest.approx(record.log_w[0], abs=1e-5)
    needs = response_detail(with_denominator(record, "recomputed"), 0)["running"]
    assert needs["log_w"] is None and "pi_old" in needs["why_not"] and needs["thresholds"]["peak"] is not None


def test_a_response_without_tokens():
    empty = make_completion(tokens=[])
    zero = np.zeros(1, np.float32)
    record = replace(
        random_step(1), completions=[empty], pi=np.empty(0, np.float32), pi_old=None,
        **{name: zero for name in ("advantages", "log_w", "weight", "correction", "rejected", "log_mismatch",
                                   "log_mismatch_in_w", "group_ids")},
    )  # fmt: skip
    found = response_detail(record, 0)
    assert found["total"] == [] and found["lag"] is None and found["running"]["difference"] == 0.0


def test_there_is_no_response_after_the_last():
    with pytest.raises(IndexError, match="16 responses, no number 16"):
        response_detail(random_step(1), 16)


def test_a_letter_of_several_tokens_belongs_to_the_last():
    smile = "🙂".encode()
    assert token_texts([b"a", smile[:2], smile[2:], b"b", None, b"c"]) == ["a", "", "🙂", "b", None, "c"]
    assert token_texts([smile[:2], b"x"]) == ["", "\ufffdx"]


def ranges(completion, pieces):
    return [
        (one["writer"], one["thinking"], one["start"], one["end"], one["sampled_before"])
        for one in blocks(completion, pieces)
    ]


def test_turns_become_blocks_and_thinking_is_one_of_its_own():
    pieces = ["<think>", "hm", "</thi", "nk>", "call", "<think>", "7", "</think>", "so", " 7"]
    segments = Segments(("policy", "tool", "policy"), (5, 2, 3))
    completion = make_completion(tokens=10, segments=segments)
    assert ranges(completion, pieces) == [
        ("policy", True, 0, 4, 0),
        ("policy", False, 4, 5, 4),
        ("tool", False, 5, 7, 5),  # what a tool writes is no thinking
        ("policy", True, 7, 8, 5),  # ends a thought that began in the prompt
        ("policy", False, 8, 10, 6),
    ]


@pytest.mark.parametrize("pieces, expected", [
    (["a", "b"], [("policy", False, 0, 2, 0)]),
    (["a", "<think>", "b"], [("policy", False, 0, 1, 0), ("policy", True, 1, 3, 1)]),  # cut off at the length
    (["a", "</think>", "b"], [("policy", True, 0, 2, 0), ("policy", False, 2, 3, 2)]),
    ([None, "a"], [("policy", False, 0, 2, 0)]),
])  # fmt: skip
def test_thinking_without_a_beginning_or_an_end(pieces, expected):
    assert ranges(make_completion(tokens=len(pieces)), pieces) == expected


def test_ratios_are_summed_in_float64():
    mu = np.full(20_000, -1.0, np.float32)
    pi = mu + np.float32(1e-4)
    exact = float((pi.astype(np.float64) - mu).sum())
    assert Ratios.of(pi, None, mu).running_log_w({"ratio_denominator": "rollout"})[-1] == pytest.approx(
        exact, rel=1e-12
    )
