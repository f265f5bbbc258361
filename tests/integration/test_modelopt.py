"""The real ModelOpt on tiny models, on the CPU: what it writes is near the source, and SGLang knows it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_vespo.commands import main as cli
from tests.support.servers import make_tiny_model

pytest.importorskip("modelopt", reason="nvidia-modelopt is not installed; the [gpu] extra brings it")

E2M1 = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6])
CASES = [(kind, fmt) for kind in ("dense", "moe") for fmt in ("fp8", "nvfp4")]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    work = tmp_path_factory.mktemp("modelopt")
    changes = {"intermediate_size": 96, "tie_word_embeddings": True}
    dense = make_tiny_model(work / "dense", seed=0, dense=True, dtype="bfloat16", **changes)
    return {"dense": dense, "moe": make_tiny_model(work / "moe", seed=0)}


def convert(*words: object) -> int:
    return cli.run(["convert", *map(str, words)])


@pytest.mark.parametrize("kind, fmt", CASES)
def test_what_it_writes(models, tmp_path, kind, fmt, capsys):
    target = tmp_path / "out"
    assert convert("modelopt", models[kind], target, "--format", fmt, "--samples", 4, "--max-tokens", 32) == 0
    assert "random tokens" in capsys.readouterr().out
    assert convert("verify", target, "--quiet") == 0
    source, found = load_file(models[kind] / "model.safetensors"), load_file(target / "model.safetensors")
    linear = {name for name in source if name.endswith("_proj.weight")}
    for name in source.keys() - linear:
        assert found[name].equal(source[name]), name
    for name in linear:
        check_rounding(source[name].float(), found, name.removesuffix(".weight"), fmt)
    assert (target / "config.json").is_file()
    assert (target / "tokenizer.json").read_bytes() == (models[kind] / "tokenizer.json").read_bytes()


def check_rounding(weights: Tensor, found: dict[str, Tensor], layer: str, fmt: str) -> None:
    """fp8: one scale a tensor; half a unit in the last of three bits of mantissa, or half a subnormal step.

    nvfp4: one e4m3 scale for 16 values. e2m1 values are at most 2 scales apart, so rounding is off by 1 at
    most; a largest value that is clamped, because its scale was rounded down by 1/16, by less than that.
    """
    stored, scale = found[f"{layer}.weight"], found[f"{layer}.weight_scale"].float()
    assert found[f"{layer}.input_scale"].shape == ()
    if fmt == "fp8":
        assert stored.dtype == torch.float8_e4m3fn
        values, bound = stored.float() * scale, torch.maximum(weights.abs() * 2**-4, scale * 2**-10)
    else:
        assert stored.dtype == torch.uint8
        codes = torch.stack([stored & 15, stored >> 4], dim=-1).flatten(1).long()
        scale = (scale * found[f"{layer}.weight_scale_2"]).repeat_interleave(16, dim=1)
        values = torch.where(codes >= 8, -1, 1) * E2M1[codes % 8] * scale
        bound = scale
        close = (values - weights).abs().mean() / weights.abs().mean()
        assert close < 0.15, (layer, close)
    error = (values - weights).abs()
    # the weights were rounded to the model's dtype, bf16 at the least, before
    assert (error <= bound * (1 + 2**-7)).all(), (layer, (error / bound).max())
    assert error.max() > 0


def test_sglang_knows_the_folders(models, tmp_path):
    from sglang.srt.layers.quantization.modelopt_quant import ModelOptFp4Config, ModelOptFp8Config

    for fmt, kind in (("fp8", ModelOptFp8Config), ("nvfp4", ModelOptFp4Config)):
        target = tmp_path / fmt
        assert (
            convert("modelopt", models["moe"], target, "--format", fmt, "--samples", 2, "--max-tokens", 16)
            == 0
        )
        written = json.loads((target / "config.json").read_text())["quantization_config"]
        config = kind.from_config(written)
        assert {"lm_head", "model.layers.0.mlp.gate"} <= set(config.exclude_modules)
        assert kind.from_config(json.loads((target / "hf_quant_config.json").read_text())).exclude_modules


def test_activations_are_measured_on_the_file(models, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"text": "aaaa"}) + "\n" + json.dumps({"question": "bbbb"}) + "\n")
    scales = []
    for name, more in (("file", ["--calibration", prompts]), ("random", ["--samples", 4])):
        assert convert("modelopt", models["moe"], tmp_path / name, "--format", "fp8", *more) == 0
        found = load_file(tmp_path / name / "model.safetensors")
        scales.append(found["model.layers.1.self_attn.q_proj.input_scale"].item())
    assert 0 < scales[0] < scales[1]  # two letters against all of them
