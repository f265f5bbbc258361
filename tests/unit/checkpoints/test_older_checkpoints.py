"""HF folders of the same weights in another form: fused experts, buffers that the config determines."""

import json

import pytest
import torch
from safetensors.torch import save_file

from megatron_vespo.checkpoints.hf_checkpoint import HFCheckpointReader
from megatron_vespo.checkpoints.names import INDEX_NAME
from megatron_vespo.checkpoints.sources import check_served
from tests.support.tensors import assert_same, read_tensors
from tests.support.tiny_checkpoints import LLAMA, MOE, convert, random_tensors, tiny_config, write_hf

# transformers multiplies experts of whole 16 bytes only
WIDE = {"moe_intermediate_size": 16, "num_experts": 3}


@pytest.fixture(params=["1GB", "4KB"], ids=["one file", "shards"])
def both_forms(request, tmp_path):
    """What transformers saves of one model: its experts apart, and fused."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(**tiny_config(MOE, **WIDE))
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    apart, fused = tmp_path / "apart", tmp_path / "fused"
    model.save_pretrained(apart)
    model.save_pretrained(fused, save_original_format=False, max_shard_size=request.param)
    assert "model.layers.0.mlp.experts.gate_up_proj" in read_tensors(fused)
    assert (fused / INDEX_NAME).is_file() == (request.param == "4KB")
    return apart, fused


def test_fused_experts_convert_bit_for_bit(both_forms, tmp_path, capsys):
    apart, fused = both_forms
    assert convert("hf-to-megatron", fused, tmp_path / "megatron") == 0
    assert convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "back") == 0
    assert convert("hf-to-hf", fused, tmp_path / "direct") == 0
    for folder in (tmp_path / "back", tmp_path / "direct"):
        assert_same(read_tensors(folder), read_tensors(apart))
        assert convert("verify", folder) == 0
        assert convert("verify", fused, folder) == 0
    assert not capsys.readouterr().err


def test_fused_experts_are_read_as_those_of_each_expert(both_forms):
    apart, fused = both_forms
    with HFCheckpointReader(fused) as reader:
        assert reader.has_fused_experts
        assert_same({name: reader.get(name) for name in reader.tensors}, read_tensors(apart))


def test_hf_to_hf_in_another_dtype(both_forms, tmp_path):
    apart, fused = both_forms
    assert convert("hf-to-hf", fused, tmp_path / "wide", "--dtype", "fp32", "--max-shard-size", "4e-6") == 0
    assert_same(read_tensors(tmp_path / "wide"), {name: t.float() for name, t in read_tensors(apart).items()})
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"


def test_engines_do_not_get_fused_experts(both_forms, capsys):
    apart, fused = both_forms
    check_served(apart)
    with pytest.raises(ValueError, match=f"{fused}: its experts are fused .* convert hf-to-hf {fused} DST"):
        check_served(fused)
    # SGLang reads the fused experts of some other families
    config = json.loads((fused / "config.json").read_text())
    (fused / "config.json").write_text(json.dumps(config | {"architectures": ["OtherMoeForCausalLM"]}))
    check_served(fused)


EXPERTS = "model.layers.0.mlp.experts."
GATE_UP, DOWN, SECOND_UP = f"{EXPERTS}gate_up_proj", f"{EXPERTS}down_proj", f"{EXPERTS}1.up_proj.weight"
SHAPE = "fused experts are (experts, {} x rows, columns)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # as some other families have them
        (
            lambda t: {n: t[n].transpose(1, 2).contiguous() for n in (GATE_UP, DOWN)},
            "config.json it should be",
        ),
        (lambda t: {GATE_UP: torch.zeros(3, 5, 8)}, f"{GATE_UP} is (3, 5, 8), {SHAPE.format(2)}"),
        (lambda t: {DOWN: torch.zeros(8, 16)}, f"{DOWN} is (8, 16), {SHAPE.format(1)}"),
        (lambda t: {SECOND_UP: torch.zeros(16, 8)}, f"{SECOND_UP} is there twice, once in a fused tensor"),
        (lambda t: {GATE_UP: t[GATE_UP][:2]}, "experts.2.gate_proj.weight"),
        (lambda t: {GATE_UP: t[GATE_UP][:2]}, "missing"),
    ],
)
def test_other_fused_tensors_are_refused(change, message, tmp_path, capsys):
    config = tiny_config(MOE, **WIDE, num_hidden_layers=1)
    tensors = random_tensors(config, torch.bfloat16)
    experts = [
        [tensors.pop(f"{EXPERTS}{e}.{x}_proj.weight") for x in ("gate", "up", "down")] for e in range(3)
    ]
    tensors[GATE_UP] = torch.stack([torch.cat([gate, up]) for gate, up, _ in experts])
    tensors[DOWN] = torch.stack([down for _, _, down in experts])
    folder = write_hf(tmp_path / "source", config, tensors | change(tensors))
    assert convert("hf-to-megatron", folder, tmp_path / "target") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"megatron-vespo: {folder}") and error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "target").exists()


def with_buffers(tmp_path, theta: float, dtype: torch.dtype, name: str, **changes):
    config = tiny_config(LLAMA, **changes)
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    # as transformers 4.30 computed it
    buffer = (1.0 / (theta ** (torch.arange(0, head_dim, 2).float() / head_dim))).to(dtype)
    tensors = random_tensors(config, torch.bfloat16)
    layers = range(config["num_hidden_layers"])
    buffers = {name.format(layer): buffer.clone() for layer in layers}
    return write_hf(tmp_path / "source", config, tensors | buffers), tensors


IN_LAYERS = "model.layers.{}.self_attn.rotary_emb.inv_freq"


@pytest.mark.parametrize("name", [IN_LAYERS, "model.rotary_emb.inv_freq"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rotary_buffers_are_left_out(name, dtype, tmp_path, capsys):
    folder, tensors = with_buffers(tmp_path, 10000.0, dtype, name, head_dim=64)
    assert convert("hf-to-megatron", folder, tmp_path / "megatron") == 0
    assert convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "back") == 0
    assert_same(read_tensors(tmp_path / "back"), tensors)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(("theta", "more"), [(10300.0, {}), (10000.0, {"rope_theta": 500000.0})])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rotary_buffer_of_another_model_is_refused(theta, more, dtype, tmp_path, capsys):
    folder, _ = with_buffers(tmp_path, theta, dtype, IN_LAYERS, head_dim=64, **more)
    assert convert("hf-to-megatron", folder, tmp_path / "megatron") == 2
    made_by = f"what rope_theta {int(more.get('rope_theta', 10000))} and head_dim 64 of config.json make it"
    assert capsys.readouterr().err == (
        f"megatron-vespo: {folder}: tensor {IN_LAYERS.format(0)} is not {made_by}\n"
    )


def test_another_tensor_beside_the_buffers_is_still_refused(tmp_path, capsys):
    folder, _ = with_buffers(tmp_path, 10000.0, torch.float32, IN_LAYERS)
    tensors = read_tensors(folder) | {"model.layers.0.self_attn.masked_bias": torch.zeros(1)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert convert("hf-to-megatron", folder, tmp_path / "megatron") == 2
    assert "masked_bias is not in the model that config.json describes" in capsys.readouterr().err
