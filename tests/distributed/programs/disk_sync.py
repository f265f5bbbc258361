"""Weight syncs through files, between trainer ranks and the engines of exact_sync.py.

Elements that a sync changes get another number. Engines read in the middle of what is written are compared at
the end; what every sync has written is handed back.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from common import hand_back
from exact_sync import HOST, TIMEOUT_S, Case, serve

from megatron_vespo.models.family import FAMILIES
from megatron_vespo.system.http import post_json
from megatron_vespo.weight_sync.disk import Disk
from megatron_vespo.weight_sync.disk_folder import run_folder
from megatron_vespo.weight_sync.engine_admin import EngineAdmin
from megatron_vespo.weight_sync.engine_layout import EngineLayout
from megatron_vespo.weight_sync.exact import ExactSource
from megatron_vespo.weight_sync.places import Place
from megatron_vespo.weight_sync.trainer_layout import TrainerShard
from tests.support.sync_layouts import changed_weights, held_by, trainer


def train(case: Case, steps: list[float], rank: int, num_ranks: int, folder: Path) -> dict:
    store = f"tcp://{HOST}:{os.environ['MASTER_PORT']}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=num_ranks,
                            timeout=timedelta(seconds=TIMEOUT_S))  # fmt: skip
    family, shape = FAMILIES[case.family], case.shape
    shard = trainer(shape, **case.trainer)[rank]
    source = ExactSource(
        family, shape, TrainerShard(rank, Place(*case.trainer_places[rank]), shard.part),
        EngineLayout(*case.engine), torch.float32, torch.device("cpu"), case.buffer_bytes, HOST,
    )  # fmt: skip
    files = run_folder(folder / "files", folder / "output")
    disk = Disk(source, files, lambda target: None)
    urls = []
    for engine in range(len(case.engine_places)):
        while not (folder / f"port-{engine}").exists():
            time.sleep(0.02)
        urls.append(f"http://{HOST}:{(folder / f'port-{engine}').read_text()}")
    admin = EngineAdmin(urls, TIMEOUT_S)
    written, changed, found = [], [], []
    for number in range(case.num_syncs):  # here the number of connections
        disk.connect(admin, number + 1)
        for step in range(len(steps)):
            hf = changed_weights(family, shape, steps[: step + 1])
            held = held_by(shard.part, family, shape, hf)
            disk.stage(held)
            found.append(sum(file.stat().st_size for file in files.glob("*/*/*.weights")))
            dist.barrier()
            disk.send(held, step + 1)
            written.append(disk.written_bytes)
            changed.append(disk.changed_elements)
            assert not list(files.glob("*/sync-*")) or rank > 0, "all engines have it"
        disk.close()
    dist.barrier()
    if rank == 0:
        for url in urls:
            post_json(url, "/end", {}, TIMEOUT_S)
    return {"written": np.array(written), "changed": np.array(changed), "found": np.array(found)}


def main() -> None:
    folder = Path(sys.argv[1])
    arguments = json.loads(sys.argv[2])
    steps = arguments.pop("steps")
    case: Case = Case(**arguments)
    rank, num_ranks = int(os.environ["RANK"]), len(case.trainer_places)
    if rank >= num_ranks:
        serve(case, rank - num_ranks, folder)
        hand_back(written=0)
    else:
        hand_back(**train(case, steps, rank, num_ranks, folder))


if __name__ == "__main__":
    main()
