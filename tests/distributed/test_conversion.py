"""HF -> Megatron -> HF, bit for bit, through Megatron's own load and save at several layouts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vespo.commands import main as cli
from megatron_vespo.models.family import family_of, shape_of
from tests.support.launch import PROGRAMS, TIMEOUT_S, launch

ATTENTION = {
    "num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 128, "rms_norm_eps": 1e-6,
    "vocab_size": 131, "rope_theta": 10000, "hidden_act": "silu",
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
MODELS = {
    "moe": {"architectures": ["Qwen3MoeForCausalLM"], "tie_word_embeddings": False, **ATTENTION, **EXPERTS},
    "dense": {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": False, **ATTENTION},
    "llama, tied": {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True, **ATTENTION},
}
TP2_PP2 = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"
TP2_PP2_EP2 = TP2_PP2 + " --expert-model-parallel-size 2 --expert-tensor-parallel-size 1"
ETP2_EP2 = "--tensor-model-parallel-size 2 --expert-tensor-parallel-size 2 --expert-model-parallel-size 2"
VPP2 = "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"
CASES = {
    # model, dtype, layouts that hand it on: ranks and flags
    "moe, fp32": ("moe", torch.float32, [(1, ""), (4, TP2_PP2_EP2)]),
    "moe, bf16": ("moe", torch.bfloat16, [(4, TP2_PP2_EP2), (4, ETP2_EP2)]),
    "dense, bf16": ("dense", torch.bfloat16, [(4, TP2_PP2), (1, "")]),
    "llama, tied, fp32": ("llama, tied", torch.float32, [(2, VPP2), (4, TP2_PP2)]),
}


def make_model(folder: Path, config: dict, dtype: torch.dtype) -> Path:
    """An HF folder of random weights; norms are unlike the ones that a model starts with."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    draw = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.rand(shape, generator=draw).add(0.5).to(dtype)
        for name, shape in family_of(config).hf_tensors(shape_of(config)).items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("case", CASES)
def test_round_trip_through_megatron(case, tmp_path):
    model, dtype, layouts = CASES[case]
    hf, checkpoint = make_model(tmp_path / "hf", MODELS[model], dtype), tmp_path / "megatron"
    assert cli.run(["convert", "hf-to-megatron", str(hf), str(checkpoint), "--quiet"]) == 0
    everything = sorted(family_of(MODELS[model]).hf_tensors(shape_of(MODELS[model])))
    for number, (num_ranks, flags) in enumerate(layouts):
        saved = tmp_path / f"saved{number}"
        arguments = [
            "--hf-checkpoint",
            str(hf),
            "--load",
            str(checkpoint),
            "--save",
            str(saved),
            "--no-load-optim",
        ]
        arguments += [*flags.split(), *(["--bf16"] if dtype == torch.bfloat16 else [])]
        results = launch(
            PROGRAMS / "conversion.py", num_ranks, arguments, TIMEOUT_S, tmp_path / f"run{number}"
        )
        assert not any(len(result["wrong"]) for result in results), [list(r["wrong"])[:3] for r in results]
        by_stage = {int(result["stage"]): result["names"].tolist() for result in results}
        assert sorted(name for names in by_stage.values() for name in names) == everything
        checkpoint = saved
    back = tmp_path / "back"
    assert cli.run(["convert", "megatron-to-hf", str(checkpoint), str(back), "--quiet"]) == 0
    assert cli.run(["convert", "verify", str(hf), str(back), "--quiet"]) == 0


def test_training_starts_from_fused_experts(tmp_path):
    """Every rank has the same weights as from a folder in which each expert is by itself."""
    apart = make_model(tmp_path / "hf", MODELS["moe"], torch.float32)
    tensors = load_file(apart / "model.safetensors")
    for layer in range(ATTENTION["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.mlp.experts."
        gate, up, down = (
            torch.stack([tensors.pop(f"{prefix}{expert}.{name}_proj.weight") for expert in range(4)])
            for name in ("gate", "up", "down")
        )
        tensors |= {f"{prefix}gate_up_proj": torch.cat([gate, up], dim=1), f"{prefix}down_proj": down}
    fused = tmp_path / "fused"
    fused.mkdir()
    (fused / "config.json").write_text((apart / "config.json").read_text())
    save_file(tensors, fused / "model.safetensors", {"format": "pt"})
    saved = tmp_path / "saved"
    arguments = ["--hf-checkpoint", str(fused), "--save", str(saved), *TP2_PP2_EP2.split()]
    results = launch(PROGRAMS / "conversion.py", 4, arguments, TIMEOUT_S, tmp_path / "run")
    assert not any(len(result["wrong"]) for result in results)
    assert cli.run(["convert", "verify", str(apart), str(saved), "--quiet"]) == 0
