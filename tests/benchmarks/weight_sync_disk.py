"""Bytes and seconds of a weight sync through files, by the share of elements that have changed.

    python tests/benchmarks/weight_sync_disk.py [--gigabytes 0.5] [--folder /dev/shm] [--rounds 3]

Random bf16 weights, a trainer of one rank, an engine of one rank; no HTTP. "write" is what the trainer does
while engines generate: compare, pack and write. "read" is the pause: the engine reads, checks and applies.
"of all" is the size of the file by that of all weights, "x changed" by that of the changed ones. "memcpy" is
one copy of all weights in memory, in the same round. It asserts that the engine has the trainer's weights.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from megatron_vespo.models.family import FAMILIES
from megatron_vespo.models.table import ModelShape
from megatron_vespo.weight_sync.disk import disk_plan
from megatron_vespo.weight_sync.disk_receiver import DiskReceiver
from megatron_vespo.weight_sync.disk_version import Manifest, write_manifest
from megatron_vespo.weight_sync.disk_writer import DiskWriter
from megatron_vespo.weight_sync.engine_layout import EngineLayout
from megatron_vespo.weight_sync.messages import DiskLoad
from megatron_vespo.weight_sync.places import place_of
from megatron_vespo.weight_sync.plan import make_plan
from megatron_vespo.weight_sync.trainer_layout import TrainerShard
from tests.support.sync_layouts import held_by
from tests.support.whole_model import whole

CPU = torch.device("cpu")
FAMILY = FAMILIES["Qwen3MoeForCausalLM"]
SHARES = (0.0, 0.05, 0.3, 1.0)
BUCKET = 64 * 2**20


class Model(nn.Module):
    def __init__(self, matrices: Mapping[str, tuple[int, int]]):
        super().__init__()
        self.tensors = {
            name: nn.Parameter(torch.empty(size, dtype=torch.bfloat16), False)
            for name, size in matrices.items()
        }

    def named_parameters(self, *_, **__):
        return iter(self.tensors.items())


def shape_of(gigabytes: float) -> ModelShape:
    return ModelShape(
        num_layers=max(1, round(18 * gigabytes)), hidden_size=1024, ffn_hidden_size=512,
        num_attention_heads=8, num_query_groups=2, head_dim=128, num_experts=16, vocab_size=16384,
        padded_vocab_size=16384, tied_embeddings=False,
    )  # fmt: skip


def changed(held: Mapping[str, Tensor], share: float) -> None:
    """In place: the last bit of so many elements."""
    for tensor in held.values():
        bits = tensor.view(torch.int16)
        bits ^= (torch.rand(tensor.shape) < share).to(torch.int16)


def memcpy(total: int) -> float:
    source, target = torch.ones(total, dtype=torch.uint8), torch.zeros(total, dtype=torch.uint8)
    began = time.monotonic()
    target.copy_(source)
    return time.monotonic() - began


def measure(gigabytes: float, folder: Path, rounds: int) -> None:
    shape = shape_of(gigabytes)
    part = whole(shape)
    hf = {name: torch.randn(size).bfloat16() for name, size in FAMILY.hf_tensors(shape).items()}
    held = {name: tensor.clone() for name, tensor in held_by(part, FAMILY, shape, hf).items()}
    plan = make_plan(FAMILY, shape, [TrainerShard(0, place_of(CPU), part)], EngineLayout(1), 2, BUCKET)
    model = Model(plan.matrices[0])
    writer = DiskWriter(plan, 0, torch.bfloat16, CPU)
    receiver = DiskReceiver(disk_plan(plan, 0, "bfloat16", folder), CPU)
    total = sum(2 * tensor.numel() for tensor in held.values())
    sync = 0

    def synced() -> tuple[float, float, int, int]:
        nonlocal sync
        version = folder / f"sync-{sync}"
        version.mkdir()
        began = time.monotonic()
        written = writer.write(version, held)
        files = {0: written.size} if written.size else {}
        manifest = Manifest(sync, sync - 1 if sync else None, files, written.parts)
        message = DiskLoad(str(version), write_manifest(version, manifest))
        middle = time.monotonic()
        receiver.load(model, message)
        end = time.monotonic()
        for file in version.iterdir():
            file.unlink()
        sync += 1
        return middle - began, end - middle, written.size, written.changed

    def line(name: str, found: list[tuple[float, float, int, int]], copies: list[float]) -> None:
        write, read = (statistics.median(times) for times in list(zip(*found, strict=True))[:2])
        _, _, size, number = found[-1]
        ratio = f"{size / (2 * number):.2f}" if number else "-"
        print(f"| {name} | {size / 1e6:.1f} | {size / total:.3f} | {ratio} | {write:.2f} | {read:.2f} "
              f"| {statistics.median(copies):.2f} |", flush=True)  # fmt: skip

    print(f"{total / 1e9:.2f} GB\n\n| changed | MB | of all | x changed | write s | read s | memcpy s |")
    print("|---|---|---|---|---|---|---|")
    line("first sync", [synced()], [memcpy(total)])
    for share in SHARES:
        found, copies = [], []
        for _ in range(rounds):
            changed(held, share)
            copies.append(memcpy(total))
            found.append(synced())
        line(f"{share:.0%}", found, copies)
    engine = model.tensors["model.embed_tokens.weight"].view(torch.int16)
    assert engine.equal(held["model.embed_tokens.weight"].view(torch.int16)), "the weights differ"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=0.5)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measure(options.gigabytes, Path(folder), options.rounds)


if __name__ == "__main__":
    main()
