"""Twenty optimizer steps of a tiny model on one rank, every number at full precision.

Weights and samples come from numpy's generator, which is the same everywhere.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import torch

from megatron_vespo.types import TrainingSample
from tests.support.builders import make_sample

NUM_STEPS, MINI_BATCHES, NUM_SAMPLES, VOCAB_SIZE = 20, 2, 192, 131
# Adam's epsilon is far above most gradients: dividing tiny ones by themselves would blow their rounding up
FLAGS = (
    "--prompt-data unused --output-dir unused --train-iters 20 --lr 2e-4 --adam-eps 1e-2 "
    "--steps-per-rollout 2 --rollout-batch-size 48 --group-size 4 --max-prompt-tokens 16 "
    "--max-completion-tokens 32 --max-tokens-per-gpu 1024 --log-prob-chunk-size 256"
).split()
COLUMNS = ("loss", "grad_norm", "entropy", "phi_mean")


def make_model(folder: Path) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        mlp_only_layers=[],
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    draw = np.random.default_rng(0)
    model = Qwen3MoeForCausalLM(config).float()
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            mean, deviation = (1.0, 0.2) if name.endswith("norm.weight") else (0.0, 0.05)
            values = draw.normal(mean, deviation, parameter.shape).astype(np.float32)
            parameter.copy_(torch.from_numpy(values))
    model.save_pretrained(folder)


def make_samples() -> list[TrainingSample]:
    draw = np.random.default_rng(1)
    samples = []
    for i in range(NUM_SAMPLES):
        prompt, completion = int(draw.integers(1, 17)), int(draw.integers(4, 33))
        samples.append(
            make_sample(
                *np.split(draw.integers(0, VOCAB_SIZE, prompt + completion), [prompt]),
                behavior_log_probs=np.full(completion, -4.9, np.float32),
                advantage=float(draw.normal(0.5)),  # both signs, and sums that do not cancel
                group_id=i // 4,
            )
        )
    return samples


def main() -> None:
    folder = Path(sys.argv[1])
    from megatron_vespo.algorithms.losses.settings import LossSettings
    from megatron_vespo.arguments.parse import parse_args
    from megatron_vespo.trainer.initialize import initialize
    from megatron_vespo.trainer.policy import MegatronPolicy

    args = parse_args(["--hf-checkpoint", str(folder), *FLAGS])
    args = initialize(args, 0, 0, "127.0.0.1", int(os.environ["MASTER_PORT"]))
    policy, samples, steps = MegatronPolicy(args, LossSettings.of(args)), make_samples(), []
    size = NUM_SAMPLES // MINI_BATCHES
    while policy.iteration < NUM_STEPS:
        prepared = [policy.pack(samples[i : i + size]) for i in range(0, NUM_SAMPLES, size)]
        for mini_batch in prepared:
            policy.compute_old_log_probs(mini_batch)
        steps += [policy.train_step(mini_batch) for mini_batch in prepared]
    rows = [(s.loss, s.grad_norm, s.entropy, s.weight.mean(dtype=np.float64)) for s in steps]
    np.savez(os.environ["RESULT_FILE"], curve=np.array(rows, np.float64))


if __name__ == "__main__":
    main()
