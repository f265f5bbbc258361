"""Rows: what moves where, against whole tensors."""

import random
from collections import Counter

import pytest
import torch

from megatron_vespo.checkpoints.row_map import RowRun, row_runs
from megatron_vespo.checkpoints.safetensors_file import TensorInfo
from megatron_vespo.checkpoints.spans import row_ranges, shares
from megatron_vespo.checkpoints.torch_dist_writer import destinations
from megatron_vespo.models.family import family_of, shape_of
from megatron_vespo.models.mappings import QKV, Direct, GatedMLP, Vocabulary
from tests.support.tiny_checkpoints import LLAMA, MOE, QWEN3, random_tensors, tiny_config


@pytest.mark.parametrize("architecture", [MOE, QWEN3, LLAMA])
@pytest.mark.parametrize(
    "changes", [{}, {"num_attention_heads": 6, "num_key_value_heads": 3, "vocab_size": 13}]
)
def test_runs_move_rows_as_the_mapping_moves_tensors(architecture, changes):
    config = tiny_config(architecture, **changes)
    family, shape = family_of(config), shape_of(config)
    tensors = random_tensors(config, torch.float32)
    for name in family.parameters(shape):
        mapping = family.mapping_for(name, shape)
        parts = [tensors[hf_name] for hf_name in mapping.hf_names]
        expected = mapping.shard(parts, 1)[0]
        found = torch.full_like(expected, torch.nan)
        for run in row_runs(mapping, [len(part) for part in parts]):
            rows = parts[run.hf_index][run.hf_start : run.hf_start + run.rows]
            found[run.megatron_start : run.megatron_start + run.rows] = rows
        assert found.equal(expected), name


def test_runs_by_hand():
    qkv = QKV(("q", "k", "v"), num_query_groups=2, heads_per_group=2, head_dim=1)
    # q0 q1 k0 v0 q2 q3 k1 v1
    assert row_runs(qkv, [4, 2, 2]) == [
        RowRun(0, 0, 0, 2), RowRun(1, 0, 2, 1), RowRun(2, 0, 3, 1),
        RowRun(0, 2, 4, 2), RowRun(1, 1, 6, 1), RowRun(2, 1, 7, 1),
    ]  # fmt: skip
    assert row_runs(GatedMLP(("gate", "up")), [3, 3]) == [RowRun(0, 0, 0, 3), RowRun(1, 0, 3, 3)]
    assert row_runs(Direct(("a",), 1), [5]) == [RowRun(0, 0, 0, 5)]
    assert row_runs(Vocabulary(("a",), 0, vocab_size=5, padded_vocab_size=5), [5]) == [RowRun(0, 0, 0, 5)]


def test_row_ranges():
    assert list(row_ranges(5, 10, 20)) == [(0, 2), (2, 4), (4, 5)]
    assert list(row_ranges(2, 10, 9)) == [(0, 1), (1, 2)]  # one row at least
    assert list(row_ranges(0, 10, 20)) == []
    assert list(row_ranges(3, 0, 20)) == [(0, 3)]


@pytest.mark.parametrize("max_bytes", [1, 40, 100, 10**9])
def test_destinations_cover_every_row_once(max_bytes):
    config = tiny_config(MOE)
    family, shape = family_of(config), shape_of(config)
    tensors = {name: TensorInfo(torch.float32, size) for name, size in family.hf_tensors(shape).items()}
    read, written = Counter(), Counter()
    for item in destinations(family, shape, tensors, max_bytes):
        span = item.span
        assert (
            0
            < (span.stop - span.start) * tensors[span.name].row_bytes
            <= max(max_bytes, tensors[span.name].row_bytes)
        )
        read.update((span.name, row) for row in range(span.start, span.stop))
        for address in item.addresses:
            written.update((address, item.row + row) for row in range(span.stop - span.start))
    assert read == Counter((name, row) for name, info in tensors.items() for row in range(info.rows))
    assert set(written.values()) == {1}


def test_shares_are_consecutive_and_even():
    rng = random.Random(0)
    for _ in range(100):
        sizes = [rng.choice([0, 1, 5, 30]) for _ in range(rng.randrange(40))]
        parts = rng.randrange(1, 6)
        runs = shares(list(range(len(sizes))), sizes, parts)
        assert len(runs) == parts
        assert [item for run in runs for item in run] == list(range(len(sizes)))
        weights = [sum(sizes[item] for item in run) for run in runs]
        assert all(weight <= sum(sizes) / parts + 30 for weight in weights)
