"""Starts a trainer rank and an engine as a run does and prints, as JSON, what each process has of the table.

The flags are train's. Ray is started in an environment where every variable has another value.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys

import psutil
import ray
import torch

from megatron_vespo.arguments.parse import parse_args
from megatron_vespo.arguments.train_settings import TrainSettings
from megatron_vespo.cluster.engine_fleet import start_engines
from megatron_vespo.cluster.placement import place, start_ray
from megatron_vespo.cluster.trainer_group import TrainerGroup
from megatron_vespo.rollout.server_arguments import server_arguments
from megatron_vespo.system.process_environment import TABLE, exported_values

OF_THE_NODE = {
    "NCCL_CUMEM_ENABLE": "1",
    "CUDA_DEVICE_MAX_CONNECTIONS": "16",
    "OMP_NUM_THREADS": "5",
    "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:32",
    "PYTORCH_ALLOC_CONF": "max_split_size_mb:64",
    "SGLANG_MEMORY_SAVER_CUDA_GRAPH": "1",
    "SGLANG_RETURN_ORIGINAL_LOGPROB": "1",
}
assert OF_THE_NODE.keys() == TABLE.keys()


def of_table(values) -> dict[str, str]:
    return {name: values[name] for name in TABLE if name in values}


def of_rank(_worker) -> dict:
    """In the actor: what C libraries read, as NCCL and CUDA do, and what torch has made of it."""
    getenv = ctypes.CDLL(None).getenv
    getenv.restype = ctypes.c_char_p
    values = {name: getenv(name.encode()) for name in TABLE}
    return {
        "environment": {name: value.decode() for name, value in values.items() if value is not None},
        "allocator": torch._C._accelerator_getAllocatorSettings(),
        "threads": torch.get_num_threads(),
    }


def of_engine() -> dict[str, object]:
    """/proc has the environment that each process was started with.

    Known by the parent, not by the title: SGLang's processes keep the title of Python where the first
    variable of their environment was set anew.
    """
    server, guard = (
        each for each in psutil.Process().children(recursive=True) if "server_process" in title(each)
    )
    assert guard.parent() == server
    started = [each for each in server.children() if each != guard and "resource_tracker" not in title(each)]
    return {
        "server": of_table(server.environ()),
        "started by it": [of_table(each.environ()) for each in started],
    }


def title(process: psutil.Process) -> str:
    return " ".join(process.cmdline())


def main() -> None:
    args = parse_args(sys.argv[1:])
    own = exported_values(os.environ)
    os.environ.update(OF_THE_NODE)
    settings = TrainSettings.of(args)
    start_ray(None, 2)
    for name in TABLE:
        del os.environ[name]
    os.environ.update(own)
    placement = place(1, {}, 1, 1, on_gpus=False)
    log_dir = args.output_dir / "logs"
    arguments = server_arguments(
        args.sglang_flags, device="cpu", routes=False, longest_step_s=300.0, dtype="float32", seed=1
    )
    engines = start_engines(settings.engines, placement, placement.engines, arguments, None, log_dir, print)
    trainer = TrainerGroup(settings, placement, log_dir, lambda: None)
    try:
        trainer.start()
        engines.wait_until_ready()
        [worker] = trainer._workers
        rank = ray.get(worker.__ray_call__.remote(of_rank))
        print(json.dumps({"exported": own, "trainer": rank, "engine": of_engine()}))
    finally:
        trainer.stop()
        engines.stop()
        ray.shutdown()


if __name__ == "__main__":
    main()
