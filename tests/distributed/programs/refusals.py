"""What MegatronPolicy says to inputs it must refuse, on one rank: {case: message}."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from common import hand_back, make_policy, start_program

from megatron_vespo.types import TrainingSample


def message(call: Callable) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "accepted"


def broken_samples(sample: TrainingSample, vocab_size: int) -> dict[str, TrainingSample]:
    def with_log_prob(value: float) -> TrainingSample:
        log_probs = sample.behavior_log_probs.copy()
        log_probs[1:3] = value
        return replace(sample, behavior_log_probs=log_probs)

    return {
        "nan log-prob": with_log_prob(np.nan),
        "infinite log-prob": with_log_prob(-np.inf),
        "missing log-prob": replace(sample, behavior_log_probs=sample.behavior_log_probs[:-1]),
        "nan advantage": replace(sample, advantage=float("nan")),
        "temperature 0": replace(sample, temperature=0.0),
        "no prompt": replace(sample, prompt_length=0),
        "no completion": replace(sample, prompt_length=sample.num_tokens),
        "unknown token": replace(sample, token_ids=np.append(sample.token_ids[:-1], vocab_size)),
    }


def main() -> None:
    options, policy, samples = start_program(broken_models=Path, expert_parallel_checkpoint=str)
    args = policy.args
    from megatron.training.checkpointing import save_checkpoint

    save_checkpoint(1, policy.model, policy.optimizer, policy.scheduler, 0)  # by Megatron alone
    results = {"good samples": message(lambda: policy.pack(samples))}
    for case, broken in broken_samples(samples[5], args.vocab_size).items():
        changed = [*samples[:5], broken, *samples[6:]]
        results[case] = message(lambda: policy.pack(changed))  # noqa: B023
        results[f"{case}, ratio"] = message(lambda: policy.sequence_log_ratio(changed, "rollout"))  # noqa: B023
    results["denominator"] = message(lambda: policy.sequence_log_ratio(samples, "recomputed"))

    for folder in sorted(options.broken_models.iterdir()):
        args.hf_checkpoint = folder
        results[folder.name] = message(lambda: make_policy(args))
    for case, checkpoint in (("foreign", args.save), ("expert parallel", options.expert_parallel_checkpoint)):
        args.load = checkpoint
        results[case] = message(lambda: make_policy(args))

    args.expert_model_parallel_size, args.decoupled_lr, learning_rate, args.lr = 2, 1e-4, args.lr, 0.5
    results["learning rate"] = message(lambda: make_policy(args))
    args.decoupled_lr, args.lr, args.optimizer = None, learning_rate, "sgd"
    results["optimizer"] = message(lambda: make_policy(args))
    args.expert_model_parallel_size, args.optimizer = 1, "adam"

    args.no_load_optim = True
    resumed = make_policy(args)
    results["iteration"] = resumed.iteration
    results["log_probs"] = np.concatenate(resumed.log_probs(samples))
    hand_back(**results)


if __name__ == "__main__":
    main()
