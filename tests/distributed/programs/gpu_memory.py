"""A trainer rank's memory: packs of rollout batches of two sizes, and turns in which it gives all of it back.

What would be on a GPU is told apart here by where it was made: `to_device` copies, and what is neither made
by `build_micro_batch` nor by `to_host` counts as being there, too.
"""

from __future__ import annotations

import argparse
import gc
import os
import weakref
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from common import FLAGS, hand_back, read_samples

from megatron_vespo.arguments.parse import parse_settings
from megatron_vespo.cluster.trainer_worker import TrainerWorker

BLOCK = 64 * 1024  # several of them, with tensors across their ends


class Observed:
    """Storages by the place where they were made, as long as they live."""

    def __init__(self):
        self.host: set[int] = set()
        self.device: weakref.WeakSet = weakref.WeakSet()
        self.peak = 0

    def made_on_host(self, function):
        def observed(*arguments, **named):
            result = function(*arguments, **named)
            tensors = [result] if isinstance(result, torch.Tensor) else tensors_of(result)
            self.host |= {tensor.untyped_storage()._cdata for tensor in tensors}
            return result

        return observed

    def to_device(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        copy = tensor.to(device, copy=True)
        self.device.add(copy)
        self.peak = max(self.peak, self.on_device)
        return copy

    @property
    def on_device(self) -> int:
        return sum(tensor.nbytes for tensor in self.device)

    def device_bytes(self, packs: list) -> int:
        """Of packs that have been prepared, and of copies that somebody still holds."""
        gc.collect()
        held = [tensor for pack in packs for tensor in tensors_of(pack)]
        strange = [t.nbytes for t in held if t.untyped_storage()._cdata not in self.host]
        return sum(strange) + self.on_device


def tensors_of(pack) -> list[torch.Tensor]:
    values = [*vars(pack).values(), *pack.old_routes.values()]
    return [value for value in values if isinstance(value, torch.Tensor)]


def start_worker(folder: Path, flags: list[str]) -> TrainerWorker:
    rank, port = int(os.environ["RANK"]), int(os.environ["MASTER_PORT"])
    settings = parse_settings([*FLAGS, "--trainer-ranks", os.environ["WORLD_SIZE"], *flags])
    with mock.patch("megatron_vespo.cluster.trainer_worker.redirect_output"):
        worker = TrainerWorker(settings, rank, folder, True, {})
    worker.start("127.0.0.1", port)
    return worker


def prepare(worker: TrainerWorker, mini_batches: list) -> None:
    """What TrainerGroup.prepare does on one rank."""
    from megatron_vespo.checkpoints.canary_file import canaries_of
    from megatron_vespo.data.shards import MiniBatchOutline, Shard

    rule, rank = worker.place()
    for index, samples in enumerate(mini_batches):
        outline = MiniBatchOutline.of(samples, rule)
        worker.take(index, outline, Shard.of(samples, outline.cut.of_rank(rank)))
    worker.prepare(canaries_of(mini_batches[-1]))


def packs_of_batches(worker: TrainerWorker, samples: list) -> dict:
    """Bytes on the device and on the host after `prepare`, and the most in between, for two sizes."""
    from megatron_vespo.data import micro_batch
    from megatron_vespo.trainer import mini_batch, policy, routing_replay

    observed = Observed()
    build, to_host = observed.made_on_host(mini_batch.build_micro_batch), policy.to_host
    results = {}
    with (
        mock.patch.object(micro_batch, "to_device", observed.to_device),
        mock.patch.object(routing_replay, "to_device", observed.to_device),
        mock.patch.object(mini_batch, "build_micro_batch", build),
        mock.patch.object(policy, "to_host", observed.made_on_host(to_host)),
        mock.patch.object(routing_replay, "to_host", observed.made_on_host(to_host)),
    ):
        for size in (1, 4):
            observed.peak = 0
            prepare(worker, [samples] * size)
            packs = [pack for prepared in worker._prepared for pack in prepared.micro_batches]
            results |= {
                f"{size}: device": observed.device_bytes(packs),
                f"{size}: host": sum(pack.nbytes for pack in packs),
                f"{size}: peak": observed.peak,
                f"{size}: packs": len(packs),
            }
            worker.train_step(0)
            results[f"{size}: device after a step"] = observed.device_bytes(packs)
    return results


def held(worker: TrainerWorker) -> dict[str, int]:
    """Bytes that storages have."""
    from megatron_vespo.trainer.memory import storages

    memory = worker._memory
    return {
        "weights": sum(storage.nbytes() for storage in storages(memory._weight_tensors())),
        "optimizer": sum(storage.nbytes() for storage in storages(memory._optimizer_tensors())),
        "gradients": sum(
            buffer.grad_data.untyped_storage().nbytes()
            for chunk in worker.policy.model
            for buffer in chunk.buffers + chunk.expert_parallel_buffers
        ),
    }


def values(worker: TrainerWorker) -> list[torch.Tensor]:
    memory = worker._memory
    tensors = [*memory._weight_tensors(), *memory._optimizer_tensors()]
    return [tensor.detach().clone() for tensor in tensors]


def turns(worker: TrainerWorker, samples: list, target: Path) -> dict:
    """Two steps, an engine's turn with log-probs, a save and an export in it, and two steps more."""
    results = {}

    def note(when: str) -> None:
        results.update({f"{when}: {name}": size for name, size in held(worker).items()})

    def steps() -> list[float]:
        prepare(worker, [samples, samples])
        return [worker.train_step(index)["loss"] for index in range(2)]

    losses = steps()
    note("at work")
    log_probs = np.concatenate(worker.log_probs(samples))
    weights = [tensor.clone() for _, tensor in worker.policy.named_hf_weights()]
    before = values(worker)  # complete now, also with --overlap-param-gather
    worker.offload(keep_weights=True)
    note("in a sync")
    sent = [tensor for _, tensor in worker.policy.named_hf_weights()]
    results["sent"] = all(torch.equal(a, b) for a, b in zip(weights, sent, strict=True))
    worker.offload(keep_weights=False)
    note("at rest")
    results["log-probs"] = np.array_equal(np.concatenate(worker.log_probs(samples)), log_probs)
    note("for log-probs")
    worker.offload(keep_weights=False)
    worker.save({"iteration": 2, "consumed_prompts": 7}, None)
    note("for a save")
    worker.offload(keep_weights=False)  # while it is written, with --async-save
    worker.finish_save()
    worker.export_hf(target)
    worker.offload(keep_weights=False)
    note("at rest again")
    worker._memory.onload()
    pairs = zip(before, values(worker), strict=True)
    results["restored"] = all(torch.equal(then, now) for then, now in pairs)
    worker.offload(keep_weights=False)
    losses += steps()
    return results | {"losses": losses, "log-probs after": np.concatenate(worker.log_probs(samples))}


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--samples", type=Path, required=True)
    parser.add_argument("--folder", type=Path)  # for turns
    options, flags = parser.parse_known_args()
    if options.folder:
        flags += ["--save", str(options.folder / "saved"), "--load", str(options.folder / "saved")]
    worker = start_worker(options.samples.parent, flags)
    samples = read_samples(options.samples)[: worker.policy.args.global_batch_size]
    if options.folder is None:
        hand_back(**packs_of_batches(worker, samples))
        return
    from megatron_vespo.trainer import memory

    memory.BLOCK = BLOCK
    if worker.policy.iteration:  # resumed: what a checkpoint has brought is given back and taken, too
        worker.offload(keep_weights=False)
        note = held(worker)
        prepare(worker, [samples, samples])
        losses = [worker.train_step(index)["loss"] for index in range(2)]
        hand_back(losses=losses, **note, **{"log-probs after": np.concatenate(worker.log_probs(samples))})
        return
    hand_back(**turns(worker, samples, options.folder / "hf"))


if __name__ == "__main__":
    main()
