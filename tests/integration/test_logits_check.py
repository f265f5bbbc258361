"""`--check-logits`: transformers and Megatron agree on a converted model, and a wrong weight is noticed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_vespo.commands.convert.logits_check import check_logits
from megatron_vespo.models.family import family_of, shape_of
from tests.support.tiny_checkpoints import convert, write_hf

# deeper than what is compared
NUMBERS = {
    "num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 131072, "rms_norm_eps": 1e-6,
    "vocab_size": 131, "hidden_act": "silu", "rope_theta": 500000.0, "tie_word_embeddings": False,
}  # fmt: skip
MODELS = {
    "Qwen3MoeForCausalLM": {
        "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
    },
    # the first layer with experts is the third
    "Glm4MoeForCausalLM": {
        "model_type": "glm4_moe", "num_hidden_layers": 4, "first_k_dense_replace": 2, "n_routed_experts": 4,
        "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True,
        "routed_scaling_factor": 2.5, "attention_bias": True, "use_qk_norm": True,
        "num_nextn_predict_layers": 1,
    },
    "LlamaForCausalLM": {
        "model_type": "llama", "tie_word_embeddings": True,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
}  # fmt: skip


def make_model(folder: Path, architecture: str, swap: bool = False) -> Path:
    config = {"architectures": [architecture], **NUMBERS, **MODELS[architecture]}
    draw = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in family_of(config).hf_tensors(shape_of(config)).items():
        values = torch.randn(shape, generator=draw) * 0.1
        tensors[name] = values + 1 if "norm" in name else values
    if swap:
        norms = [f"model.layers.1.{name}_layernorm.weight" for name in ("input", "post_attention")]
        tensors[norms[0]], tensors[norms[1]] = tensors[norms[1]], tensors[norms[0]]
    return write_hf(folder, config, tensors)


@pytest.mark.parametrize("architecture", MODELS)
def test_both_sides_agree(architecture, tmp_path, capsys):
    hf = make_model(tmp_path / "hf", architecture)
    assert convert("hf-to-megatron", hf, tmp_path / "megatron", "--check-logits", 48) == 0
    layers = 3 if architecture == "Glm4MoeForCausalLM" else 2
    assert f"logits of 48 tokens after {layers} layers differ by" in capsys.readouterr().out


def test_exchanged_norms_are_noticed(tmp_path):
    hf = make_model(tmp_path / "hf", "LlamaForCausalLM")
    wrong = make_model(tmp_path / "wrong", "LlamaForCausalLM", swap=True)
    assert convert("hf-to-megatron", wrong, tmp_path / "megatron") == 0
    with pytest.raises(ValueError, match="the proof fails: logits of 16 tokens"):
        check_logits(hf, tmp_path / "megatron" / "release", 16)
