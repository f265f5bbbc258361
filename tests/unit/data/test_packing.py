"""Packing of whole sequences under a token budget, balanced by work."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vespo.data.packing import SequenceWork, pack_sequences, packing_stats

BUDGET = 64
TOKENS = SequenceWork(linear=1.0, attention=0.0)
# the 30B MoE of the Qwen3 family: attention is half of the work at 16k tokens
QWEN3_30B_A3B = SequenceWork.of_model(
    num_layers=48, hidden_size=2048, num_heads=32, num_query_groups=4, head_dim=128,
    ffn_hidden_size=768, topk=8, num_experts=128, vocab_size=151_936,
)  # fmt: skip

# whole numbers, so that sums of work are exact in any order
works = st.builds(SequenceWork, linear=st.integers(0, 50), attention=st.integers(2, 20).map(lambda a: 2 * a))


@st.composite
def batches(draw):
    """(lengths, ranks, multiple_of) as training has them: ranks x multiple divide the number of sequences."""
    num_ranks, multiple_of = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    size = num_ranks * multiple_of * draw(st.integers(1, 8))
    return draw(st.lists(st.integers(1, BUDGET), min_size=size, max_size=size)), num_ranks, multiple_of


def flat(bins: list[list[list[int]]]) -> list[list[int]]:
    return [indices for rank in bins for indices in rank]


def bin_works(bins: list[list[list[int]]], lengths: list[int], work: SequenceWork) -> list[float]:
    return sorted(sum(work.of(lengths[i]) for i in indices) for indices in flat(bins))


@given(batches(), works)
def test_every_bin_keeps_the_contract(batch, work):
    lengths, num_ranks, multiple_of = batch
    bins = pack_sequences(lengths, work, num_ranks, BUDGET, multiple_of)
    assert bins == pack_sequences(list(lengths), work, num_ranks, BUDGET, multiple_of)
    assert len(bins) == num_ranks
    (num_steps,) = {len(rank) for rank in bins}
    assert num_steps % multiple_of == 0
    assert all(flat(bins))
    assert sorted(i for indices in flat(bins) for i in indices) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in indices) <= BUDGET for indices in flat(bins))
    # at most twice the least number: longest first fails only when every bin is more than half full
    least = -(-sum(lengths) // (BUDGET * num_ranks))
    assert least <= num_steps <= -(-2 * least // multiple_of) * multiple_of
    # similar bins meet in one step: none of a later step has more work than one of an earlier step
    steps = [bin_works([list(step)], lengths, work) for step in zip(*bins, strict=True)]
    assert all(min(step) >= max(later) for step, later in zip(steps, steps[1:], strict=False))
    # ranks differ in all they do by no more than the largest bin
    totals = [sum(bin_works([rank], lengths, work)) for rank in bins]
    assert max(totals) - min(totals) <= max(bin_works(bins, lengths, work))


@given(batches(), works, st.randoms(use_true_random=False))
def test_the_order_of_the_sequences_does_not_matter(batch, work, random):
    lengths, num_ranks, multiple_of = batch
    shuffled = random.sample(lengths, len(lengths))
    expected, actual = (
        bin_works(pack_sequences(order, work, num_ranks, BUDGET, multiple_of), order, work)
        for order in (lengths, shuffled)
    )
    assert actual == expected


SQUARES = SequenceWork(linear=0.0, attention=2.0)


@pytest.mark.parametrize(
    ("lengths", "work", "num_ranks", "budget", "bins"),
    [
        # longest first: 6 | 5, then 4 joins the 5, 3 joins the 6
        ([3, 6, 4, 5], TOKENS, 1, 9, [[[0, 1], [2, 3]]]),
        ([3, 6, 4, 5], TOKENS, 2, 9, [[[0, 1]], [[2, 3]]]),
        # one micro-batch where all fits
        ([4, 4, 4, 4], TOKENS, 2, 8, [[[0, 2]], [[1, 3]]]),
        # sequences as long as the budget
        ([8, 8, 8, 8], TOKENS, 2, 8, [[[0], [2]], [[1], [3]]]),
        # by work 6 | 4 4 are 36 and 32, but 4 + 4 leave only 2 tokens: the 3 joins the 6
        ([6, 4, 4, 3], SQUARES, 1, 10, [[[0, 3], [1, 2]]]),
        # one of 8 costs as much as four of 4 in attention: the balance is 8 | 4 4 4 4, not 8 4 | 4 4 4
        ([8, 4, 4, 4, 4], SQUARES, 2, 16, [[[0]], [[1, 2, 3, 4]]]),
        ([8, 4, 4, 4, 4], TOKENS, 2, 16, [[[0, 3]], [[1, 2, 4]]]),
    ],
)
def test_literal_packing(lengths, work, num_ranks, budget, bins):
    assert pack_sequences(lengths, work, num_ranks, budget) == bins


def test_a_multiple_of_micro_batches():
    assert [len(rank) for rank in pack_sequences([4] * 16, TOKENS, 2, 32, 4)] == [4, 4]
    # 80 tokens need 5 x 2 bins of 8, rounded to 6, but no bin holds two: the next multiple is 8
    assert [len(rank) for rank in pack_sequences([5] * 16, TOKENS, 2, 8, 2)] == [8, 8]


TOO_LONG = "--max-tokens-per-gpu 8: raise the budget or shorten the completions"
FEW = "3 sequences cannot feed 4 data-parallel ranks"
EMPTY = "micro-batches of 8 tokens on each of 4 data-parallel ranks: their number should be a multiple of"


@pytest.mark.parametrize(
    ("lengths", "multiple_of", "message"),
    [
        ([3, 9, 4, 4], 1, f"sample 1 has 9 tokens, more than {TOO_LONG}"),
        ([1, 1, 1], 1, FEW),
        ([1, 1, 1], 2, f"{FEW} with 2 micro-batches each"),
        # full sequences, more than the bins of one step and too few for those of the next
        ([8] * 5, 1, f"5 sequences cannot fill 2 {EMPTY} the ranks"),
        ([8] * 13, 2, f"13 sequences cannot fill 4 {EMPTY} ranks x 2"),
    ],
)
def test_what_cannot_be_packed_is_refused(lengths, multiple_of, message):
    with pytest.raises(ValueError) as error:
        pack_sequences(lengths, TOKENS, 4, 8, multiple_of)
    assert str(error.value) == message


def test_work_of_a_model():
    """Two layers, counted by hand: hidden 4, 2 heads of 3 on 1 group, 5 experts of 7, 2 a token, 11 words."""
    work = SequenceWork.of_model(
        num_layers=2, hidden_size=4, num_heads=2, num_query_groups=1, head_dim=3,
        ffn_hidden_size=7, topk=2, num_experts=5, vocab_size=11,
    )  # fmt: skip
    query, key, value, output, router, expert = 4 * 6, 4 * 3, 4 * 3, 6 * 4, 4 * 5, 3 * 4 * 7
    assert work.linear == 2 * (2 * (query + key + value + output + router + 2 * expert) + 4 * 11)
    scores = weighted_values = 2 * 2 * 3  # multiply and add, heads, head_dim
    assert work.attention == 2 * (scores + weighted_values)
    assert work.of(10) == work.linear * 10 + work.attention * 50


def test_work_of_qwen3_30b_a3b():
    """3.3 billion active parameters, of which the input embedding's 0.3 are looked up, not multiplied."""
    assert QWEN3_30B_A3B.linear / 2 == pytest.approx(3.03e9, rel=0.01)


