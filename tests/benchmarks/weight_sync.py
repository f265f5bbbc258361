"""Seconds of a weight sync into a real engine, against raw copies of the same bytes.

    python tests/benchmarks/weight_sync.py [--gigabytes 0.25 0.5 1] [--rounds 3] [--bucket-mb 64]

A random Qwen3-MoE in fp32, a trainer of one rank, one SGLang engine of one rank, both on this machine. In
every round the variants take turns:

    memcpy     two processes: one copies the bytes into shared memory, the other out of it, in two buffers
    gloo       two processes: one sends the bytes, the other receives them, in the same buffers
    memory     shard to shard, through memory that both open
    messages   shard to shard, as messages between the ranks: what engines on other hosts get
    broadcast  full tensors in buckets to all engines

Seconds of a sync are those from begin to end, without the comparison of checksums. The engine's weights are
compared with the trainer's once for each variant. It asserts nothing.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_vespo.checkpoints.buckets import buckets
from megatron_vespo.system.plugins import load_runtime_plugins
from megatron_vespo.system.ports import find_free_port
from megatron_vespo.weight_sync.broadcast import Broadcast
from megatron_vespo.weight_sync.engine_layout import EngineLayout
from megatron_vespo.weight_sync.exact import Exact, ExactSource
from megatron_vespo.weight_sync.exported_memory import ExportedMemory, opened
from megatron_vespo.weight_sync.places import Place, place_of
from megatron_vespo.weight_sync.trainer_layout import TrainerShard
from megatron_vespo.weight_sync.verify import weight_sums
from megatron_vespo.weight_sync.weight_link import WeightLink, Weights
from tests.support.servers import HOST, make_tiny_model, tiny_engine
from tests.support.whole_model import held_weights, model_of, tensors_of, whole

CPU = torch.device("cpu")
TIMEOUT_S = 120.0
SPAWN = multiprocessing.get_context("spawn")


def make_model(folder: Path, gigabytes: float, seed: int) -> Path:
    """About so many bytes in experts and embedding, fp32."""
    layers = max(1, round(gigabytes * 9))
    return make_tiny_model(
        folder, seed, vocab_size=16384, hidden_size=1024, num_hidden_layers=layers, num_attention_heads=8,
        moe_intermediate_size=512, num_experts=16,
    )  # fmt: skip


def copy_out(handle: str, size: int, total: int, connection) -> None:
    torch.set_num_threads(1)
    source, target = opened(handle, 2 * size, CPU), torch.ones(total, dtype=torch.uint8)
    while (group := connection.recv()) is not None:
        part = source[group % 2 * size : (group % 2 + 1) * size]
        start = group * size % total
        target[start : start + size].copy_(part[: total - start])
        connection.send(group)


def memcpy(total: int, size: int, rounds: int) -> list[float]:
    """Seconds for `total` bytes, of each round."""
    memory = ExportedMemory(2 * size, CPU)
    ours, theirs = SPAWN.Pipe()
    child = SPAWN.Process(target=copy_out, args=(memory.handle, size, total, theirs))
    child.start()
    data = torch.ones(total, dtype=torch.uint8)
    seconds = []
    for _ in range(rounds + 1):
        began = time.monotonic()
        waiting = 0
        for group in range(-(-total // size)):
            part = data[group * size : (group + 1) * size]
            memory.bytes[group % 2 * size :][: len(part)].copy_(part)
            if waiting:
                ours.recv()
            ours.send(group)
            waiting = 1
        ours.recv()
        seconds.append(time.monotonic() - began)
    ours.send(None)
    child.join()
    memory.close()
    return seconds[1:]  # the first one has found the pages


def exchange(rank: int, port: int, total: int, size: int, rounds: int, results) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://{HOST}:{port}", rank=rank, world_size=2)
    data = torch.ones(total, dtype=torch.uint8)
    seconds = []
    for _ in range(rounds + 1):
        dist.barrier()
        began = time.monotonic()
        for start in range(0, total, size):
            part = data[start : start + size]
            dist.send(part, 1) if rank == 0 else dist.recv(part, 0)
        dist.barrier()
        seconds.append(time.monotonic() - began)
    if rank == 0:
        results.put(seconds[1:])
    dist.destroy_process_group()


def gloo(total: int, size: int, rounds: int) -> list[float]:
    results, port = SPAWN.Queue(), find_free_port(HOST)
    children = [
        SPAWN.Process(target=exchange, args=(rank, port, total, size, rounds, results)) for rank in range(2)
    ]
    for child in children:
        child.start()
    found = results.get(timeout=TIMEOUT_S)
    for child in children:
        child.join()
    return found


def make_link(folder: Path, variant: str, bucket: int) -> WeightLink:
    family, shape = model_of(folder)
    here = place_of(CPU)
    place = here if variant == "memory" else Place("another host", "its memory")
    source = ExactSource(
        family, shape, TrainerShard(0, place, whole(shape)), EngineLayout(1), torch.float32, CPU, bucket, HOST
    )
    exact = "not wanted" if variant == "broadcast" else Exact(source)
    broadcast = Broadcast(0, 1, True, engine_size=1, host=HOST, backend="gloo")
    return WeightLink(rank=0, broadcast=broadcast, exact=exact, timeout_s=TIMEOUT_S, pause=None)


def measure(gigabytes: float, rounds: int, bucket: int, folder: Path) -> dict[str, list[float]]:
    model = make_model(folder / "model", gigabytes, 1)
    changed = [make_model(folder / f"policy-{seed}", gigabytes, seed) for seed in (2, 3)]
    engine = tiny_engine(model, folder / "engine.log", "--max-total-tokens", "2048")
    engine.start()
    try:
        weights = [
            Weights(lambda f=f: buckets(tensors_of(f).items(), bucket), lambda f=f: held_weights(f))
            for f in changed
        ]
        total = sum(t.numel() * t.element_size() for t in held_weights(model).values())
        found: dict[str, list[float]] = {"bytes": [total]}
        sums, number = {}, 0
        for round_number in range(rounds):
            found.setdefault("memcpy", []).extend(memcpy(total, bucket, 1))
            found.setdefault("gloo", []).extend(gloo(total, bucket, 1))
            for variant in ("memory", "messages", "broadcast"):
                link, number = make_link(model, variant, bucket), number + 1
                link.connect([engine.url], [], number)
                for version, source in enumerate(weights):
                    held, pieces = source.held(), list(source.buckets())
                    ready = Weights(lambda pieces=pieces: pieces, lambda held=held: held)
                    seconds = link.sync(ready, version)
                if round_number == 0:
                    [sums[variant]] = weight_sums(link.admin)
                assert link.why_broadcast == (None if variant != "broadcast" else "not wanted")
                found.setdefault(variant, []).append(seconds)  # the second: memory is there, pages are mapped
                link.close()
        assert sums["memory"] == sums["messages"] == sums["broadcast"], "the variants' weights differ"
        return found
    finally:
        engine.stop(timeout_s=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[0.25, 0.5, 1.0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bucket-mb", type=int, default=64)
    options = parser.parse_args()
    load_runtime_plugins()  # without CUDA, what the engine inherits in its environment
    dist.init_process_group("gloo", init_method=f"tcp://{HOST}:{find_free_port(HOST)}", rank=0, world_size=1)
    print("| GB | variant | seconds | GB/s | of memcpy | of gloo |\n|---|---|---|---|---|---|")
    for gigabytes in options.gigabytes:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(gigabytes, options.rounds, options.bucket_mb * 2**20, Path(folder))
        [total] = found.pop("bytes")
        for variant, seconds in found.items():
            ratios = [
                statistics.median(a / b for a, b in zip(found[raw], seconds, strict=True))
                for raw in ("memcpy", "gloo")
            ]
            middle = statistics.median(seconds)
            print(f"| {total / 1e9:.2f} | {variant} | {middle:.2f} | {total / 1e9 / middle:.2f} "
                  f"| {ratios[0]:.2f} | {ratios[1]:.2f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
