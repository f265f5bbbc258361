"""HF -> Megatron -> HF, bit for bit, through Megatron's own load and save at several layouts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_vespo.models.family import family_of, shape_of
from tests.support.launch import PROGRAMS, TIMEOUT_S, launch
from tests.support.tiny_checkpoints import convert, random_tensors, write_hf

ATTENTION = {
    "num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 128, "rms_norm_eps": 1e-6,
    "vocab_size": 131, "rope_theta": 10000, "hidden_act": "silu",
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
GLM = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True,
    "n_shared_experts": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "attention_bias": True,
    "use_qk_norm": True,
}  # fmt: skip
MODELS = {
    "glm": {"architectures": ["Glm4MoeForCausalLM"], "tie_word_embeddings": False, **ATTENTION, **GLM},
    "glm, all experts": {
        "architectures": ["Glm4MoeForCausalLM"],
        "tie_word_embeddings": True,
        **ATTENTION,
        **GLM,
        "first_k_dense_replace": 0,
        "use_qk_norm": False,
        "attention_bias": False,
    },
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
    "glm, fp32": ("glm", torch.float32, [(1, ""), (4, TP2_PP2_EP2)]),
    "glm, bf16": ("glm", torch.bfloat16, [(4, TP2_PP2_EP2), (1, "")]),
    "glm, all experts, bf16": ("glm, all experts", torch.bfloat16, [(2, VPP2), (4, TP2_PP2_EP2)]),
    "dense, bf16": ("dense", torch.bfloat16, [(4, TP2_PP2), (1, "")]),
    "llama, tied, fp32": ("llama, tied", torch.float32, [(2, VPP2), (4, TP2_PP2)]),
}


def make_model(folder: Path, model: str, dtype: torch.dtype) -> Path:
    return write_hf(folder, MODELS[model], random_tensors(MODELS[model], dtype))


@pytest.mark.parametrize("case", CASES)
def test_round_trip_through_megatron(case, tmp_path):
    model, dtype, layouts = CASES[case]
    hf, checkpoint = make_model(tmp_path / "hf", model, dtype), tmp_path / "megatron"
    assert convert("hf-to-megatron", hf, checkpoint) == 0
    everything = sorted(family_of(MODELS[model]).hf_tensors(shape_of(MODELS[model])))
    for number, (num_ranks, flags) in enumerate(layouts):
        saved = tmp_path / f"saved{number}"
        arguments = f"--hf-checkpoint {hf} --load {checkpoint} --save {saved} --no-load-optim".split()
        arguments += [*flags.split(), *(["--bf16"] if dtype == torch.bfloat16 else [])]
        results = launch(
            PROGRAMS / "conversion.py", num_ranks, arguments, TIMEOUT_S, tmp_path / f"run{number}"
        )
        assert not any(len(result["wrong"]) for result in results), [list(r["wrong"])[:3] for r in results]
        by_stage = {int(result["stage"]): result["names"].tolist() for result in results}
        assert sorted(name for names in by_stage.values() for name in names) == everything
        checkpoint = saved
    back = tmp_path / "back"
    assert convert("megatron-to-hf", checkpoint, back) == 0
    assert convert("verify", hf, back) == 0


def test_training_starts_from_fused_experts(tmp_path):
    """Every rank has the same weights as from a folder in which each expert is by itself."""
    apart = make_model(tmp_path / "hf", "moe", torch.float32)
    tensors = load_file(apart / "model.safetensors")
    for layer in range(ATTENTION["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.mlp.experts."
        gate, up, down = (
            torch.stack([tensors.pop(f"{prefix}{expert}.{name}_proj.weight") for expert in range(4)])
            for name in ("gate", "up", "down")
        )
        tensors |= {f"{prefix}gate_up_proj": torch.cat([gate, up], dim=1), f"{prefix}down_proj": down}
    fused = write_hf(tmp_path / "fused", MODELS["moe"], tensors)
    saved = tmp_path / "saved"
    arguments = ["--hf-checkpoint", str(fused), "--save", str(saved), *TP2_PP2_EP2.split()]
    results = launch(PROGRAMS / "conversion.py", 4, arguments, TIMEOUT_S, tmp_path / "run")
    assert not any(len(result["wrong"]) for result in results)
    assert convert("verify", apart, saved) == 0
