"""Log-probs of every sampled token by transformers, the reference; no Megatron in this process.

With --make-model a random model of that kind is written to the folder first, with --sizes in other sizes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from common import hand_back, read_samples
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_vespo.types import TrainingSample

SIZES = {
    "vocab_size": 131,  # prime: every tensor-parallel size pads it
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.05,
    "tie_word_embeddings": False,
}
EXPERTS = {"moe_intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True}
LLAMA3 = {
    "rope_theta": 500_000.0,
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
QWEN3_MOE = "qwen3 moe"
MODELS = {
    QWEN3_MOE: ("qwen3_moe", EXPERTS),
    "qwen3": ("qwen3", {}),
    # of GLM-4.5 in small: a dense layer, shared experts, half of a head is rotated
    "glm4 moe": (
        "glm4_moe",
        {
            "moe_intermediate_size": 48,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 1.5,
            "norm_topk_prob": True,
            "attention_bias": True,
            "use_qk_norm": True,
            "num_nextn_predict_layers": 0,
        },
    ),
    # the 1B of Llama 3.2 in small
    "llama, tied": (
        "llama",
        {"tie_word_embeddings": True, "rope_parameters": LLAMA3, "max_position_embeddings": 131_072},
    ),
}


def make_model(folder: Path, kind: str, sizes: dict) -> None:
    model_type, more = MODELS[kind]
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SIZES | more | sizes)
    model = AutoModelForCausalLM.from_config(config).float()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):  # not all ones, so that a norm in the wrong place shows
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith("_proj.bias"):
            torch.nn.init.uniform_(parameter, -0.1, 0.1)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):  # enough to change which experts are chosen
            torch.nn.init.uniform_(buffer, -0.1, 0.1)
    model.save_pretrained(folder)


@torch.no_grad()
def log_probs(model: torch.nn.Module, sample: TrainingSample) -> np.ndarray:
    tokens = torch.from_numpy(sample.token_ids)
    logits = model(tokens[None]).logits[0].float() / sample.temperature
    predicting = logits[sample.prompt_length - 1 : -1].log_softmax(-1)
    of_tokens = predicting.gather(1, tokens[sample.prompt_length :, None])[:, 0]
    return of_tokens[torch.from_numpy(sample.sampled_mask())].numpy()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--samples", type=Path, required=True)
    parser.add_argument("--make-model", nargs="?", const=QWEN3_MOE, choices=MODELS)
    parser.add_argument("--sizes", type=json.loads, default={}, help="fields of its configuration, as JSON")
    options = parser.parse_args()
    if options.make_model:
        make_model(options.model, options.make_model, options.sizes)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    hand_back(
        log_probs=np.concatenate([log_probs(model, sample) for sample in read_samples(options.samples)])
    )


if __name__ == "__main__":
    main()
