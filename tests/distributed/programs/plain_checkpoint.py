"""A checkpoint with the arguments of a run, and one whose arguments hold objects that are gone since."""

from __future__ import annotations

import dataclasses
import sys
from types import ModuleType

import numpy as np
from common import hand_back, make_policy, start_policy


@dataclasses.dataclass(frozen=True)
class Gone:
    """As version 0.1 stored its loss among the arguments."""

    function: object
    options: dict


def main() -> None:
    policy, samples = start_policy("--ratio-denominator", "rollout", "--vespo-budget", "1.0")
    from megatron_vespo.trainer.initialize import megatron_arguments

    policy.train_step(policy.pack(samples))
    before = dict(vars(policy.args))
    policy.save({"iteration": 1, "consumed_prompts": 3})
    results = {"changed": [name for name, value in vars(policy.args).items() if before[name] is not value]}

    policy.train_step(policy.pack(samples))
    module = ModuleType("megatron_vespo.algorithms.gone")
    module.Gone = Gone
    Gone.__module__, sys.modules[module.__name__] = module.__name__, module
    with megatron_arguments(loss_function=Gone(Gone, {"kernel": Gone(None, {})})):
        policy.save({"iteration": 2, "consumed_prompts": 5})
    del sys.modules[module.__name__]
    results["log_probs"] = np.concatenate(policy.log_probs(samples))

    args = policy.args
    args.load = args.save
    resumed = make_policy(args)
    assert resumed.rollout_state is not None
    results |= {
        "iteration": resumed.iteration,
        "consumed_prompts": resumed.rollout_state["consumed_prompts"],
        "state": sorted(resumed.rollout_state),
        "resumed_log_probs": np.concatenate(resumed.log_probs(samples)),
    }
    hand_back(**results)


if __name__ == "__main__":
    main()
