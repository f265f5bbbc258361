"""Saves in the background, refused ones and failing ones, with what all ranks say of them."""

from __future__ import annotations

import errno
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch.distributed as dist
from common import hand_back, start_program

SLOW_S = 2.0
BUFFER = b"groups in flight" * 1000


def main() -> None:
    # --small-disk: a file system that fills up while it is written to
    options, policy, samples = start_program("--async-save", small_disk=Path)
    args = policy.args
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    from megatron_vespo.checkpoints import run_folder as checkpoint_folder
    from megatron_vespo.checkpoints.names import BUFFER_NAME, TRACKER_NAME

    samples = samples[: args.global_batch_size]
    results: dict[str, object] = {"buffer": np.frombuffer(BUFFER, np.uint8), "slowed_by": SLOW_S}
    write = FileSystemWriterAsync.write_preloaded_data

    def train_step() -> None:
        policy.train_step(policy.pack(samples))

    def save() -> list:
        files = {BUFFER_NAME: BUFFER if dist.get_rank() == 0 else b""}
        return policy.save({"iteration": policy.iteration, "consumed_prompts": 7}, files)

    def slow(*arguments, **named):
        time.sleep(SLOW_S)
        return write(*arguments, **named)

    def failing_on_rank_1(*arguments, **named):
        if dist.get_rank() == 1:
            return named["local_proc_idx"], OSError(errno.ENOSPC, "No space left on device")
        return write(*arguments, **named)

    def patched(function):
        return mock.patch.object(FileSystemWriterAsync, "write_preloaded_data", staticmethod(function))

    # pi_old is not what this is about
    policy.use_loss(replace(policy.settings, ratio_denominator="rollout"))
    train_step()
    with patched(slow):
        started = time.monotonic()
        assert save() == []
        results["pause"] = time.monotonic() - started
        results["saved_log_probs"] = np.concatenate(policy.log_probs(samples))
        train_step()  # while what was before is written
        assert policy.saver.poll() == [] and not (Path(args.save) / TRACKER_NAME).exists()
        [report] = policy.saver.poll(blocking=True)
    results |= {"seconds": report.seconds, "num_bytes": report.num_bytes, "problem": str(report.problem)}

    train_step()
    with mock.patch.object(checkpoint_folder, "why_no_room", lambda save, needed: f"no room for {needed}"):
        [report] = save()
    results["refused"] = report.problem
    with patched(failing_on_rank_1):
        reports = save()
        reports += policy.saver.poll(blocking=True)
    results["failed"] = reports[0].problem
    dist.barrier()
    results["folders"] = sorted(os.listdir(args.save))

    if options.small_disk:
        args = policy.args
        args.save = str(options.small_disk / "saved")
        dist.barrier()
        with mock.patch.object(checkpoint_folder, "why_no_room", lambda save, needed: None):
            reports = save()
            reports += policy.saver.poll(blocking=True)
        results["full"] = reports[0].problem
        dist.barrier()
        results["left_on_full_disk"] = sorted(os.listdir(args.save))
        results["free_again"] = shutil.disk_usage(args.save).free
    hand_back(**results)


if __name__ == "__main__":
    main()
