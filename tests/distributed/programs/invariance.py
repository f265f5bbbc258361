"""The same mini-batch, cut, ordered and chunked in many ways, on one rank; the weights never move."""

from __future__ import annotations

import json
import random

import numpy as np
from common import hand_back, start_program


def main() -> None:
    options, policy, samples = start_program("--lr", "0", variants=json.loads)
    from megatron_vespo.algorithms.vespo import RATIO_DENOMINATORS
    from megatron_vespo.trainer.gradient_norms import gradient_norms

    args = policy.args
    samples = samples[: args.global_batch_size]
    for sample, old in zip(samples, policy.log_probs(samples), strict=True):
        # half-way to the engine's: both parts of log W are there
        sample.old_log_probs = (old + sample.behavior_log_probs) / 2
    results = {}
    for name, (args.max_tokens_per_gpu, args.log_prob_chunk_size, seed) in options.variants.items():
        order = list(range(len(samples)))
        if seed is not None:
            random.Random(seed).shuffle(order)
        mini_batch = policy.pack([samples[i] for i in order])
        outputs = policy.forward_backward(mini_batch)
        norms = gradient_norms(policy.model, policy.groups)
        step = policy.optimizer_step(mini_batch, outputs)
        results[f"{name} log_w"] = step.log_w[np.argsort(order)]
        results[f"{name} loss"], results[f"{name} grad_norm"] = step.loss, step.grad_norm
        results[f"{name} gradient_norms"] = np.array([norms[key] for key in sorted(norms)])
        results[f"{name} micro_batches"] = len(mini_batch.micro_batches)
        for denominator in RATIO_DENOMINATORS:
            log_ratio = policy.sequence_log_ratio([samples[i] for i in order], denominator)
            results[f"{name} {denominator}"] = log_ratio[np.argsort(order)]
    hand_back(**results)


if __name__ == "__main__":
    main()
