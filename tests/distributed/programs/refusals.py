"""What MegatronPolicy says to inputs it must refuse, on one rank: {case: message}."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from common import hand_back, make_policy, start_program


def message(call: Callable) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "accepted"


def main() -> None:
    options, policy, samples = start_program(broken_models=Path, expert_parallel_checkpoint=str)
    args = policy.args
    from megatron.training.checkpointing import save_checkpoint

    save_checkpoint(1, policy.model, policy.optimizer, policy.scheduler, 0)  # by Megatron alone
    results = {"denominator": message(lambda: policy.sequence_log_ratio(samples, "recomputed"))}

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
