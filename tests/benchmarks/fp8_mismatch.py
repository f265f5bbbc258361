"""How far engines with bf16 and with FP8 weights are from a bf16 trainer: the table of engine-mismatch.md.

    python tests/benchmarks/fp8_mismatch.py [--steps 2] [--std 0.05]

Four runs of a random Qwen3-MoE (4 layers, 8 experts, top 2), which differ in --rollout-quantization and
--routing-replay alone. All correct by --mismatch-correction tis. On CPUs FP8 layers are those of patches/cpu.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from megatron_vespo.observability.metrics import read_metrics
from megatron_vespo.system.plugins import load_runtime_plugins
from tests.support.runs import finished, train_command, write_questions
from tests.support.servers import make_tiny_model

COLUMNS = {
    "sigma per token": "ratio/engine_token_sigma",
    "std per response": "ratio/engine_gap_std",
    "KL (k3) per token": "kl/engine_k3",
    "mean TIS weight": "mismatch/weight_mean",
}
RUN = (
    "--bf16 --trainer-ranks 1 --pipeline-model-parallel-size 1 --max-completion-tokens 64 --lr 1e-6 "
    "--rollout-batch-size 8 --group-size 8 --mismatch-correction tis "
    "--reward-function tests.support.run_rewards:first_letters"
)
QUANTIZATION = {"bf16": "", "FP8": "--rollout-quantization fp8"}
REPLAY = {"none": "", "R3": "--routing-replay R3"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=2, help="rollout batches per run")
    parser.add_argument("--std", type=float, default=0.05, help="of the random weights")
    options = parser.parse_args()
    load_runtime_plugins()
    print(f"| engine weights | routing replay | {' | '.join(COLUMNS)} |")
    print("| --- " * (2 + len(COLUMNS)) + "|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_tiny_model(
            folder / "model", 0, dtype="bfloat16", hidden_size=256, moe_intermediate_size=128, head_dim=64,
            num_hidden_layers=4, initializer_range=options.std,
        )  # fmt: skip
        questions = write_questions(folder / "questions.jsonl")
        for weights, quantization in QUANTIZATION.items():
            for replay, routing in REPLAY.items():
                output = folder / f"{weights}-{replay}"
                flags = f"{RUN} --train-iters {options.steps} {quantization} {routing}".split()
                finished(train_command(model, questions, output, *flags), folder / "log", 500)
                records = read_metrics(output / "metrics.jsonl")
                steps = [record for record in records if "train/loss" in record]
                found = [statistics.mean(step[metric] for step in steps) for metric in COLUMNS.values()]
                print(
                    f"| {weights} | {replay} | {' | '.join(f'{value:.4f}' for value in found)} |", flush=True
                )


if __name__ == "__main__":
    main()
