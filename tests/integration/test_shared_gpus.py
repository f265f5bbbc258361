"""Ray's own bookkeeping of GPUs that it is told of and that are not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json, os, sys
from argparse import Namespace
import ray
from megatron_vespo.cluster.placement import place

ranks, engines, size, gpus = map(int, sys.argv[1:])
ray.init(num_cpus=64, num_gpus=gpus, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
parallel = dict.fromkeys("tensor_model context expert_model expert_tensor".split(), 1)
run = Namespace(trainer_ranks=ranks, rollout_engines=engines, **{f"{kind}_parallel_size": 1 for kind in parallel})
placement = place(run, size, on_gpus=True, colocate=True)

@ray.remote
class Process:
    def sees(self):
        return os.environ.get("CUDA_VISIBLE_DEVICES")

def start(seats):
    processes = [Process.options(**placement.options(seat)).remote() for seat in seats]
    return processes, ray.get([process.sees.remote() for process in processes], timeout=60)

# as in a run: the engines first, and again beside the trainer
first, _ = start(placement.engines)
of_trainer, seen = start(placement.trainer)
for process in first:
    ray.kill(process)
start(placement.engines)
print(json.dumps([seen, [seat.devices for seat in placement.engines]]))
"""


@pytest.mark.timeout(200)
@pytest.mark.parametrize(("ranks", "engines", "size", "gpus"), [(8, 3, 2, 8), (4, 1, 4, 5)])
def test_every_rank_has_a_gpu_and_an_engine_those_of_its_ranks(ranks, engines, size, gpus):
    numbers = [str(number) for number in (ranks, engines, size, gpus)]
    there = ",".join(str(2 + number) for number in range(gpus))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *numbers],
        capture_output=True, text=True, timeout=180, env=os.environ | {"CUDA_VISIBLE_DEVICES": there},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    of_ranks, of_engines = json.loads(done.stdout.splitlines()[-1])
    print(of_ranks, of_engines)
    assert len(of_ranks) == ranks and len(set(of_ranks)) == ranks
    assert len(of_engines) == engines
    for number, devices in enumerate(of_engines):
        own = devices.split(",")
        assert len(own) == size and set(own) <= set(of_ranks)
        assert not any(set(own) & set(other.split(",")) for other in of_engines[:number])
