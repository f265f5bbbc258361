"""Computes the CPU memory that training uses on a node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vespo.arguments.train_settings import TrainSettings
from megatron_vespo.commands.plan.packs import pack_bytes, sample_bytes
from megatron_vespo.commands.plan.trainer_memory import TrainerMemory
from megatron_vespo.models.stage import Stage

# an offloaded optimizer has four fp32 numbers per parameter; a checkpoint omits the gradient
SAVED_SHARE = 3 / 4


@dataclass(frozen=True)
class HostMemory:
    """Bytes of the fullest rank; the node's ranks share `samples`. The processes themselves are extra."""

    packs: float  # of a rollout batch
    optimizer: float  # offloaded permanently
    given_back: float  # weights and optimizer, while engines generate on the GPU
    other_policies: float  # pi_old's and the reference's copies of the weights
    save: float  # copies that a background save writes
    samples: float  # of a rollout batch in the driver, and of one mini-batch in Ray's object store
    ranks: int  # on the node

    @property
    def rank(self) -> float:
        return self.packs + self.optimizer + self.given_back + self.other_policies + self.save

    @property
    def node(self) -> float:
        return self.ranks * self.rank + self.samples


def host_memory(
    settings: TrainSettings,
    stages: Sequence[Stage],
    trainer: Sequence[TrainerMemory],
    sample_tokens: float,
    gpus_per_node: int,
) -> HostMemory:
    """`sample_tokens` is the mean per sample."""
    tokens = settings.rollout.rollout_batch_size * settings.rollout.group_size * sample_tokens
    local = tokens / settings.trainer.data_parallel_size / settings.trainer.context_parallel_size
    weights = max(memory.weights for memory in trainer)
    optimizer = max(memory.optimizer for memory in trainer)
    offloaded = max(memory.host for memory in trainer)
    return HostMemory(
        packs=local * max(pack_bytes(settings, stage.layers) for stage in stages),
        optimizer=offloaded,
        given_back=weights + optimizer if settings.sync.colocate and settings.sync.colocate_offload else 0.0,
        other_policies=weights * _policies(settings),
        save=weights * _saved(settings) + optimizer + SAVED_SHARE * offloaded
        if settings.trainer.async_save
        else 0.0,
        samples=tokens * (1 + 1 / settings.rollout.steps_per_rollout) * sample_bytes(settings),
        ranks=min(gpus_per_node, settings.trainer.trainer_ranks),
    )


def _policies(settings: TrainSettings) -> float:
    """Copies of the weights for other policies, plus one of the policy while another is in its place."""
    loss, copies = settings.loss, 0.0
    if loss.old_policy == "snapshot":
        copies += loss.old_policy_snapshots
    if loss.old_policy == "ewma":
        copies += 4 / settings.trainer.params_dtype.itemsize
    if loss.uses_reference:
        copies += 1
    return copies + 1 if copies else 0.0


def _saved(settings: TrainSettings) -> int:
    """Policies in a checkpoint: a moving reference is saved, too."""
    return 1 if settings.loss.reference_update_interval is None else 2
