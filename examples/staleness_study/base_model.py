"""The model that every trial starts from: a small Qwen3-MoE that has learnt to sum from careless teachers.

Their slips, not missing skill, make most of its answers wrong: what reinforcement learning can find is care.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import numpy as np
import qwen3_moe
import running_sum
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sampler import Sampler, sample_responses
from torch import Tensor
from transformers import Qwen3MoeConfig

SEED = 0
BATCH_SIZE = 64
ERROR_SHARE = 0.022  # of the teachers' sums: 0.978^64 = 24% of their responses have none
LEARNING_RATE = 2e-3  # peak; decays linearly to zero, so that the last steps settle the model
WARMUP_STEPS = 50
NUM_STEPS = 500
CHECK_PROMPTS = 1024


def config() -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=running_sum.VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        mlp_only_layers=[],
        router_aux_loss_coef=0.0,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=running_sum.EOS,
        pad_token_id=running_sum.PAD,
        architectures=["Qwen3MoeForCausalLM"],
        dtype="float32",
    )


def initial_weights(model: Qwen3MoeConfig, generator: torch.Generator) -> qwen3_moe.Weights:
    """Normal matrices and norms of one, stacked as `qwen3_moe.logits` wants them."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * model.initializer_range

    hidden, heads = model.hidden_size, model.num_attention_heads * model.head_dim
    groups = model.num_key_value_heads * model.head_dim
    experts, width = model.num_experts, model.moe_intermediate_size
    weights = {
        "model.embed_tokens.weight": normal(model.vocab_size, hidden),
        "model.norm.weight": torch.ones(hidden),
        "lm_head.weight": normal(model.vocab_size, hidden),
    }
    for layer in range(model.num_hidden_layers):
        own = {
            "input_layernorm.weight": torch.ones(hidden),
            "post_attention_layernorm.weight": torch.ones(hidden),
            "self_attn.q_proj.weight": normal(heads, hidden),
            "self_attn.k_proj.weight": normal(groups, hidden),
            "self_attn.v_proj.weight": normal(groups, hidden),
            "self_attn.o_proj.weight": normal(hidden, heads),
            "self_attn.q_norm.weight": torch.ones(model.head_dim),
            "self_attn.k_norm.weight": torch.ones(model.head_dim),
            "mlp.gate.weight": normal(experts, hidden),
            "mlp.experts.gate_up": normal(experts, 2 * width, hidden),
            "mlp.experts.down": normal(experts, hidden, width),
        }
        weights |= {f"model.layers.{layer}.{name}": tensor for name, tensor in own.items()}
    return weights


def warm_start(model: Qwen3MoeConfig) -> tuple[qwen3_moe.Weights, float]:
    """Supervised steps; returns the sampled accuracy too."""
    weights = initial_weights(model, torch.Generator().manual_seed(SEED))
    for tensor in weights.values():
        tensor.requires_grad_()
    optimizer = torch.optim.AdamW(weights.values(), weight_decay=0.0, foreach=True)
    draw = np.random.default_rng(SEED)
    for step in range(1, NUM_STEPS + 1):
        decay = (NUM_STEPS - step + 1) / (NUM_STEPS - WARMUP_STEPS + 1)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(step / WARMUP_STEPS, decay)
        digits = running_sum.draw_digits(draw, BATCH_SIZE)
        prompt = running_sum.prompt_tokens(digits)
        response = running_sum.demonstrations(digits, ERROR_SHARE, draw)
        tokens = torch.from_numpy(np.concatenate([prompt, response], axis=1))
        scores = qwen3_moe.logits(weights, model, tokens[:, :-1])[:, prompt.shape[1] - 1 :]
        loss = F.cross_entropy(scores.flatten(0, 1), torch.from_numpy(response).flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            print(f"warm start, step {step}/{NUM_STEPS}: loss {loss.item():.3f}", flush=True)
    fixed = {name: tensor.detach() for name, tensor in weights.items()}
    prompts = running_sum.prompts(running_sum.draw_digits(np.random.default_rng(SEED + 1), CHECK_PROMPTS))
    completions = sample_responses(Sampler(fixed, model), prompts, SEED)
    return fixed, float(np.mean([completion.reward for completion in completions]))


def make(folder: Path) -> float:
    """Writes an HF checkpoint at `folder` unless it is there; returns its sampled accuracy."""
    stamp = folder / "warm_start.json"
    if stamp.is_file():
        return json.loads(stamp.read_text())["accuracy"]
    model = config()
    weights, accuracy = warm_start(model)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".partial-") as partial:
        target = Path(partial) / "base"
        target.mkdir()
        model.save_pretrained(target)
        save_file(qwen3_moe.unstack_experts(weights), target / "model.safetensors", {"format": "pt"})
        (target / stamp.name).write_text(json.dumps({"accuracy": accuracy, "seed": SEED}) + "\n")
        os.rename(target, folder)
    return accuracy
