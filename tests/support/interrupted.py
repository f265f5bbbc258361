"""Small runs on deterministic engines, to be interrupted and compared bit for bit with one that was not."""

from __future__ import annotations

from pathlib import Path

from megatron_vespo.observability.metrics import read_metrics
from tests.support.runs import train_command, write_questions

STEPS, MINI_BATCHES = 24, 2
LAST = f"{STEPS}/{STEPS} "
# one request at a time: the engine's batches, and with them its rounding, do not depend on arrival times
FLAGS = (
    f"--train-iters {STEPS} --steps-per-rollout {MINI_BATCHES} --save-interval 4 --async-save --no-hf-export "
    "--lr 1e-4 --eval-interval 3 --eval-prompts 2 --max-completion-tokens 16 --overlong-prompts error "
    "--reward-function tests.support.run_rewards:all_letters "
    "--sglang-enable-deterministic-inference --sglang-max-running-requests 1 --sglang-disable-radix-cache"
).split()
# clocks, and the order in which things were written
NOT_COMPARED = ("time", "time/", "checkpoint/", "sync/")


def command(model: Path, folder: Path, *flags: str) -> list[str]:
    """The run whose output and checkpoints are in `folder`; it goes on where there is a checkpoint."""
    data = folder / "questions.jsonl"
    if not data.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_questions(data)
    saving = ["--save", str(folder / "saved"), "--load", str(folder / "saved")]
    return train_command(model, data, folder / "out", *FLAGS, "--eval-data", str(data), *saving, *flags)


def curve(folder: Path) -> list[dict]:
    """Every metric of every record that does not read a clock, by step."""
    records = [
        {
            name: value
            for name, value in record.items()
            if not name.startswith(NOT_COMPARED) and "per_second" not in name
        }
        for record in read_metrics(folder / "out/metrics.jsonl")
    ]
    records = [record for record in records if record.keys() > {"step"}]
    return sorted(records, key=lambda record: (record["step"], len(record)))
