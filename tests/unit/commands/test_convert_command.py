"""Round trips through the command, bit for bit."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vespo.checkpoints import copying
from megatron_vespo.checkpoints.copying import Budget
from tests.support.tensors import assert_same, read_tensors
from tests.support.tiny_checkpoints import (
    GLM,
    LLAMA,
    MOE,
    QWEN3,
    convert,
    random_tensors,
    tiny_config,
    write_hf,
)

# case -> architecture, what its config changes; several query groups, and sizes that nothing divides
WIDE = {"moe_intermediate_size": 16}  # transformers multiplies experts of whole 16 bytes only
CASES = {
    "qwen3 moe": (MOE, WIDE | {"num_experts": 3, "num_attention_heads": 6, "num_key_value_heads": 3}),
    "qwen3 moe, tied": (MOE, WIDE | {"tie_word_embeddings": True}),
    "glm": (GLM, WIDE | {"n_routed_experts": 3, "num_experts_per_tok": 2, "num_nextn_predict_layers": 0}),
    "qwen3": (QWEN3, {"vocab_size": 13}),
    "qwen3, tied": (QWEN3, {"tie_word_embeddings": True}),
    "llama": (LLAMA, {"num_hidden_layers": 3}),
    "llama, tied": (LLAMA, {"tie_word_embeddings": True, "num_key_value_heads": 1}),
}


def built_model(folder, architecture: str, changes: dict, dtype: torch.dtype, max_shard_size: str):
    """What transformers saves of a random model; norms between 0.5 and 1.5."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(**tiny_config(architecture, **changes))
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model.eval()


@pytest.fixture
def tiny_spans(monkeypatch):
    """A budget whose spans are a row or two, so that every tensor is cut."""
    monkeypatch.setattr(copying, "_MAX_SPAN", 40)
    monkeypatch.setattr(Budget, "__post_init__", lambda self: None)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_round_trip(case, dtype, tmp_path, tiny_spans, capsys):
    from transformers import AutoModelForCausalLM

    architecture, changes = CASES[case]
    source, megatron, target = (tmp_path / name for name in ("source", "megatron", "target"))
    sharded = dtype == torch.bfloat16
    model = built_model(source, architecture, changes, dtype, "2KB" if sharded else "1GB")
    capsys.readouterr()
    assert (len(list(source.glob("*.safetensors"))) > 1) == sharded
    assert convert("hf-to-megatron", source, megatron, "--workers", 3) == 0
    assert len(list((megatron / "release").glob("__0_*.distcp"))) == 3
    size = ["--max-shard-size", "2e-6"] if sharded else []
    assert convert("megatron-to-hf", megatron, target, "--workers", 3, *size) == 0
    assert (target / "model.safetensors").exists() != sharded
    assert_same(read_tensors(target), read_tensors(source))
    for pair in ((source, megatron), (megatron, target), (target, source), (megatron,), (target,)):
        assert convert("verify", *pair) == 0
    out = capsys.readouterr()
    assert not out.err
    assert out.out.count("same: ") == 5
    loaded, info = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    assert loaded.dtype == dtype
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        assert loaded.eval()(tokens).logits.equal(model(tokens).logits)


def made(tmp_path, architecture=MOE, dtype=torch.bfloat16, name="source", **changes):
    config = tiny_config(architecture, **changes)
    return write_hf(tmp_path / name, config, random_tensors(config, dtype))


@pytest.mark.parametrize(
    ("given", "wanted"), [(torch.float32, "bf16"), (torch.bfloat16, "fp32"), (torch.float32, "fp16")]
)
def test_dtype(given, wanted, tmp_path, capsys):
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}[wanted]
    source = made(tmp_path, dtype=given)
    expected = {name: tensor.to(dtype) for name, tensor in read_tensors(source).items()}
    assert convert("hf-to-megatron", source, tmp_path / "cast", "--dtype", wanted) == 0
    assert convert("hf-to-megatron", source, tmp_path / "kept") == 0
    assert convert("megatron-to-hf", tmp_path / "cast", tmp_path / "one") == 0
    assert convert("megatron-to-hf", tmp_path / "kept", tmp_path / "two", "--dtype", wanted) == 0
    for result in (tmp_path / "one", tmp_path / "two"):
        assert_same(read_tensors(result), expected)
        assert json.loads((result / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
        assert convert("verify", result) == 0
        assert convert("verify", result, source) == 0, "compared as the narrower dtype"
    assert not capsys.readouterr().err


def test_files_beside_the_weights(tmp_path):
    source = made(tmp_path)
    for name in ("merges.txt", "chat_template.jinja", "generation_config.json"):
        (source / name).write_text(f"{{}} {name}")
    assert convert("hf-to-megatron", source, tmp_path / "megatron") == 0
    assert convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "target") == 0
    names = {path.name for path in source.iterdir()}
    assert {path.name for path in (tmp_path / "target").iterdir()} == names | {"manifest.json"}
    for name in names - {"config.json", "model.safetensors"}:
        assert (tmp_path / "target" / name).read_text() == (source / name).read_text()
    before, after = (json.loads((path / "config.json").read_text()) for path in (source, tmp_path / "target"))
    assert after == before | {"dtype": "bfloat16"}
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in (tmp_path / "target").iterdir())


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("architecture", [QWEN3, LLAMA])
def test_a_tied_checkpoint_that_has_the_output_layer_too(architecture, same, tmp_path, capsys):
    source = made(tmp_path, architecture, tie_word_embeddings=True)
    tensors = read_tensors(source)
    head = tensors["model.embed_tokens.weight"].clone()
    if not same:
        head[-1, -1] += 1
    save_file(tensors | {"lm_head.weight": head}, source / "model.safetensors", {"format": "pt"})
    code = convert("hf-to-megatron", source, tmp_path / "megatron")
    if same:
        assert code == 0
        assert convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "target") == 0
        assert_same(read_tensors(tmp_path / "target"), tensors)
    else:
        assert code == 2 and not (tmp_path / "megatron").exists()
        assert capsys.readouterr().err == (
            f"megatron-vespo: {source}: the config ties lm_head.weight to model.embed_tokens.weight, "
            "but they differ\n"
        )


