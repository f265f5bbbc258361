"""Advantages per token: what they change in a loss, and what they must not."""

import math
from dataclasses import replace

import pytest
import torch

from megatron_vespo.algorithms.losses.aggregation import summed_loss
from megatron_vespo.algorithms.losses.table import METHODS
from megatron_vespo.algorithms.vespo import GammaKernel
from tests.support.naive_losses import LONGEST, batch

KERNEL = GammaKernel()
every_method = pytest.mark.parametrize("method", METHODS)


def bound(method, inputs):
    return METHODS[method].bind(KERNEL).adapted([inputs], reduce=lambda values: values)


def with_token_advantages(inputs, advantages):
    return replace(inputs, token_advantages_T=torch.tensor(advantages))


def summed(method, inputs):
    terms: list = []
    total = summed_loss(bound(method, inputs), inputs, METHODS[method].aggregation, LONGEST, terms=terms)
    [gradient_T] = torch.autograd.grad(total, inputs.log_probs_T)
    return total, gradient_T, torch.cat([term.weight_T for term in terms])


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("log_w", [None, 100.0, -100.0])
def test_token_advantages_of_zero_are_bit_identical_to_none(method, dtype, log_w):
    inputs = batch(log_ratio=log_w and log_w / 12, dtype=dtype)
    zeros = replace(inputs, token_advantages_T=torch.zeros(len(inputs.loss_mask_T)))
    for ours, theirs in zip(summed(method, zeros), summed(method, inputs), strict=True):
        assert torch.equal(ours, theirs)


@every_method
def test_it_does_not_matter_which_part_of_the_advantage_is_the_tokens(method):
    """An advantage of 0 with A as every token's own has the same loss as A of the response."""
    inputs = batch()
    moved = replace(
        inputs,
        advantages_S=torch.zeros_like(inputs.advantages_S),
        token_advantages_T=inputs.per_token(inputs.advantages_S),
    )
    for ours, theirs in zip(summed(method, moved), summed(method, inputs), strict=True):
        assert torch.equal(ours, theirs)


@every_method
def test_untrained_tokens_have_no_advantage_whatever_they_hold(method):
    inputs = batch(token_spread=0.8)
    untrained_T = inputs.loss_mask_T == 0
    assert inputs.token_advantages_T[untrained_T].isnan().all()
    filled = replace(inputs, token_advantages_T=inputs.token_advantages_T.masked_fill(untrained_T, 0.0))
    total, gradient_T, _ = summed(method, inputs)
    expected, expected_T, _ = summed(method, filled)
    assert torch.equal(total, expected) and torch.equal(gradient_T, expected_T)
    assert total.isfinite()


@pytest.mark.parametrize(
    ("method", "up", "down"),
    [
        ("vespo", 4.0 * math.exp(-3.0), 8.0 * math.exp(-2.0)),
        ("topr", 1.0, 1.0),
        ("sequence-is", 2.0, 2.0),
    ],
)
@pytest.mark.parametrize("advantage", [0.5, -0.5])
def test_the_weight_goes_by_the_tokens_sign_and_the_responses_w(method, advantage, up, down):
    """W = 2 in three tokens; A = 0.75, -0.75, 0 whatever the sign of the response's part."""
    inputs = batch([3], [advantage], log_ratio=math.log(2) / 3)
    own = [0.75 - advantage, -0.75 - advantage, -advantage]
    inputs = with_token_advantages(inputs, [0.0, 0.0, *own, 0.0, 0.0, 0.0])
    term = bound(method, inputs)(inputs)
    assert term.weight_T[2:5].tolist() == pytest.approx([up, down, up])
    assert term.gradient_T[2:5].tolist() == pytest.approx([-0.75 * up, 0.75 * down, 0.0])


def test_topr_tapers_only_tokens_that_are_pushed_down():
    inputs = with_token_advantages(batch([2], [0.5], log_ratio=-1.0), [0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0])
    weight_T = bound("topr", inputs)(inputs).weight_T
    assert weight_T[2:4].tolist() == pytest.approx([1.0, math.exp(-2.0)])


def test_a_clip_acts_on_the_side_of_the_tokens_sign():
    """A ratio of 2 is beyond GRPO's upper bound, which holds only for tokens that are pushed up."""
    inputs = with_token_advantages(batch([2], [0.5], log_ratio=math.log(2)), [0.0] * 3 + [-1.0] + [0.0] * 3)
    term = bound("grpo", inputs)(inputs)
    assert term.loss_T[2:4].tolist() == pytest.approx([-1.28 * 0.5, 2.0 * 0.5])
    assert term.weight_T[2:4].tolist() == pytest.approx([0.0, 2.0])
