"""Conversion of single parameters."""

import pytest
import torch

from megatron_vespo.models.mappings import QKV, Direct, GatedMLP, Vocabulary

SIZES = (1, 2, 4)


def rows(number: int, width: int, first: int = 0) -> torch.Tensor:
    """Every element different."""
    return torch.arange(first, first + number * width, dtype=torch.float32).view(number, width)


def assert_round_trip(mapping, tensors: list[torch.Tensor], size: int) -> list[torch.Tensor]:
    shards = mapping.shard(tensors, size)
    assert len(shards) == size
    assert len({shard.shape for shard in shards}) == 1
    merged = mapping.merge([shard.clone() for shard in shards])
    assert list(merged) == list(mapping.hf_names)
    for name, tensor in zip(mapping.hf_names, tensors, strict=True):
        assert merged[name].dtype == tensor.dtype
        assert merged[name].equal(tensor), name
    return shards


@pytest.mark.parametrize("size", SIZES)
def test_replicated(size):
    tensor = rows(8, 3)
    shards = assert_round_trip(Direct(("norm",), None), [tensor], size)
    assert all(shard.equal(tensor) for shard in shards)


@pytest.mark.parametrize("size", SIZES)
def test_cut_by_rows_and_by_columns(size):
    tensor = rows(8, 12)
    by_rows = assert_round_trip(Direct(("a",), 0), [tensor], size)
    by_columns = assert_round_trip(Direct(("a",), 1), [tensor], size)
    height, width = 8 // size, 12 // size
    for r in range(size):
        assert by_rows[r].equal(tensor[r * height : (r + 1) * height])
        assert by_columns[r].equal(tensor[:, r * width : (r + 1) * width])


@pytest.mark.parametrize("size", SIZES)
def test_every_rank_stacks_its_gate_over_its_up(size):
    gate, up = rows(8, 3), rows(8, 3, first=1000)
    shards = assert_round_trip(GatedMLP(("gate", "up")), [gate, up], size)
    part = 8 // size
    for r, shard in enumerate(shards):
        mine = slice(r * part, (r + 1) * part)
        assert shard[:part].equal(gate[mine])
        assert shard[part:].equal(up[mine])


@pytest.mark.parametrize(
    ("heads", "groups", "head_dim"), [(4, 4, 3), (8, 4, 2), (16, 4, 5), (32, 4, 128), (12, 4, 1)]
)
@pytest.mark.parametrize("size", SIZES)
def test_qkv_rows_are_where_megatron_reads_them(heads, groups, head_dim, size):
    """Megatron views a shard as [groups, heads a group + 2, head_dim]: a group's queries, key, value."""
    width = 2
    q = rows(heads * head_dim, width)
    k = rows(groups * head_dim, width, first=100_000)
    v = rows(groups * head_dim, width, first=200_000)
    per_group = heads // groups
    shards = assert_round_trip(QKV(("q", "k", "v"), groups, per_group, head_dim), [q, k, v], size)
    groups_here = groups // size
    for r, shard in enumerate(shards):
        assert shard.shape == (groups_here * (per_group + 2) * head_dim, width)
        row = 0
        for group in range(r * groups_here, (r + 1) * groups_here):
            for source, first_head, count in (
                (q, group * per_group, per_group),
                (k, group, 1),
                (v, group, 1),
            ):
                for source_row in range(first_head * head_dim, (first_head + count) * head_dim):
                    assert shard[row].equal(source[source_row])
                    row += 1


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("vocab_size", "padded"), [(37, 40), (40, 40), (33, 40)])
def test_vocabulary_is_padded_with_zero_rows(size, vocab_size, padded):
    embedding = rows(vocab_size, 3, first=1)
    mapping = Vocabulary(("embed",), 0, vocab_size=vocab_size, padded_vocab_size=padded)
    shards = assert_round_trip(mapping, [embedding], size)
    assert shards[0].shape == (padded // size, 3)
    whole = torch.cat(shards)
    assert whole[:vocab_size].equal(embedding)
    assert (whole[vocab_size:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bits_survive(dtype):
    """NaN payloads, negative zero, subnormals: nothing is computed on the way."""
    integer = torch.int16 if dtype == torch.bfloat16 else torch.int32
    generator = torch.Generator().manual_seed(0)
    limits = torch.iinfo(integer)
    bits = torch.randint(limits.min, limits.max, (24, 4), dtype=integer, generator=generator)
    q, k, v = bits.view(dtype).split([16, 4, 4])
    merged = QKV(("q", "k", "v"), 4, 4, 1).merge(QKV(("q", "k", "v"), 4, 4, 1).shard([q, k, v], 2))
    for name, tensor in zip("qkv", (q, k, v), strict=True):
        assert merged[name].view(integer).equal(tensor.view(integer))
