"""The table of every family: names and shapes of the models that transformers builds, in both directions."""

from __future__ import annotations

from collections import Counter
from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from megatron_vespo.models.family import FAMILIES, REFUSED, ModelShape, family_of, is_expert, shape_of
from megatron_vespo.models.mappings import QKV, Direct, GatedMLP, Vocabulary
from megatron_vespo.models.parameter_groups import PARTS, part_of
from tests.support.published_config import GLM_4_5, GLM_4_5_AIR, LLAMA_1B, QWEN3_8B, QWEN3_30B_A3B
from tests.support.tensors import read_tensors
from tests.support.tiny_checkpoints import GLM, LLAMA, MOE, QWEN3, tiny_config

# several query groups of several heads, and sizes that four ranks divide, but for the vocabulary
SIZES = {
    "vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 8,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
GLM_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
MORE = {MOE: EXPERTS, GLM: GLM_EXPERTS, QWEN3: {}, LLAMA: {}}
CASES = {name: tiny_config(name, **SIZES, **more) for name, more in MORE.items()}
CASES["GLM, plain attention, experts in all layers"] = CASES[GLM] | {
    "attention_bias": False, "use_qk_norm": False, "first_k_dense_replace": 0, "n_shared_experts": 2,
}  # fmt: skip
CASES |= {f"{name}, tied": config | {"tie_word_embeddings": True} for name, config in CASES.items()}
QWEN3_235B_A22B = QWEN3_30B_A3B | {
    "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 94, "num_attention_heads": 64,
    "moe_intermediate_size": 1536,
}  # fmt: skip
# published numbers: config, tensors of the checkpoint, parameters
PUBLISHED = {
    "Qwen3-30B-A3B": (QWEN3_30B_A3B, 18_867, 30_532_122_624),
    "Qwen3-235B-A22B": (QWEN3_235B_A22B, 36_945, 235_093_634_560),
    # without the layer for multi-token prediction
    "GLM-4.5": (GLM_4_5, 44_189, 352_797_829_024),
    "GLM-4.5-Air": (GLM_4_5_AIR, 17_925, 106_852_251_264),
    "Qwen3-8B": (QWEN3_8B, 399, 8_190_735_360),
    "Llama-3.2-1B": (LLAMA_1B, 146, 1_235_814_400),
}
every_case = pytest.mark.parametrize("config", CASES.values(), ids=CASES)


def built_by_transformers(config: dict):
    from transformers import AutoConfig, AutoModelForCausalLM

    # a copy: transformers writes into the dicts of a config
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**deepcopy(config)))


def other_spelling(name: str, shape: ModelShape) -> str:
    """The Transformer-Engine layer spec's name of a parameter, written down here a second time."""
    if name.endswith(".input_layernorm.weight"):
        return name.replace("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight")
    dense = not shape.num_experts or name.startswith(
        tuple(f"decoder.layers.{layer}." for layer in range(shape.dense_layers))
    )
    if name.endswith(".pre_mlp_layernorm.weight") and dense:
        return name.replace("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")
    if ".local_experts." in name:
        before, after = name.split("local_experts.")
        expert, linear, weight = after.split(".")
        return f"{before}{linear}.{weight}{expert}"
    return name


@every_case
def test_the_table_is_what_transformers_saves(tmp_path, config):
    """transformers stacks experts in memory, in files it does not."""
    built_by_transformers(config).save_pretrained(tmp_path)
    saved = {name: tuple(tensor.shape) for name, tensor in read_tensors(tmp_path).items()}
    assert family_of(config).hf_tensors(shape_of(config)) == saved


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_models(model):
    config, num_tensors, num_parameters = PUBLISHED[model]
    family, shape = family_of(config), shape_of(config)
    tensors = family.hf_tensors(shape)
    assert len(tensors) == num_tensors
    assert sum(torch.Size(size).numel() for size in tensors.values()) == num_parameters
    with torch.device("meta"):
        model = built_by_transformers(config)
    buffers = ((name, buffer) for name, buffer in model.named_buffers() if name.endswith("correction_bias"))
    built = {name: tuple(tensor.shape) for name, tensor in [*model.named_parameters(), *buffers]}
    stacked: dict[str, tuple[int, ...]] = {}
    for name, size in tensors.items():
        if ".experts." not in name:
            stacked[name] = size
        elif ".experts.0.gate" in name:
            layer = name.split("0.gate")[0]
            stacked[layer + "gate_up_proj"] = (shape.num_experts, 2 * size[0], size[1])
            stacked[layer + "down_proj"] = (shape.num_experts, size[1], size[0])
    assert stacked == built
    from_megatron = Counter(
        name for megatron in family.parameters(shape) for name in family.mapping_for(megatron, shape).hf_names
    )
    assert from_megatron == Counter(list(tensors))


