"""What SGLang's own code makes of a block-FP8 folder: its configuration, its parameters, its weight loaders.

Its kernels for it need a GPU or AMX; that a model of it answers is not tested here.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_vespo.checkpoints.block_fp8 import DTYPE, quantise
from megatron_vespo.checkpoints.convert import Options, hf_to_megatron, megatron_to_hf
from megatron_vespo.checkpoints.ranks import Ranks
from megatron_vespo.models.family import family_of, shape_of
from tests.support.tiny_checkpoints import write_hf

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"], "num_hidden_layers": 1, "hidden_size": 256,
    "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "vocab_size": 131, "rope_theta": 10000,
    "hidden_act": "silu", "tie_word_embeddings": False, "num_experts": 2, "num_experts_per_tok": 1,
    "moe_intermediate_size": 128, "norm_topk_prob": True,
}  # fmt: skip
LAYER = "model.layers.0"


@pytest.fixture(scope="module")
def source() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = family_of(CONFIG).hf_tensors(shape_of(CONFIG))
    return {name: torch.randn(shape, generator=draw).bfloat16() for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, source) -> Path:
    work = tmp_path_factory.mktemp("block_fp8")
    write_hf(work / "hf", CONFIG, source)
    hf_to_megatron(work / "hf", work / "megatron", Options(quiet=True), Ranks())
    megatron_to_hf(work / "megatron", work / "fp8", Options(DTYPE, quiet=True), Ranks())
    return work / "fp8"


@pytest.fixture(scope="module")
def tensors(folder) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def quantisation(folder):
    from sglang.srt.layers.quantization.fp8 import Fp8Config

    return Fp8Config.from_config(json.loads((folder / "config.json").read_text())["quantization_config"])


def test_the_configuration(quantisation):
    assert quantisation.get_name() == "fp8"
    assert quantisation.is_checkpoint_fp8_serialized
    assert quantisation.activation_scheme == "dynamic"
    assert quantisation.weight_block_size == [128, 128]


def test_it_leaves_out_exactly_what_is_not_quantised(quantisation):
    from sglang.srt.layers.quantization.utils import is_layer_skipped

    def skipped(name: str) -> bool:
        return is_layer_skipped(name, quantisation.ignored_layers, quantisation.packed_modules_mapping)

    for name in (
        "self_attn.qkv_proj",
        "self_attn.o_proj",
        "mlp.gate_up_proj",
        "mlp.down_proj",
        "mlp.experts",
    ):
        assert not skipped(f"{LAYER}.{name}"), name
    for name in (f"{LAYER}.mlp.gate", "lm_head"):
        assert skipped(name), name


def stored(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """As an engine's parameters are called: `weight` and `weight_scale_inv` of a linear layer."""
    return {kind: tensors[f"{name}.{kind}"] for kind in ("weight", "weight_scale_inv")}


def test_its_linear_layers_take_weights_and_scales(quantisation, tensors, source):
    from sglang.srt.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear

    # "replicated": no process groups
    more = {"bias": False, "quant_config": quantisation, "parallel_group": "replicated"}
    attention, expert = f"{LAYER}.self_attn", f"{LAYER}.mlp.experts.1"
    qkv = QKVParallelLinear(256, 64, 4, 2, prefix=f"{attention}.qkv_proj", **more)
    merged = MergedColumnParallelLinear(256, [128, 128], prefix=f"{LAYER}.mlp.gate_up_proj", **more)
    row = RowParallelLinear(256, 256, prefix=f"{attention}.o_proj", **more)
    for layer, parts in (
        (qkv, {f"{attention}.{x}_proj": (x,) for x in "qkv"}),
        (merged, {f"{expert}.gate_proj": (0,), f"{expert}.up_proj": (1,)}),
        (row, {f"{attention}.o_proj": ()}),
    ):
        parameters = dict(layer.named_parameters())
        assert parameters.keys() == {"weight", "weight_scale_inv"}
        assert parameters["weight"].dtype == torch.float8_e4m3fn
        for name, shard in parts.items():
            for kind, value in stored(tensors, name).items():
                parameters[kind].weight_loader(parameters[kind], value, *shard)
        whole = [quantise(source[f"{name}.weight"].float()) for name in parts]
        assert parameters["weight"].float().equal(torch.cat([values.float() for values, _ in whole]))
        assert (
            parameters["weight_scale_inv"].float().equal(torch.cat([scales.float() for _, scales in whole]))
        )


def test_its_experts_know_every_name(tensors):
    from sglang.srt.layers.moe.fused_moe_triton import FusedMoE

    mapping = FusedMoE.make_expert_params_mapping("gate_proj", "down_proj", "up_proj", num_experts=2)
    parameters = set()
    for name in tensors:
        if ".experts." in name:
            found = [(parameter, part) for parameter, part, _, _ in mapping if part in name]
            assert len(found) == 1, name
            parameters.add(name.replace(found[0][1], found[0][0]).removeprefix(f"{LAYER}.mlp.experts."))
    assert parameters == {"w13_weight", "w13_weight_scale_inv", "w2_weight", "w2_weight_scale_inv"}


def test_its_expert_parameters_have_our_shapes(quantisation, tensors):
    from sglang.srt.layers.quantization.fp8 import Fp8MoEMethod

    layer = torch.nn.Module()
    layer.moe_tp_size, layer.moe_runner_config = 1, SimpleNamespace(is_gated=True)
    Fp8MoEMethod(quantisation).create_weights(layer, 2, 256, 128, torch.bfloat16, weight_loader=None)
    for name, parts in (("w13", ("gate_proj", "up_proj")), ("w2", ("down_proj",))):
        for kind in ("weight", "weight_scale_inv"):
            shapes = [tensors[f"{LAYER}.mlp.experts.1.{part}.{kind}"].shape for part in parts]
            expected = (2, sum(shape[0] for shape in shapes), shapes[0][1])
            assert tuple(getattr(layer, f"{name}_{kind}").shape) == expected


def test_it_refuses_widths_that_do_not_end_with_a_block(quantisation):
    """Ours are written all the same, as transformers reads them; the engine's line is the user's answer."""
    from sglang.srt.layers.linear import MergedColumnParallelLinear

    with pytest.raises(ValueError, match="not divisible by weight quantization block_n = 128"):
        MergedColumnParallelLinear(
            256, [96, 96], bias=False, quant_config=quantisation, parallel_group="replicated",
            prefix=f"{LAYER}.mlp.gate_up_proj",
        )  # fmt: skip
