"""Two optimizer steps, and before them all that must be the same with Transformer Engine as without it."""

from __future__ import annotations

import hashlib

import numpy as np

from tests.distributed.programs.common import hand_back, start_policy


def main() -> None:
    policy, samples = start_policy()
    from megatron.core.utils import unwrap_model

    from megatron_vespo.trainer.capabilities import describe
    from megatron_vespo.trainer.gradient_norms import gradient_norms
    from megatron_vespo.trainer.weights import global_parameters

    exported = {name: digest(tensor) for name, tensor in policy.named_hf_weights()}
    results = {"log_probs": np.concatenate(policy.log_probs(samples))}
    mini_batch = policy.pack(samples)
    policy.compute_old_log_probs(mini_batch)
    outputs = policy.forward_backward(mini_batch)
    norms = gradient_norms(policy.model, policy.groups)
    fused = {
        name: parameter.grad_added_to_main_grad
        for chunk in policy.model
        for name, parameter in global_parameters(unwrap_model(chunk), policy.groups)
    }
    steps = [policy.optimizer_step(mini_batch, outputs)]
    mini_batch = policy.pack(samples)
    policy.compute_old_log_probs(mini_batch)
    steps.append(policy.train_step(mini_batch))
    hand_back(
        **results,
        log_probs_after=np.concatenate(policy.log_probs(samples)),
        exported=np.array(list(exported)),
        digests=np.array(list(exported.values())),
        names=np.array(list(norms)),
        norms=np.array(list(norms.values())),
        parameters=np.array(list(fused)),
        fused=np.array(list(fused.values())),
        loss=np.array([step.loss for step in steps]),
        grad_norm=np.array([step.grad_norm for step in steps]),
        output_layer_fused=[
            chunk.output_layer.gradient_accumulation_fusion
            for chunk in unwrap_model(policy.model)
            if chunk.post_process
        ],
        capabilities=np.array(describe(policy.args)),
        adam=type(policy.optimizer.chained_optimizers[0].optimizer).__module__,
    )


def digest(tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(tensor.numpy().tobytes()).hexdigest()}"


if __name__ == "__main__":
    main()
