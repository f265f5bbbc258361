"""The flat fields of a pack."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_vespo.data.context_parallel import TokenLayout
from megatron_vespo.data.micro_batch import MicroBatch, build_micro_batch
from megatron_vespo.types import WRITERS, Segments, TrainingSample
from tests.support.builders import make_sample, make_segments, make_supports


def sample(prompt: list[int], completion: list[int], log_probs=None, **fields) -> TrainingSample:
    log_probs = [-1.0] * len(completion) if log_probs is None else log_probs
    return make_sample(prompt, completion, behavior_log_probs=np.array(log_probs, np.float32), **fields)


SAMPLES = [
    sample([90], [91]),
    sample([11, 12], [13, 14, 15], log_probs=[-0.25, -0.5, -0.75], advantage=-1.5, temperature=0.5),
    sample([21, 22, 23], [24], log_probs=[-2.0], advantage=0.5, temperature=2.0),
]


def pack_of(samples, indices, multiple=1, layout=None, extra=0, num_experts=None) -> MicroBatch:
    layout = layout or TokenLayout(sequence_parallel_size=multiple)
    num_tokens = layout.padded_pack(sum(layout.padded_length(samples[i].num_tokens) for i in indices)) + extra
    return build_micro_batch(samples, list(indices), num_tokens, layout, num_experts)


def test_two_samples_literally():
    pack = pack_of(SAMPLES, [2, 1], 1)
    #                                 sequence 0: 3 + 1  | sequence 1: 2 + 3
    assert pack.tokens_T.tolist() == [21, 22, 23, 24, 11, 12, 13, 14, 15]
    assert pack.labels_T.tolist() == [0, 0, 24, 0, 0, 13, 14, 15, 0]
    assert pack.loss_mask_T.tolist() == [0, 0, 1, 0, 0, 1, 1, 1, 0]
    assert pack.behavior_log_probs_T.tolist() == [0, 0, -2.0, 0, 0, -0.25, -0.5, -0.75, 0]
    assert pack.position_ids_T.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4]
    assert pack.sequence_ids_T.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1]
    assert pack.temperature_T.tolist() == [2.0] * 4 + [0.5] * 5
    assert pack.cu_seqlens.tolist() == [0, 4, 9]
    assert pack.max_seqlen == 5
    assert pack.advantages_S.tolist() == [0.5, -1.5]
    assert pack.sample_indices == [2, 1]
    assert pack.loss_positions.tolist() == [2, 5, 6, 7]
    assert (pack.num_sequences, pack.num_loss_tokens) == (2, 4)
    assert pack.old_log_probs_T is None and pack.routed_experts_T is None
    for name in ("tokens_T", "labels_T", "position_ids_T", "sequence_ids_T"):
        assert getattr(pack, name).dtype == torch.int64, name
    for name in ("loss_mask_T", "temperature_T", "behavior_log_probs_T", "advantages_S"):
        assert getattr(pack, name).dtype == torch.float32, name
    assert pack.cu_seqlens.dtype == torch.int32


def test_padding_is_a_masked_segment_of_its_own():
    pack = pack_of(SAMPLES, [2, 1], 4)
    bare = pack_of(SAMPLES, [2, 1], 1)
    assert len(pack.tokens_T) == 12
    assert pack.cu_seqlens.tolist() == [0, 4, 9, 12]
    assert pack.position_ids_T[9:].tolist() == [5, 6, 7]  # no token of the sequence has these
    assert pack.sequence_ids_T[9:].tolist() == [1, 1, 1]
    assert pack.temperature_T[9:].tolist() == [1.0] * 3
    for name in ("tokens_T", "labels_T", "loss_mask_T", "behavior_log_probs_T"):
        field_T = getattr(pack, name)
        assert field_T[9:].tolist() == [0] * 3, name
        assert field_T[:9].equal(getattr(bare, name)), name
    assert (pack.num_sequences, pack.num_loss_tokens) == (2, 4)


def test_padding_of_none_and_padding_longer_than_every_sequence():
    whole, padded = pack_of(SAMPLES, [2], 4), pack_of(SAMPLES, [0], 8)
    assert whole.cu_seqlens.tolist() == [0, 4] and len(whole.tokens_T) == 4
    assert padded.cu_seqlens.tolist() == [0, 2, 8] and padded.max_seqlen == 6


@st.composite
def training_samples(draw):
    lengths = draw(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6)), min_size=1, max_size=5))
    first_token = 1
    made = []
    for prompt_length, completion_length in lengths:
        tokens = list(range(first_token, first_token + prompt_length + completion_length))
        first_token += len(tokens)
        log_probs = [-float(token) for token in tokens[prompt_length:]]
        made.append(sample(tokens[:prompt_length], tokens[prompt_length:], log_probs, advantage=len(made)))
    return made


HOLES = [
    sample([11, 12], [13, 14, 15, 16, 17], [-0.25, -0.5, -0.75], segments=make_segments(1, 2, 2)),
    sample([21], [22, 23, 24], [-2.0], segments=make_segments(0, 1, 1, 1)),
]


def test_given_tokens_enter_and_are_no_labels():
    pack = pack_of(HOLES, [1, 0])
    #                                 prompt, given, sampled, given | 2 prompt, sampled, 2 given, 2 sampled
    assert pack.tokens_T.tolist() == [21, 22, 23, 24, 11, 12, 13, 14, 15, 16, 17]
    assert pack.labels_T.tolist() == [0, 23, 0, 0, 0, 13, 0, 0, 16, 17, 0]
    assert pack.loss_mask_T.tolist() == [0, 1, 0, 0, 0, 1, 0, 0, 1, 1, 0]
    assert pack.behavior_log_probs_T.tolist() == [0, -2.0, 0, 0, 0, -0.25, 0, 0, -0.5, -0.75, 0]
    assert pack.position_ids_T.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6]
    assert pack.loss_positions.tolist() == [1, 5, 8, 9]
    assert pack.num_tokens_S.tolist() == [1, 3]
    assert (pack.num_sequences, pack.num_loss_tokens) == (2, 4)


def test_context_parallelism_cuts_given_tokens_like_others():
    parts = [pack_of(HOLES, [1, 0], layout=TokenLayout(2, rank)) for rank in range(2)]
    # 4 tokens need no padding, 7 are padded to 8; rank 0 has the outer quarters
    assert parts[0].tokens_T.tolist() == [21, 24, 11, 12, 17, 0]
    assert parts[1].tokens_T.tolist() == [22, 23, 13, 14, 15, 16]
    assert parts[0].labels_T.tolist() == [0, 0, 0, 13, 0, 0]
    assert parts[1].labels_T.tolist() == [23, 0, 0, 0, 16, 17]
    assert parts[0].loss_positions.tolist() == [3]
    assert parts[1].loss_positions.tolist() == [0, 4, 5]
    assert parts[1].behavior_log_probs_T.tolist() == [-2.0, 0, 0, 0, -0.5, -0.75]
    for part in parts:
        assert part.num_tokens_S.tolist() == [1, 3]  # of the whole sequences


spans = st.lists(st.tuples(st.sampled_from(WRITERS), st.integers(1, 4)), min_size=1, max_size=6)


@given(
    st.lists(st.tuples(st.integers(1, 4), spans), min_size=1, max_size=4),
    st.sampled_from([(1, 1), (2, 1), (4, 2)]),
)
def test_fields_of_samples_with_holes_are_those_placed_by_hand(shapes, layout):
    samples, by_hand = (
        [],
        [],
    )  # of each token but a sequence's first: (position in the sample, field -> value)
    for number, (prompt, of_sample) in enumerate(shapes):
        segments = Segments.joined([Segments.single("policy", 1), *(Segments.single(*s) for s in of_sample)])
        writers = ["policy"] + [writer for writer, length in of_sample for _ in range(length)]
        sampled = [prompt + i for i, writer in enumerate(writers) if writer == "policy"]
        tokens = [1000 * (number + 1) + i for i in range(prompt + len(writers))]
        made = sample(
            tokens[:prompt],
            tokens[prompt:],
            [-float(t) for t in sampled],
            segments=segments,
            advantage=number,
        )
        made.old_log_probs = np.array([-0.5 * t for t in sampled], np.float32)
        samples.append(made)
        by_hand += [(tokens[t - 1], tokens[t], -float(t), -0.5 * t) for t in sampled]
    context, sequence = layout
    packs = [
        pack_of(samples, range(len(samples)), layout=TokenLayout(context, rank, sequence))
        for rank in range(context)
    ]
    found = []
    for pack in packs:
        trained = pack.loss_mask_T > 0
        assert pack.loss_positions.equal(trained.nonzero()[:, 0])
        rows = (pack.tokens_T, pack.labels_T, pack.behavior_log_probs_T, pack.old_log_probs_T)
        found += zip(*(row[trained].tolist() for row in rows), strict=True)
        for row in rows[1:]:
            assert not row[~trained].any()
        assert pack.num_tokens_S.tolist() == [len(s.behavior_log_probs) for s in samples]
    assert sorted(found) == sorted(by_hand)


def test_log_probs_for_given_tokens_do_not_pass():
    broken = sample([1, 2], [3, 4, 5], log_probs=[-1.0, -1.0, -1.0], segments=make_segments(1, 1, 1))
    with pytest.raises(ValueError, match="broadcast"):
        pack_of([broken], [0])


def test_supports_lie_in_the_order_of_the_positions_that_predict():
    """A token of a sequence without supports has the whole vocabulary; given tokens have none to count."""
    samples = [
        sample([11, 12], [13, 14, 15, 16], [-1.0] * 3, segments=make_segments(1, 1, 2)),
        sample([21], [22, 23]),
        sample([31], [32, 33, 34, 35]),
    ]
    samples[0].supports = make_supports([13], [15, 99], [1, 2, 16])
    samples[2].supports = make_supports([32, 40], [33], [34, 41, 42], [35])
    pack = pack_of(samples, [2, 1, 0], extra=3)
    assert pack.labels_T[pack.loss_positions].tolist() == [32, 33, 34, 35, 22, 23, 13, 15, 16]
    assert pack.support_counts.tolist() == [2, 1, 3, 1, 0, 0, 1, 2, 3]
    assert pack.support_ids.tolist() == [32, 40, 33, 34, 41, 42, 35, 13, 15, 99, 1, 2, 16]
    assert pack.support_counts.dtype == pack.support_ids.dtype == torch.int32

    parts = [pack_of(samples, [2, 1, 0], layout=TokenLayout(2, rank)) for rank in range(2)]
    labels = [part.labels_T[part.loss_positions].tolist() for part in parts]
    assert labels == [[32, 33, 22, 13], [34, 35, 23, 15, 16]]  # the outer quarters, the inner ones
    assert [part.support_counts.tolist() for part in parts] == [[2, 1, 0, 1], [3, 1, 0, 2, 3]]
    assert parts[0].support_ids.tolist() == [32, 40, 33, 13]
    assert parts[1].support_ids.tolist() == [34, 41, 42, 35, 15, 99, 1, 2, 16]

    without = pack_of(samples, [1])
    assert without.support_counts is None and without.support_ids is None


def test_supports_travel_and_count_with_the_pack():
    samples = [sample([1], [2, 3], supports=make_supports([2], [3, 4]))]
    pack = pack_of(samples, [0])
    moved = pack.on(torch.device("meta"))
    assert moved.support_counts.device.type == moved.support_ids.device.type == "meta"
    assert pack.nbytes - pack_of([sample([1], [2, 3])], [0]).nbytes == 4 * (2 + 3)


@given(training_samples(), st.sampled_from([1, 2, 8]))
def test_every_completion_token_is_predicted_once_by_its_predecessor(samples, multiple):
    order = list(range(len(samples)))[::-1]
    pack = pack_of(samples, order, multiple)
    assert len(pack.tokens_T) % multiple == 0
    # cu_seqlens cut the samples out again
    for s, (start, end) in zip(range(len(order)), pairwise(pack.cu_seqlens.tolist()), strict=False):
        assert pack.tokens_T[start:end].tolist() == samples[order[s]].token_ids.tolist()
        assert set(pack.sequence_ids_T[start:end].tolist()) == {s}
        assert pack.advantages_S[s] == order[s]
    where = pack.loss_mask_T.nonzero()[:, 0]
    completions = [t for i in order for t in samples[i].token_ids[samples[i].prompt_length :].tolist()]
    assert pack.labels_T[where].tolist() == completions
    # tokens count up, so the predecessor is one less: no label comes over a boundary
    assert (pack.tokens_T[where] + 1).equal(pack.labels_T[where])
    assert pack.tokens_T[where + 1].equal(pack.labels_T[where])
    assert pack.sequence_ids_T[where].equal(pack.sequence_ids_T[where + 1])
    assert pack.behavior_log_probs_T[where].tolist() == [-float(token) for token in completions]


def test_a_wrong_number_of_log_probs_does_not_pass():
    broken = sample([1, 2], [3, 4], log_probs=[-1.0, -1.0, -1.0])
    with pytest.raises(ValueError, match="broadcast"):
        pack_of([broken], [0], 1)


def test_a_longer_pack_only_has_more_padding():
    pack, longer = pack_of(SAMPLES, [2, 1]), pack_of(SAMPLES, [2, 1], extra=5)
    assert longer.cu_seqlens.tolist() == [0, 4, 9, 14]
    for name in ("tokens_T", "labels_T", "loss_mask_T", "sequence_ids_T", "behavior_log_probs_T"):
        assert getattr(longer, name)[:9].equal(getattr(pack, name)), name
    assert longer.loss_positions.equal(pack.loss_positions)


def test_old_log_probs_lie_like_the_engines():
    samples = [sample([1, 2], [3, 4]), sample([5], [6])]
    samples[0].old_log_probs = np.array([-3.0, -4.0], np.float32)
    assert pack_of(samples, [0, 1]).old_log_probs_T is None  # one without: nothing to measure against
    samples[1].old_log_probs = np.array([-6.0], np.float32)
    assert pack_of(samples, [1, 0]).old_log_probs_T.tolist() == [-6.0, 0, 0, -3.0, -4.0, 0]


def test_context_parallelism_cuts_every_field_alike():
    """Both ranks together hold what one rank would, and each label still follows its token."""
    whole = pack_of(SAMPLES, [2, 1], layout=TokenLayout(1, 0))
    parts = [pack_of(SAMPLES, [2, 1], layout=TokenLayout(2, rank)) for rank in range(2)]
    # 4 tokens need no padding, 5 are padded to 8; rank 0 has the outer quarters
    assert parts[0].cu_seqlens.tolist() == parts[1].cu_seqlens.tolist() == [0, 4, 12]
    assert parts[0].tokens_T.tolist() == [21, 24, 11, 12, 0, 0]
    assert parts[1].tokens_T.tolist() == [22, 23, 13, 14, 15, 0]
    assert parts[0].labels_T.tolist() == [0, 0, 0, 13, 0, 0]
    assert parts[1].labels_T.tolist() == [0, 24, 14, 15, 0, 0]
    assert parts[1].position_ids_T.tolist() == [1, 2, 2, 3, 4, 5]
    assert sum(part.num_loss_tokens for part in parts) == whole.num_loss_tokens
    for part in parts:
        assert part.loss_positions.equal(part.loss_mask_T.nonzero()[:, 0])
        assert part.advantages_S.tolist() == [0.5, -1.5]  # per-sequence fields are not cut


def test_routes_are_cut_like_the_tokens():
    routed = [sample([1, 2, 3], [4, 5]), sample([6], [7])]
    for s in routed:  # the expert is the token, in two layers
        s.routed_experts = np.stack([np.stack([s.token_ids[:-1]] * 2, 1)] * 2, 2).astype(np.uint8)
        s.routed_experts[..., 1] += 10
    for layout in (TokenLayout(), TokenLayout(2, 0), TokenLayout(2, 1, 2)):
        pack = pack_of(routed, [1, 0], layout=layout, num_experts=20)
        assert pack.routed_experts_T.dtype == torch.uint8
        assert pack.routed_experts_T.shape == (len(pack.tokens_T), 2, 2)
        known = torch.isin(pack.tokens_T, torch.tensor([1, 2, 3, 4, 6]))  # all but the last ones and padding
        tokens = pack.tokens_T[known]
        assert pack.routed_experts_T[known, 0].tolist() == [[t, t + 10] for t in tokens.tolist()]
        assert pack.routed_experts_T[known, 1].tolist() == [[t, t + 10] for t in tokens.tolist()]
        for filler in pack.routed_experts_T[~known].flatten(0, 1).tolist():
            assert len(set(filler)) == 2 and max(filler) < 20
    assert pack_of(routed, [0]).routed_experts_T is None  # nobody asked
    assert pack_of(routed, [0, 1], num_experts=20).replays_S is None  # all do


def test_a_sequence_without_routes_leaves_those_of_the_others_in_their_places():
    free, routed = sample([1, 2, 3], [4, 5]), sample([6], [7])
    free.replays = False
    routed.routed_experts = np.full((1, 2, 2), [8, 9], np.uint8)
    pack = pack_of([free, routed], [0, 1], num_experts=20)
    assert pack.replays_S.tolist() == [False, True]
    assert pack.routed_experts_T[pack.tokens_T == 6].tolist() == [[[8, 9], [8, 9]]]
    alone = pack_of([free, routed], [0], num_experts=20)
    assert alone.replays_S.tolist() == [False] and alone.routed_experts_T is None
    assert pack_of([free, routed], [0]).replays_S is None  # nobody asked
