"""Checkpoints of Megatron's distributed optimizer with torch's Adam, which a patch to megatron-core repairs.

Two data-parallel ranks over gloo save before the first step, step, save, load into new objects and step on;
every parameter must equal that of an uninterrupted run, bit for bit.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.distributed.programs.common import hand_back, join_ranks
from tests.support.launch import TIMEOUT_S, launch

WORLD_SIZE = 2
SHARDING = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
}


class Trainer:
    """A three-layer network under DDP and the distributed optimizer; every instance starts the same."""

    def __init__(self) -> None:
        import torch
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.transformer.module import MegatronModule
        from megatron.core.transformer.transformer_config import TransformerConfig

        class Network(MegatronModule):
            def __init__(self, config: TransformerConfig) -> None:
                super().__init__(config)
                self.first = torch.nn.Linear(8, 16)
                self.second = torch.nn.Linear(16, 16)
                self.third = torch.nn.Linear(16, 16)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))

            def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
                from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

                return make_sharded_tensors_for_checkpoint(self.state_dict(keep_vars=True), prefix)

        torch.manual_seed(1)
        config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
        self.network = Network(config)
        ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
        self.model = DistributedDataParallel(config, ddp_config, self.network)
        optimizer_config = OptimizerConfig(
            optimizer="adam", lr=1e-2, weight_decay=0.1, clip_grad=1.0, use_distributed_optimizer=True
        )
        self.optimizer = get_megatron_optimizer(optimizer_config, [self.model])

    def step(self, iteration: int) -> None:
        import torch

        generator = torch.Generator().manual_seed(100 * iteration + torch.distributed.get_rank())
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.model(torch.randn(6, 8, generator=generator)).square().mean().backward()
        self.model.finish_grad_sync()
        succeeded, _, _ = self.optimizer.step()
        assert succeeded

    def state(self, is_loading: bool) -> dict:
        model = self.network.sharded_state_dict()
        optimizer = self.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=SHARDING)
        return {"model": model, "optimizer": optimizer}

    def save(self, folder: Path) -> None:
        from megatron.core import dist_checkpointing

        folder.mkdir(exist_ok=True)
        dist_checkpointing.save(self.state(is_loading=False), str(folder))

    def load(self, folder: Path) -> None:
        from megatron.core import dist_checkpointing

        state = dist_checkpointing.load(self.state(is_loading=True), str(folder))
        self.network.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def adam_steps(self) -> list[float]:
        """`step` of each parameter shard; the tensors must be distinct objects."""
        optimizers = getattr(self.optimizer, "chained_optimizers", [self.optimizer])
        states = [state for wrapper in optimizers for state in wrapper.optimizer.state.values()]
        steps = [state["step"] for state in states]
        assert len({step.data_ptr() for step in steps}) == len(steps) > 1
        return [step.item() for step in steps]

    def parameters(self) -> list:
        return [parameter.detach().clone() for parameter in self.network.parameters()]


def run_rank(folder: Path) -> None:
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    join_ranks()
    parallel_state.initialize_model_parallel()

    uninterrupted = Trainer()
    after = []
    for iteration in range(4):
        uninterrupted.step(iteration)
        after.append(uninterrupted.parameters())

    first = Trainer()
    first.save(folder / "0")  # before the first step
    for iteration in range(2):
        first.step(iteration)
    first.save(folder / "2")

    for start in (0, 2):
        resumed = Trainer()
        resumed.step(9)  # anything, so that what is loaded must replace it
        resumed.load(folder / str(start))
        assert set(resumed.adam_steps()) == {float(start)}
        for iteration in range(start, 4):
            resumed.step(iteration)
            for expected, actual in zip(after[iteration], resumed.parameters(), strict=True):
                assert torch.equal(expected, actual), f"from {start}, iteration {iteration}"
        assert set(resumed.adam_steps()) == {4.0}

    fresh = Trainer()  # loads with an optimizer that has no state yet
    fresh.load(folder / "2")
    fresh.step(2)
    assert all(torch.equal(a, b) for a, b in zip(after[2], fresh.parameters(), strict=True))
    assert not torch.equal(after[2][0], after[3][0])
    hand_back(equal=True)
    dist.barrier()
    dist.destroy_process_group()


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    results = launch(Path(__file__), WORLD_SIZE, [str(tmp_path)], TIMEOUT_S, tmp_path / "ranks")
    assert all(result["equal"] for result in results)


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))