@pytest.mark.long
@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_the_published_moe_at_expert_parallel_8(tensor_parallel):
    """Every tensor to the shards of a layout and back, at full size, on tensors without values."""
    config, num_tensors, num_parameters = PUBLISHED["Qwen3-30B-A3B"]
    family, shape = family_of(config), shape_of(config)
    sizes = family.hf_tensors(shape)
    back: dict[str, tuple[int, ...]] = {}
    on_rank = [0] * (8 * tensor_parallel)  # parameters, by expert rank times tensor rank
    for name in family.parameters(shape):
        mapping = family.mapping_for(name, shape)
        expert = int(name.split("local_experts.")[1].split(".")[0]) if is_expert(name) else None
        size = 1 if is_expert(name) else tensor_parallel  # experts whole: --expert-tensor-parallel-size 1
        full = [torch.empty(sizes[hf_name], device="meta") for hf_name in mapping.hf_names]
        shards = mapping.shard(full, size)
        whole = isinstance(mapping, Direct) and mapping.dim is None
        merged = mapping.merge(shards[:1] if whole else shards)
        back |= {hf_name: tuple(tensor.shape) for hf_name, tensor in merged.items()}
        for rank in range(len(on_rank)):
            if expert is None or expert // 16 == rank // tensor_parallel:
                on_rank[rank] += shards[rank % size].numel()
    assert back == sizes and len(back) == num_tensors
    experts = 48 * 128 * 3 * 2048 * 768
    norms_and_routers = 48 * (2 * 2048 + 2 * 128 + 128 * 2048) + 2048
    rest = num_parameters - experts - norms_and_routers
    assert set(on_rank) == {experts // 8 + norms_and_routers + rest // tensor_parallel}


@every_case
def test_both_layer_specs_cover_every_tensor_once(config):
    family, shape = family_of(config), shape_of(config)
    names = list(family.parameters(shape))
    for spelling in (names, [other_spelling(name, shape) for name in names]):
        assert len(set(spelling)) == len(spelling)
        covered = Counter(hf for name in spelling for hf in family.mapping_for(name, shape).hf_names)
        assert covered == Counter(list(family.hf_tensors(shape)))
        assert {part_of(name) for name in spelling} <= set(PARTS)
        experts = [name for name in spelling if is_expert(name)]
        assert len(experts) == 2 * (2 - shape.dense_layers) * shape.num_experts
        assert all("linear_fc" in name for name in experts)


@pytest.mark.parametrize("size", [1, 2, 4])
@every_case
def test_every_parameter_makes_the_round_trip(config, size):
    family, shape = family_of(config), shape_of(config, padded_vocab_size=40)
    tensors = {name: torch.randn(of) for name, of in family.hf_tensors(shape).items()}
    merged: dict[str, torch.Tensor] = {}
    for name in family.parameters(shape):
        mapping = family.mapping_for(name, shape)
        shards = mapping.shard([tensors[hf_name] for hf_name in mapping.hf_names], size)
        assert len(shards) == size and len({shard.shape for shard in shards}) == 1
        merged |= mapping.merge([shard.clone() for shard in shards])
    assert merged.keys() == tensors.keys()
    assert all(merged[name].equal(tensor) for name, tensor in tensors.items())


def test_parameters_come_in_the_models_order():
    config = CASES[MOE]
    shape = replace(shape_of(config), num_layers=1, num_experts=2)
    layer = "decoder.layers.0."
    assert list(FAMILIES[MOE].parameters(shape)) == [
        "embedding.word_embeddings.weight",
        layer + "input_layernorm.weight",
        layer + "self_attention.linear_proj.weight",
        layer + "self_attention.linear_qkv.weight",
        layer + "self_attention.q_layernorm.weight",
        layer + "self_attention.k_layernorm.weight",
        layer + "pre_mlp_layernorm.weight",
        layer + "mlp.router.weight",
        layer + "mlp.experts.local_experts.0.linear_fc1.weight",
        layer + "mlp.experts.local_experts.0.linear_fc2.weight",
        layer + "mlp.experts.local_experts.1.linear_fc1.weight",
        layer + "mlp.experts.local_experts.1.linear_fc2.weight",
        "decoder.final_layernorm.weight",
        "output_layer.weight",
    ]


def test_a_tied_output_layer_is_the_embedding():
    config = CASES[f"{LLAMA}, tied"]
    family, shape = family_of(config), shape_of(config)
    assert "output_layer.weight" not in set(family.parameters(shape))
    assert "lm_head.weight" not in family.hf_tensors(shape)
    embedding = family.mapping_for("embedding.word_embeddings.weight", shape)
    assert family.mapping_for("output_layer.weight", shape) == embedding
    assert family.mapping_for("output_layer.weight", replace(shape, tied_embeddings=False)) == Vocabulary(
        ("lm_head.weight",), 0, vocab_size=37, padded_vocab_size=37
    )


def test_mappings_of_the_tables():
    config = CASES[MOE]
    moe, shape = family_of(config), shape_of(config, padded_vocab_size=40)
    dense = FAMILIES[LLAMA]
    assert moe.mapping_for("embedding.word_embeddings.weight", shape) == Vocabulary(
        ("model.embed_tokens.weight",), 0, vocab_size=37, padded_vocab_size=40
    )
    assert moe.mapping_for("decoder.layers.11.self_attention.linear_qkv.weight", shape) == QKV(
        tuple(f"model.layers.11.self_attn.{x}_proj.weight" for x in "qkv"), 4, 2, 8
    )
    for name in ("local_experts.127.linear_fc1.weight", "linear_fc1.weight127"):
        assert moe.mapping_for(f"decoder.layers.3.mlp.experts.{name}", shape) == GatedMLP(
            tuple(f"model.layers.3.mlp.experts.127.{x}_proj.weight" for x in ("gate", "up"))
        )
    for name in ("local_experts.0.linear_fc2.weight", "linear_fc2.weight0"):
        assert moe.mapping_for(f"decoder.layers.3.mlp.experts.{name}", shape) == Direct(
            ("model.layers.3.mlp.experts.0.down_proj.weight",), 1
        )
    assert moe.mapping_for("decoder.layers.0.self_attention.linear_proj.weight", shape).dim == 1
    assert moe.mapping_for("decoder.layers.0.mlp.router.weight", shape).dim is None
    assert dense.mapping_for("decoder.layers.5.mlp.linear_fc1.weight", shape) == GatedMLP(
        tuple(f"model.layers.5.mlp.{x}_proj.weight" for x in ("gate", "up"))
    )
    for name in ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"):
        assert dense.mapping_for(f"decoder.layers.5.{name}", shape) == Direct(
            ("model.layers.5.post_attention_layernorm.weight",), None
        )


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        (MOE, "decoder.layers.0.mlp.linear_fc1.weight"),
        (MOE, "decoder.layers.0.mlp.linear_fc1.layer_norm_weight"),
        (MOE, "decoder.layers.0.self_attention.linear_qkv.bias"),
        (MOE, "decoder.layers.0.mlp.experts.local_experts.0.linear_fc1.weight_extra"),
        (QWEN3, "decoder.layers.0.mlp.router.weight"),
        (QWEN3, "decoder.layers.0.mlp.linear_fc1xweight"),
        (LLAMA, "decoder.layers.0.self_attention.q_layernorm.weight"),
        (LLAMA, "module.decoder.final_layernorm.weight"),
        (LLAMA, "decoder.layers.x.input_layernorm.weight"),
    ],
)
def test_an_unknown_name_is_an_error(architecture, name):
    config = CASES[QWEN3]
    with pytest.raises(KeyError, match=f"{architecture} has no parameter {name}"):
        FAMILIES[architecture].mapping_for(name, shape_of(config))


