"""Gradient norms by name after one backward pass, and what Megatron's optimizer says of the same gradient."""

from __future__ import annotations

import numpy as np
import torch.distributed as dist
from common import hand_back, start_policy


def main() -> None:
    policy, samples = start_policy()
    from megatron.core.utils import unwrap_model

    from megatron_vespo.trainer.gradient_norms import gradient_norms
    from megatron_vespo.trainer.weights import global_parameters

    mini_batch = policy.pack(samples)
    policy.compute_old_log_probs(mini_batch)
    outputs = policy.forward_backward(mini_batch)
    norms = gradient_norms(policy.model, policy.groups)
    results = {"names": np.array(list(norms)), "norms": np.array(list(norms.values()))}
    if dist.get_world_size() == 1:
        [chunk] = policy.model
        whole = {
            name: parameter.main_grad.double().norm().item()
            for name, parameter in global_parameters(unwrap_model(chunk), policy.groups)
        }
        results |= {"whole_names": np.array(list(whole)), "whole_norms": np.array(list(whole.values()))}
    step = policy.optimizer_step(mini_batch, outputs)
    results |= {"grad_norm": step.grad_norm, "group_norms": step.gradient_norms}
    hand_back(**results)


if __name__ == "__main__":
    main()
