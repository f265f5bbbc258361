"""Shards of all data-parallel ranks: the packs that each rank cuts from all samples, from its own alone."""

import dataclasses
import pickle

import numpy as np
import pytest

from megatron_vespo.data.context_parallel import TokenLayout
from megatron_vespo.data.micro_batch import build_micro_batch
from megatron_vespo.data.packing import PackingRule, SequenceWork, pack_sequences, packing_stats
from megatron_vespo.data.shards import MiniBatchOutline, Shard
from megatron_vespo.types import TokenSupports, TrainingSample, VersionSpans
from tests.support.builders import make_sample, make_segments, make_supports

WORK = SequenceWork(linear=7.0, attention=0.01)
MAX_TOKENS = 128
LENGTHS = {
    "equal": lambda draw, n: np.full(n, 20),
    "uniform": lambda draw, n: draw.integers(2, MAX_TOKENS, n),
    "long tail": lambda draw, n: np.clip(draw.lognormal(2.5, 1.0, n), 2, MAX_TOKENS - 8).astype(int),
    "short but for one": lambda draw, n: np.where(np.arange(n) == n // 2, MAX_TOKENS - 8, 3),
    "full packs": lambda draw, n: draw.choice([MAX_TOKENS // 2, MAX_TOKENS // 4], n),
}
# (data-parallel ranks, context parallel, sequence parallel, multiple of packs, equal packs)
LAYOUTS = [
    (1, 1, 1, 1, False),
    (2, 1, 1, 1, False),
    (4, 1, 2, 1, True),
    (2, 2, 2, 2, False),
    (8, 4, 1, 1, True),
]


def rule(layout: tuple) -> PackingRule:
    ranks, context, sequence, multiple, equal = layout
    return PackingRule(WORK, ranks, MAX_TOKENS * context, TokenLayout(context, 0, sequence), multiple, equal)


def samples(lengths: np.ndarray, draw: np.random.Generator, routes: bool = False) -> list[TrainingSample]:
    made = []
    for group, length in enumerate(lengths.tolist()):
        prompt = int(draw.integers(1, length))
        completion = length - prompt
        made.append(
            make_sample(
                draw.integers(0, 1000, prompt),
                draw.integers(0, 1000, completion),
                behavior_log_probs=-draw.random(completion, np.float32),
                policy_versions=VersionSpans.of(draw.integers(0, 3, completion)),
                advantage=float(draw.normal()),
                reward=float(draw.normal()),
                temperature=float(draw.random()) + 0.5,
                group_id=group // 4,
                routed_experts=draw.integers(0, 8, (length - 1, 2, 2)).astype(np.uint8) if routes else None,
                routes_version=3 if routes else None,
                replays=bool(draw.integers(0, 2)),
            )
        )
    return [with_hole(one) if i % 3 == 0 and one.completion_length > 2 else one for i, one in enumerate(made)]


def with_hole(sample: TrainingSample) -> TrainingSample:
    """Its second token and the last are given."""
    segments = make_segments(1, 1, sample.completion_length - 3, 1)
    number = segments.num_sampled
    return dataclasses.replace(
        sample,
        segments=segments,
        behavior_log_probs=sample.behavior_log_probs[:number],
        policy_versions=VersionSpans.of(sample.policy_versions.array()[:number]),
    )


def bins_before(lengths: list[int], layout: tuple) -> tuple[list, list]:
    """The cut as the trainer made it when every rank had all samples."""
    ranks, context, sequence, multiple, equal = layout
    tokens_of = TokenLayout(context, 0, sequence)
    padded = [tokens_of.padded_length(length) for length in lengths]
    bins = pack_sequences(padded, WORK, ranks, MAX_TOKENS * context, multiple)
    tokens = [[tokens_of.padded_pack(sum(padded[i] for i in pack)) for pack in rank] for rank in bins]
    if equal:
        tokens = [[max(step) for step in zip(*tokens, strict=True)]] * len(tokens)
    return bins, tokens


def received(shard: Shard) -> dict[int, TrainingSample]:
    """The samples as a rank has them: out-of-band buffers are not copied."""
    buffers: list[pickle.PickleBuffer] = []
    packed = pickle.dumps(shard, protocol=5, buffer_callback=buffers.append)
    return pickle.loads(packed, buffers=[bytes(buffer) for buffer in buffers]).samples()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("distribution", LENGTHS)
@pytest.mark.parametrize("seed", range(4))
def test_shards_give_the_packs_that_all_samples_gave(distribution, layout, seed):
    draw = np.random.default_rng(seed)
    lengths = LENGTHS[distribution](draw, 64)
    routed = seed % 2 == 0
    batch = samples(lengths, draw, routed)
    outline = MiniBatchOutline.of(batch, rule(layout))
    bins, tokens = bins_before(lengths.tolist(), layout)
    assert (outline.cut.bins, outline.cut.pack_tokens) == (bins, tokens)
    assert outline.cut.stats == packing_stats(bins, lengths.tolist(), sum(map(sum, tokens)), WORK)
    placed = []
    for rank in range(layout[0]):
        own = received(Shard.of(batch, outline.cut.of_rank(rank)))
        placed += own
        context, experts = TokenLayout(layout[1], rank % layout[1], layout[2]), 8 if routed else None
        for indices, num_tokens in zip(bins[rank], tokens[rank], strict=True):
            packs = [
                build_micro_batch(whole, indices, num_tokens, context, experts) for whole in (batch, own)
            ]
            compare(*map(vars, packs))
    assert sorted(placed) == list(range(64)), "each sample is on one rank"


def compare(before: dict, now: dict) -> None:
    for name, value in before.items():
        if hasattr(value, "numpy"):
            np.testing.assert_array_equal(now[name].numpy(), value.numpy(), strict=True, err_msg=name)
        else:
            assert now[name] == value, name


def test_every_field_of_a_sample_arrives():
    batch = samples(np.array([5, 9, 4]), np.random.default_rng(0), routes=True)
    batch[1].old_log_probs = np.float32([-0.5, -1.5])
    batch[0].supports = make_supports(*[[1, 2, 3]] * batch[0].num_trained)
    batch[2].supports = make_supports(*[[4]] * (batch[2].num_trained - 1), [4, 5])
    batch[1] = with_hole(dataclasses.replace(batch[1], prompt_length=2))
    batch[1].token_advantages = np.float32([0.25, -1.0, 0.5, 0.0])  # the others have none
    batch[1].reference_log_probs = np.float32([-0.5, -1.0, -2.0, -4.0])
    assert batch[1].num_trained < batch[1].completion_length
    arrived = received(Shard.of(batch, [2, 1, 0]))
    assert sorted(arrived) == [0, 1, 2]
    for index, sample in arrived.items():
        for field in dataclasses.fields(TrainingSample):
            ours, theirs = getattr(batch[index], field.name), getattr(sample, field.name)
            if isinstance(ours, TokenSupports):
                for name in ("counts", "token_ids"):
                    np.testing.assert_array_equal(getattr(theirs, name), getattr(ours, name), strict=True)
                continue
            np.testing.assert_array_equal(theirs, ours, err_msg=field.name)
            assert type(theirs) is type(ours) and getattr(theirs, "dtype", 0) == getattr(ours, "dtype", 0)


def test_every_rank_knows_a_few_numbers_of_all_samples():
    batch = samples(np.array([5, 9, 4, 7]), np.random.default_rng(1))
    outline = MiniBatchOutline.of(batch, rule((2, 1, 1, 1, False)))
    for known, sample in zip(outline.samples, batch, strict=True):
        for name in ("num_tokens", "prompt_length", "completion_length", "group_id", "segments"):
            assert getattr(known, name) == getattr(sample, name)
        assert known.num_trained == sample.num_trained
        assert known.sampled_mask().tolist() == sample.sampled_mask().tolist()
        assert known.policy_versions == sample.policy_versions
    expected = np.array([[sample.advantage > 0, sample.advantage < 0] for sample in batch], np.float64)
    np.testing.assert_array_equal(outline.sign_shares, expected, strict=True)


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        (make_segments(1, 1, 1), "sample 1 (group 0) has segments of 3 tokens for 4 tokens after the prompt"),
        (
            make_segments(0, 4),
            "sample 1 (group 0) has no token that the policy sampled: nothing of it can be",
        ),
    ],
)
def test_samples_without_a_sampled_token_are_refused_before_they_are_sent(segments, message):
    batch = [make_sample(3, 4), make_sample(3, 4, segments=segments)]
    with pytest.raises(ValueError) as raised:
        MiniBatchOutline.of(batch, rule(LAYOUTS[0]))
    assert str(raised.value).startswith(message)


def test_a_shard_has_eight_bytes_per_sampled_token_and_four_per_other_one():
    """Whatever the number of ranks, their shards together are the batch: nothing is sent twice."""
    lengths = np.random.default_rng(2).integers(20, 100, 256)
    batch = samples(lengths, np.random.default_rng(3))
    expected = sum(4 * s.num_tokens + 4 * s.num_trained for s in batch)
    for ranks in (1, 4, 16):
        cut = MiniBatchOutline.of(batch, rule((ranks, 1, 1, 1, False))).cut
        shards = [Shard.of(batch, cut.of_rank(rank)) for rank in range(ranks)]
        assert sum(shard.nbytes for shard in shards) == expected
        assert max(shard.nbytes for shard in shards) < 1.25 * expected / ranks
        # beside the columns a sample has a few numbers
        pickled = [len(pickle.dumps(shard, protocol=5, buffer_callback=lambda _: None)) for shard in shards]
        assert sum(pickled) < 250 * len(batch) + 3000 * ranks


def test_supports_cost_four_bytes_per_id_and_per_token():
    plain = [make_sample(3, 4), make_sample(3, 5)]
    restricted = [dataclasses.replace(plain[0], supports=make_supports(*[[1, 5]] * 4)), plain[1]]
    before, after = (Shard.of(batch, [0, 1]).nbytes for batch in (plain, restricted))
    assert after - before == 4 * (4 + 8)


def test_one_version_costs_the_same_at_any_length():
    def size(length: int) -> int:
        batch = [make_sample(1, length, policy_versions=VersionSpans.single(3, length))]
        return len(pickle.dumps(Shard.of(batch, [0]), protocol=5, buffer_callback=lambda _: None))

    assert size(10_000) - size(10) < 16


@pytest.mark.parametrize(
    ("prompt", "completion", "message"),
    [
        (0, 3, "sample 1 .group 9. has 3 tokens, 0 of them prompt: both"),
        (3, 0, "sample 1 .group 9. has 3 tokens, 3 of them prompt: both"),
        (100, 157, "sample 1 .group 9. has 257 tokens, more than --max-tokens-per-gpu x --context-parallel"),
    ],
)
def test_a_length_that_cannot_be_trained_on_is_refused_before_anything_is_sent(prompt, completion, message):
    batch = [make_sample(), make_sample(prompt, completion, group_id=9)]
    with pytest.raises(ValueError, match=f"^{message}"):
        MiniBatchOutline.of(batch, rule((1, 2, 1, 1, False)))
