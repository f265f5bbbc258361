"""One optimizer step under each ratio denominator, after another step has moved the weights; on one rank."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from common import hand_back, make_policy, read_samples, start_megatron


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--samples", type=Path, required=True)
    options, flags = parser.parse_known_args()
    args = start_megatron(flags)
    from megatron_vespo.algorithms.vespo import RATIO_DENOMINATORS

    policy = make_policy(args)
    samples = read_samples(options.samples)
    results = {}
    for denominator in RATIO_DENOMINATORS:
        policy.use_loss(replace(policy.settings, ratio_denominator=denominator))
        old_log_probs = policy.log_probs(samples)
        mini_batch = policy.pack(samples)
        if denominator != "rollout":
            policy.compute_old_log_probs(mini_batch)
        policy.train_step(mini_batch)
        log_probs = policy.log_probs(samples)
        results[f"{denominator} old_log_probs"] = np.concatenate(old_log_probs)
        results[f"{denominator} log_probs"] = np.concatenate(log_probs)
        for name, value in vars(policy.train_step(mini_batch)).items():
            results[f"{denominator} {name}"] = value
    hand_back(**results)


if __name__ == "__main__":
    main()