def test_the_shape():
    shape = ModelShape(
        num_layers=16, hidden_size=2048, ffn_hidden_size=8192, num_experts=0, num_attention_heads=32,
        num_query_groups=8, head_dim=64, vocab_size=128256, padded_vocab_size=128256, tied_embeddings=True,
    )  # fmt: skip
    assert shape_of(LLAMA_1B) == shape
    assert shape_of(LLAMA_1B, padded_vocab_size=128512) == replace(shape, padded_vocab_size=128512)
    config = CASES[MOE]
    assert (shape_of(config).num_experts, shape_of(config).ffn_hidden_size) == (4, 12)


@pytest.mark.parametrize("architectures", [["GPT2LMHeadModel"], [], None, LLAMA, [3], [["x"]]])
def test_another_architecture(architectures):
    with pytest.raises(ValueError) as error:
        family_of({"architectures": architectures})
    found = architectures[0] if isinstance(architectures, list) and architectures else "none"
    assert str(error.value) == (
        f"its architecture is {found}; supported: Qwen3MoeForCausalLM, Glm4MoeForCausalLM, Qwen3ForCausalLM, "
        "LlamaForCausalLM"
    )


def test_only_routers_biases_are_fixed():
    config = CASES[GLM]
    family, shape = family_of(config), shape_of(config)
    assert family.fixed_tensors(shape) == {"model.layers.1.mlp.gate.e_score_correction_bias"}
    for name in (MOE, QWEN3, LLAMA):
        assert FAMILIES[name].fixed_tensors(shape_of(CASES[name])) == set()


@pytest.mark.parametrize("architecture", REFUSED)
def test_a_family_that_nobody_has_compared_is_refused_by_name(architecture):
    with pytest.raises(ValueError, match=f"its architecture is {architecture}, which is refused: its l"):
        family_of({"architectures": [architecture]})