def test_stats_of_a_packing():
    lengths = [3, 1, 2, 2]

    def stats(bins):
        return packing_stats(bins, lengths, 4 * len(lengths), TOKENS)

    assert stats([[[0], [1]], [[2], [3]]]).padding_share == 1 - 8 / 16
    # steps (3, 2) and (1, 2): the slowest take 3 + 2, the mean is 2.5 + 1.5, though both ranks have 4 tokens
    assert stats([[[0], [1]], [[2], [3]]]).imbalance == 5 / 4 - 1
    assert stats([[[0, 2]], [[1, 3]]]).imbalance == 5 / 4 - 1
    assert stats([[[0, 1, 2, 3]]]).imbalance == 0
    assert packing_stats([[[0]], [[2, 3]]], lengths, 12, SQUARES).imbalance == 9 / 8.5 - 1


def long_tailed_lengths(count: int, longest: int) -> list[int]:
    draws = np.random.default_rng(0).lognormal(np.log(longest / 8), 1.0, count)
    return [int(n) for n in np.clip(draws, 16, longest)]


@pytest.mark.parametrize("longest", [16_384, 32_768])
def test_balance_by_work_beats_balance_by_tokens(longest):
    lengths = long_tailed_lengths(512, longest)
    imbalances = {}
    for name, balanced_by in (("work", QWEN3_30B_A3B), ("tokens", TOKENS)):
        bins = pack_sequences(lengths, balanced_by, 8, 40_960)
        imbalances[name] = packing_stats(bins, lengths, sum(lengths), QWEN3_30B_A3B).imbalance
        print(f"up to {longest} tokens, {len(bins[0])} steps, by {name}: imbalance {imbalances[name]:.1%}")
    assert imbalances["work"] < 0.5 * imbalances["tokens"]


def test_a_large_batch_packs_at_once():
    lengths = long_tailed_lengths(2048, 16_384)
    started = time.perf_counter()
    bins = pack_sequences(lengths, QWEN3_30B_A3B, 16, 20_480)
    print(f"2,048 sequences, {len(flat(bins))} bins: {time.perf_counter() - started:.3f} s")
    assert time.perf_counter() - started < 1.0
