"""Two hundred optimizer steps with a fault every few: everything is made up for, and the policy learns.

Faults: an engine killed or stopped, a trainer rank killed, the driver killed or preempted and started again,
and rewards that hang, crash or eat memory, all the time. Prints memory by kind of process.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import psutil
import pytest

from megatron_vespo.observability.metrics import read_metrics
from megatron_vespo.system.preemption import EXIT_RESUME
from tests.support.runs import ROOT, Run, nothing_left

START_S = 300.0
STEPS, MINI_BATCHES, STALENESS = 200, 2, 4
STEPS_BETWEEN = 8  # faults, in the mean
LIMIT_S = 1500.0
MIB = 2**20


class Soak:
    """The run, started again where it ended before its time."""

    def __init__(self, command: list[str], folder: Path):
        self.command, self.folder = command, folder
        self.faults, self.memory = Counter(), defaultdict(list)
        self.number = 0
        self.start()

    def start(self) -> None:
        self.run = Run(self.command, self.folder / f"log-{self.number}")
        self.number += 1

    def step(self) -> int:
        path = self.folder / "out/metrics.jsonl"
        if not path.exists():
            return 0
        return max([r["step"] for r in read_metrics(path) if "reward/mean" in r], default=0)

    def note_memory(self) -> None:
        kinds = {"driver": "cli train", "trainer": "ray::TrainerWorker", "engine": "sglang::scheduler"}
        for kind, word in kinds.items():
            for process in self.run.titled(word):
                try:
                    used = process.memory_full_info().uss / MIB
                except psutil.Error:
                    continue
                self.memory[kind].append((process.pid, self.step(), used))

    def inflict(self, fault: str) -> None:
        self.faults[fault] += 1
        print(f"step {self.step()}: {fault}", flush=True)
        if fault == "engine killed":
            self.signal("sglang::scheduler", signal.SIGKILL)
        elif fault == "engine stopped":
            self.signal("sglang::scheduler", signal.SIGSTOP)
        elif fault == "trainer rank killed":
            self.signal("ray::TrainerWorker", signal.SIGKILL)
        elif fault == "driver killed":
            self.run.process.kill()
            self.run.process.wait()
            assert nothing_left(self.run, timeout_s=30.0)
            self.start()
        else:
            assert fault == "preempted"
            self.run.process.terminate()
            assert self.run.wait(120) == EXIT_RESUME, self.run.output
            assert nothing_left(self.run)
            self.start()

    def signal(self, kind: str, number: int) -> None:
        for process in self.run.titled(kind)[:1]:
            os.kill(process.pid, number)


FAULTS = ("engine killed", "engine stopped", "trainer rank killed", "driver killed", "preempted")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """The tiny example's model and data; it can learn."""
    folder = tmp_path_factory.mktemp("base")
    script = ROOT / "examples/tiny/make_base_model.py"
    subprocess.run([sys.executable, str(script), "--output", str(folder)], check=True, timeout=300)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(2000)
def test_two_hundred_steps_with_faults(base, tmp_path):
    saved = tmp_path / "saved"
    flags = f"--train-iters {STEPS} --steps-per-rollout {MINI_BATCHES} --max-staleness {STALENESS} --lr 5e-5 "
    flags += "--rollout-batch-size 8 --group-size 8 --max-prompt-tokens 32 --max-completion-tokens 32 "
    flags += f"--save {saved} --load {saved} --save-interval 10 --async-save --save-retain-interval 1000 "
    flags += "--trainer-ranks 2 --pipeline-model-parallel-size 2 --max-tokens-per-gpu 2048 --no-hf-export "
    flags += "--engine-restarts 1000 --trainer-restarts 1000 --engine-health-timeout 15 --reward-timeout 2 "
    flags += "--weight-check-interval 10 --eval-interval 1000 --eval-prompts 256 --clip-grad 1.0 "
    flags += "--reward-function tests.support.soak_rewards:with_faults "
    flags += f"--hf-checkpoint {base}/base --prompt-data {base}/train.jsonl --eval-data {base}/heldout.jsonl "
    flags += f"--output-dir {tmp_path}/out"
    soak = Soak([sys.executable, "-m", "megatron_vespo", "train", *flags.split()], tmp_path)
    draw = random.Random(0)
    began, next_fault = time.monotonic(), STEPS_BETWEEN
    try:
        while soak.run.process.poll() is None:
            time.sleep(1.0)
            soak.note_memory()
            assert time.monotonic() - began < LIMIT_S, soak.run.output[-3000:]
            if next_fault <= soak.step() < STEPS - 2 * MINI_BATCHES:
                soak.inflict(draw.choice(FAULTS))
                next_fault = soak.step() + draw.randint(1, 2 * STEPS_BETWEEN)
        soak.run.finish(10)
    finally:
        soak.run.kill()
    check(soak, tmp_path, time.monotonic() - began)


def check(soak: Soak, folder: Path, seconds: float) -> None:
    records = [r for r in read_metrics(folder / "out/metrics.jsonl") if "reward/mean" in r]
    print(f"{seconds:.0f} s, faults: {dict(soak.faults)}")
    rewards = {name: sum(r[f"reward/{name}_count"] for r in records) for name in ("error", "timeout")}
    print(f"failed rewards: {rewards}")
    for kind, samples in soak.memory.items():
        lives = defaultdict(list)
        for pid, step, used in samples:
            lives[pid].append((step, used))
        longest = max(lives.values(), key=len)
        late = longest[len(longest) // 2 :]
        growth = max(used for _, used in late) - min(used for _, used in late)
        most, (first, _), (last, _) = max(used for _, _, used in samples), longest[0], longest[-1]
        print(f"{kind}: {len(lives)} lives, {most:.0f} MiB at most")
        print(f"  the longest, steps {first} to {last}, varied by {growth:.0f} MiB in its second half")
        assert growth < 150
    assert [r["step"] for r in records] == list(range(MINI_BATCHES, STEPS + 1, MINI_BATCHES))
    assert max(r["staleness/total_max"] for r in records) <= STALENESS
    assert sum(soak.faults.values()) >= 10
    summary = json.loads((folder / "out/summary.json").read_text())
    before, after = (summary[f"eval_accuracy_{when}"] for when in ("before", "after"))
    print(f"held-out accuracy {before:.1%} -> {after:.1%}")
    assert after >= 0.9