def test_shards_are_as_large_as_they_may_be(tmp_path):
    source, limit = made(tmp_path), 700
    assert convert("hf-to-megatron", source, tmp_path / "megatron") == 0
    assert (
        convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "target", "--max-shard-size", limit / 1e9)
        == 0
    )
    files = sorted((tmp_path / "target").glob("*.safetensors"))
    sizes = [sum(tensor.nbytes for tensor in load_file(path).values()) for path in files]
    tensors = read_tensors(source)
    assert all(size <= limit for size in sizes)
    assert math.ceil(sum(sizes) / limit) <= len(files) < len(tensors) / 2
    index = json.loads((tmp_path / "target" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes) == sum(tensor.nbytes for tensor in tensors.values())
    assert index["weight_map"] == {name: path.name for path in files for name in load_file(path)}


def test_verify_names_what_differs(tmp_path, capsys):
    source, other = made(tmp_path), made(tmp_path, name="other")
    tensors = read_tensors(other)
    tensors["model.norm.weight"][3] += 0.25
    tensors["lm_head.weight"][0] *= -1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    assert convert("verify", source, other) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("DIFFERENT: ")
    assert sorted(lines[:-1])[0].startswith("lm_head.weight: 8 of 88 values differ, by ")
    assert sorted(lines[:-1])[1] == "model.norm.weight: 1 of 8 values differ, by 0.25 at most"
    assert len(lines) == 3


def test_verify_sees_the_sign_of_zero(tmp_path, capsys):
    source, other = made(tmp_path), made(tmp_path, name="other")
    tensors = read_tensors(source)
    for folder, zero in ((source, 0.0), (other, -0.0)):
        tensors["model.norm.weight"][0] = zero
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert convert("verify", source, other) == 1
    assert "model.norm.weight: 1 of 8 values differ, by 0 at most" in capsys.readouterr().out


def test_inspect(tmp_path, capsys):
    source = made(tmp_path)
    assert convert("hf-to-megatron", source, tmp_path / "megatron") == 0
    capsys.readouterr()
    listed = []
    for path in (source, tmp_path / "megatron"):
        assert convert("inspect", path, "--tensors") == 0
        listed.append(capsys.readouterr().out.splitlines()[8:])
    tensors = read_tensors(source)
    assert listed[0] == listed[1]
    assert sorted(listed[0]) == sorted(
        f"{name}  bfloat16 {list(tensor.shape)}" for name, tensor in tensors.items()
    )


def test_layers_for_multi_token_prediction_are_left_out(tmp_path, capsys):
    config = tiny_config(GLM, num_nextn_predict_layers=1, n_group=1)
    tensors = random_tensors(config, torch.bfloat16)
    extra = {"model.layers.2.eh_proj.weight": torch.ones(8, 16, dtype=torch.bfloat16)}
    source = write_hf(tmp_path / "source", config, tensors | extra)
    assert convert("hf-to-megatron", source, tmp_path / "megatron") == 0
    assert convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "target") == 0
    assert_same(read_tensors(tmp_path / "target"), tensors)
    written = json.loads((tmp_path / "target" / "config.json").read_text())
    assert written == config | {"num_nextn_predict_layers": 0, "dtype": "bfloat16"}
    # of a layer that config.json does not count
    other = write_hf(tmp_path / "other", config | {"num_nextn_predict_layers": 0}, tensors | extra)
    capsys.readouterr()
    assert convert("hf-to-megatron", other, tmp_path / "no") == 2
    assert "model.layers.2.eh_proj.weight is not in the model" in capsys.readouterr().err


def test_a_routers_bias_stays_float32(tmp_path):
    """Also under --dtype, which is for the trained tensors."""
    config = tiny_config(GLM)
    tensors = random_tensors(config, torch.float32)
    source = write_hf(tmp_path / "source", config, tensors)
    assert convert("hf-to-hf", source, tmp_path / "target", "--dtype", "bf16") == 0
    for name, tensor in read_tensors(tmp_path / "target").items():
        fixed = name.endswith("e_score_correction_bias")
        assert tensor.dtype == (torch.float32 if fixed else torch.bfloat16)
        assert tensor.equal(tensors[name].to(tensor.dtype))
    assert json.loads((tmp_path / "target" / "config.json").read_text())["dtype"] == "bfloat16"
