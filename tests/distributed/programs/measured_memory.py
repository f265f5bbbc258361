"""What parameters, gradients and optimizer of a rank take, tensor by tensor, after an optimizer step."""

from __future__ import annotations

from common import hand_back, start_policy
from megatron.core.utils import unwrap_model


def main() -> None:
    policy, samples = start_policy()
    mini_batch = policy.pack(samples)
    policy.compute_old_log_probs(mini_batch)
    policy.train_step(mini_batch)
    parameters = [parameter for chunk in unwrap_model(policy.model) for parameter in chunk.parameters()]
    optimizers = getattr(policy.optimizer, "chained_optimizers", [policy.optimizer])
    held = {}
    for optimizer in optimizers:
        inner = optimizer.optimizer
        for group in inner.param_groups:
            for shard in group["params"]:
                tensors = [shard, *inner.state[shard].values()]
                held |= {id(tensor): tensor.nbytes for tensor in tensors if tensor.ndim}
    # fp32 shards are views of the parameters
    views = 0 if policy.args.bf16 else sum(shard.nbytes for o in optimizers for g in o.optimizer.param_groups
                                           for shard in g["params"])  # fmt: skip
    hand_back(
        stage=policy.groups.pp.rank(),
        weights=sum(parameter.nbytes for parameter in parameters),
        gradients=sum(parameter.main_grad.nbytes for parameter in parameters),
        optimizer=sum(held.values()) - views,
    )


if __name__ == "__main__":
    main()
