"""The policy on one GPU over NCCL, in Megatron's local layer spec, which needs no Transformer Engine."""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.gpu.items.context import Context, Figures, gigabytes_per_second
from tests.support.launch import PROGRAMS, Result, launch
from tests.support.random_task import NUM_SAMPLES, random_samples

OWN_PROGRAMS = Path(__file__).parents[1] / "programs"
LOCAL = "--transformer-impl local --no-gradient-accumulation-fusion --no-rope-fusion --no-persist-layer-norm"
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
# a model, a start of CUDA and the compilation of the kernels
TIMEOUT_S = 140
# routes to eight experts a token, and responses long enough for log W to add something up
ROUTES = {"num_experts": 16, "num_experts_per_tok": 8}
LARGER = {
    "vocab_size": 8192, "hidden_size": 512, "num_attention_heads": 8, "head_dim": 64, "num_experts": 64,
    "num_experts_per_tok": 8, "moe_intermediate_size": 192, "max_position_embeddings": 2048,
}  # fmt: skip


@dataclass(frozen=True)
class Task:
    """A random model, samples, and transformers' log-probs of them in fp32 on the CPU."""

    model: Path
    samples: Path
    log_probs: np.ndarray


def _task(context: Context, name: str, samples: list, sizes: dict) -> Task:
    folder = context.folder / name
    model, file, reference = folder / "model", folder / "samples.pkl", folder / "reference.npy"
    if not reference.exists():
        folder.mkdir(exist_ok=True)
        file.write_bytes(pickle.dumps(samples))
        arguments = [
            "--model",
            str(model),
            "--samples",
            str(file),
            "--make-model",
            "--sizes",
            json.dumps(sizes),
        ]
        result = _run(PROGRAMS / "transformers_log_probs.py", arguments, folder / "transformers")
        np.save(reference, result["log_probs"])
    return Task(model, file, np.load(reference))


def _run(program: Path, arguments: list[str], folder: Path) -> Result:
    # a fresh interpreter: what imports Megatron asks CUDA how many devices it has, and no fork survives that
    return launch(program, 1, arguments, TIMEOUT_S, folder, preloaded=False)[0]


def _on(task: Task, program: Path, folder: Path, flags: str) -> Result:
    arguments = ["--hf-checkpoint", str(task.model), "--samples", str(task.samples)]
    return _run(program, [*arguments, *LOCAL.split(), *flags.split()], folder)


def _small(context: Context) -> Task:
    return _task(context, "small", random_samples(), {})


def _large(context: Context) -> tuple[Task, str]:
    """The task, and the flags that its samples need."""
    longest = context.size(512, 24)
    samples = random_samples(NUM_SAMPLES, longest // 4, longest)
    flags = f"--max-prompt-tokens {longest // 4} --max-completion-tokens {longest} --bf16"
    return _task(
        context, "large", samples, context.size(LARGER, ROUTES)
    ), f"{flags} --max-tokens-per-gpu 4096"


def fp32(context: Context) -> Figures:
    """Log-probs against transformers, and four optimizer steps."""
    task = _small(context)
    result = _on(task, PROGRAMS / "train.py", context.folder / "fp32", "--lr 3e-5")
    difference = float(np.abs(result["log_probs"] - task.log_probs).max())
    assert difference < 1e-4, f"log-probs are {difference:.1e} from those of transformers"
    assert np.isfinite(result["loss"]).all() and (result["grad_norm"] > 0).all()
    return {
        "log-probs: largest difference from transformers": difference,
        "losses": result["loss"].tolist(),
        "gradient norms": result["grad_norm"].tolist(),
    }


def bf16(context: Context) -> Figures:
    """The same in bf16, and once more with recomputation."""
    task = _small(context)
    flags = "--lr 3e-5 --bf16"
    plain = _on(task, PROGRAMS / "train.py", context.folder / "bf16", flags)
    again = _on(task, PROGRAMS / "train.py", context.folder / "recompute", f"{flags} {RECOMPUTE}")
    difference = float(np.abs(plain["log_probs"] - task.log_probs).max())
    assert difference < 0.3, f"log-probs are {difference:.1e} from those of transformers in fp32"
    figures: Figures = {"log-probs: largest difference from transformers in fp32": difference}
    for name, bound in (("loss", 1e-2), ("grad_norm", 2e-2)):
        np.testing.assert_allclose(again[name], plain[name], rtol=bound, err_msg=name)
        figures[f"{name}: with recomputation, relative"] = float(np.abs(again[name] / plain[name] - 1).max())
    return figures


def offload(context: Context) -> Figures:
    """What a colocated trainer gives back: bytes that the driver counts as free, and the seconds of it."""
    task, flags = _large(context)
    result = _on(task, OWN_PROGRAMS / "offload.py", context.folder / "offload", flags)
    assert result["restored"], "weights or optimizer came back changed"
    figures: Figures = {"losses": result["losses"].tolist()}
    for part in ("gradients", "optimizer", "weights"):
        expected, freed = int(result[f"{part}: bytes"]), int(result[f"{part}: freed"])
        seconds = float(result[f"{part}: seconds"])
        figures |= {
            f"{part}: MB": expected / 1e6,
            f"{part}: freed MB": freed / 1e6,
            f"{part}: seconds": seconds,
        }
        # torch keeps what its caching allocator cannot give back in whole blocks
        assert not context.on_gpu or freed >= 0.9 * expected, f"{part}: {freed} bytes freed of {expected}"
    moved = int(result["optimizer: bytes"] + result["weights: bytes"])
    figures["back again: seconds"] = float(result["back: seconds"])
    figures["back again GB/s"] = gigabytes_per_second(moved, 1e3 * float(result["back: seconds"]))
    return figures


def repeated_passes(context: Context) -> Figures:
    """log W of identical weights: bf16, top-8 routes, no recomputation, the same samples again and again.

    Figures only: what is not 0 is the noise that a policy has against itself, by sums whose order is not
    fixed. `packed otherwise`: halves of the samples against all of them, so other sizes of the matmuls.
    """
    task, flags = _large(context)
    result = _on(task, OWN_PROGRAMS / "repeated_passes.py", context.folder / "repeated", flags)
    return {key: value.item() for key, value in result.items()}
