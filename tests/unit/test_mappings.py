"""Conversion of single parameters, and the table of Qwen3-MoE names."""

from collections import Counter

import pytest
import torch
from safetensors import safe_open

from megatron_vespo.conversion.mappings import QKV, Direct, GatedMLP, Vocabulary
from megatron_vespo.conversion.qwen3_moe import ModelShape, is_expert, mapping_for

SIZES = (1, 2, 4)
SHAPE = ModelShape(num_attention_heads=4, num_query_groups=2, head_dim=8, vocab_size=37, padded_vocab_size=40)


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


# What a 2-layer, 4-expert model has under each layer spec, global numbers
NOT_IN_LAYERS = ["embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight"]
IN_EVERY_LAYER = [
    "self_attention.linear_qkv.weight",
    "self_attention.linear_proj.weight",
    "self_attention.q_layernorm.weight",
    "self_attention.k_layernorm.weight",
    "pre_mlp_layernorm.weight",
    "mlp.router.weight",
]
LOCAL_SPEC = [
    "input_layernorm.weight",
    "mlp.experts.local_experts.0.linear_fc1.weight",
    "mlp.experts.local_experts.0.linear_fc2.weight",
    "mlp.experts.local_experts.1.linear_fc1.weight",
    "mlp.experts.local_experts.1.linear_fc2.weight",
    "mlp.experts.local_experts.2.linear_fc1.weight",
    "mlp.experts.local_experts.2.linear_fc2.weight",
    "mlp.experts.local_experts.3.linear_fc1.weight",
    "mlp.experts.local_experts.3.linear_fc2.weight",
]
TRANSFORMER_ENGINE_SPEC = [
    "self_attention.linear_qkv.layer_norm_weight",
    "mlp.experts.linear_fc1.weight0",
    "mlp.experts.linear_fc1.weight1",
    "mlp.experts.linear_fc1.weight2",
    "mlp.experts.linear_fc1.weight3",
    "mlp.experts.linear_fc2.weight0",
    "mlp.experts.linear_fc2.weight1",
    "mlp.experts.linear_fc2.weight2",
    "mlp.experts.linear_fc2.weight3",
]
each_layer_spec = pytest.mark.parametrize(
    "layer_spec", [LOCAL_SPEC, TRANSFORMER_ENGINE_SPEC], ids=["local", "transformer_engine"]
)


def megatron_names(layer_spec: list[str]) -> list[str]:
    in_layers = [
        f"decoder.layers.{layer}.{name}" for layer in range(2) for name in IN_EVERY_LAYER + layer_spec
    ]
    return NOT_IN_LAYERS + in_layers


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the file that transformers writes for such a model."""
    from tiny_qwen3_moe import tiny_qwen3_moe

    folder = tmp_path_factory.mktemp("hf")
    tiny_qwen3_moe().save_pretrained(folder)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}


@each_layer_spec
def test_the_table_covers_every_tensor_once(saved, layer_spec):
    covered = Counter(hf for name in megatron_names(layer_spec) for hf in mapping_for(name, SHAPE).hf_names)
    assert covered == Counter(list(saved))


@pytest.mark.parametrize("size", [1, 2])
@each_layer_spec
def test_every_tensor_of_the_table_makes_the_round_trip(saved, layer_spec, size):
    for name in megatron_names(layer_spec):
        mapping = mapping_for(name, SHAPE)
        tensors = [torch.randn(saved[hf_name]) for hf_name in mapping.hf_names]
        assert_round_trip(mapping, tensors, size)


def test_mappings_of_the_table():
    assert mapping_for("embedding.word_embeddings.weight", SHAPE) == Vocabulary(
        ("model.embed_tokens.weight",), 0, vocab_size=37, padded_vocab_size=40
    )
    assert mapping_for("decoder.layers.11.self_attention.linear_qkv.weight", SHAPE) == QKV(
        tuple(f"model.layers.11.self_attn.{x}_proj.weight" for x in "qkv"), 2, 2, 8
    )
    for name in ("local_experts.127.linear_fc1.weight", "linear_fc1.weight127"):
        assert mapping_for(f"decoder.layers.3.mlp.experts.{name}", SHAPE) == GatedMLP(
            tuple(f"model.layers.3.mlp.experts.127.{x}_proj.weight" for x in ("gate", "up"))
        )
    for name in ("local_experts.0.linear_fc2.weight", "linear_fc2.weight0"):
        assert mapping_for(f"decoder.layers.3.mlp.experts.{name}", SHAPE) == Direct(
            ("model.layers.3.mlp.experts.0.down_proj.weight",), 1
        )
    assert mapping_for("decoder.layers.0.self_attention.linear_proj.weight", SHAPE).dim == 1
    assert mapping_for("decoder.layers.0.mlp.router.weight", SHAPE).dim is None


@pytest.mark.parametrize(
    "name",
    [
        "decoder.layers.0.mlp.linear_fc1.weight",
        "decoder.layers.0.self_attention.linear_qkv.bias",
        "decoder.layers.0.mlp.experts.local_experts.0.linear_fc1.weight_extra",
        "module.decoder.final_layernorm.weight",
        "decoder.layers.x.mlp.router.weight",
    ],
)
def test_an_unknown_name_is_an_error(name):
    with pytest.raises(KeyError, match=f"Qwen3MoeForCausalLM has no parameter {name}"):
        mapping_for(name, SHAPE)


def test_only_experts_are_experts():
    names = megatron_names(LOCAL_SPEC) + megatron_names(TRANSFORMER_ENGINE_SPEC)
    assert {name for name in names if is_expert(name)} == {name for name in names if "linear_fc" in name}
