"""Turns a run's flags into those of a smoke run: the same computation, at a small size."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from megatron_vespo.arguments.parse import parse_settings
from megatron_vespo.arguments.train_settings import TrainSettings
from megatron_vespo.commands.smoke.fit import Nodes, Wanted
from megatron_vespo.models.hf_config import read_hf_config
from megatron_vespo.rollout.server_arguments import engine_size, parse_sglang_flags

MINI_BATCHES = 2  # optimizer steps
NUM_COMPLETIONS = 4
MAX_PROMPT_TOKENS, MAX_COMPLETION_TOKENS = 48, 48
TOKEN_BUDGET = 1024  # per pack
# An --lr of LOGIT_STEP over the hidden size moves logits equally in every model: far more than rounding, so
# that engines with old weights are detected; and so little that W of the second step is not 0.
LOGIT_STEP = 0.25
COLOCATED_SHARE = "0.4"  # of a GPU, for the small model's engine
SIZES = {
    "tp": "--tensor-model-parallel-size",
    "pp": "--pipeline-model-parallel-size",
    "vpp": "--num-virtual-stages-per-pipeline-rank",
    "cp": "--context-parallel-size",
    "ep": "--expert-model-parallel-size",
    "etp": "--expert-tensor-parallel-size",
    "ranks": "--trainer-ranks",
    "engines": "--rollout-engines",
}
LAYOUT = {
    *SIZES.values(), "--sequence-parallel", "--colocate", "--sglang-tp-size", "--sglang-tensor-parallel-size",
}  # fmt: skip
# flags of a whole run: its models, data, lengths, batches, steps, time limits, files, fault tolerance
OF_THE_RUN = {
    "--hf-checkpoint", "--reference-checkpoint",
    "--prompt-data", "--prompt-key", "--answer-key", "--answer-pattern",
    "--no-chat-template", "--overlong-prompts", "--generate-function", "--turn-rewards",
    "--environment", "--max-turns", "--max-turn-tokens", "--environment-timeout",
    "--num-layers-per-virtual-pipeline-stage", "--decoder-first-pipeline-num-layers",
    "--decoder-last-pipeline-num-layers", "--pipeline-model-parallel-layout",
    "--max-prompt-tokens", "--max-completion-tokens", "--max-tokens-per-gpu", "--rollout-temperature",
    "--rollout-batch-size", "--group-size", "--steps-per-rollout", "--train-iters",
    "--lr", "--min-lr", "--max-logprob-difference", "--on-alarm",
    "--max-staleness", "--sync-interval", "--on-weight-update", "--over-subscription",
    "--stop-generation-while-training", "--stale-groups",
    "--output-dir", "--save", "--load", "--ckpt-step", "--save-interval", "--save-retain-interval",
    "--save-rollouts", "--train-from", "--rollout-only", "--no-hf-export", "--setup-seconds",
    "--engine-start-timeout", "--worker-start-timeout", "--generate-timeout", "--train-timeout",
    "--weight-sync-timeout", "--engine-health-timeout", "--weight-check-interval",
    "--engine-restarts", "--min-engines", "--trainer-restarts", "--preemption-deadline",
    "--sglang-context-length",
}  # fmt: skip
OF_THE_RUN_PREFIXES = (
    "--eval-", "--reward-", "--overlong-", "--dynamic-sampling", "--lr-", "--teacher-", "--distillation-",
)  # fmt: skip
# features that only a GPU has, and flags that save its memory
ON_GPUS_ONLY = {
    "--transformer-impl", "--distributed-backend", "--optimizer-cpu-offload",
    "--use-precision-aware-optimizer", "--moe-permute-fusion", "--moe-token-dispatcher-type",
    "--moe-flex-dispatcher-backend", "--moe-grouped-gemm", "--attention-backend",
    "--sglang-attention-backend", "--sglang-mem-fraction-static",
    "--rollout-quantization",  # the model for CPUs is narrower than a block
    "--sglang-enable-fp32-lm-head",  # on CPUs with AMX its matmul does not support the weight's layout
}  # fmt: skip


def wanted_layout(flags: Sequence[str]) -> Wanted:
    """The sizes that a run's flags request; ValueError for an invalid size."""
    parser = argparse.ArgumentParser(prog="megatron-vespo smoke", add_help=False, allow_abbrev=False)
    for name, flag in SIZES.items():
        parser.add_argument(flag, dest=name)
    parser.add_argument("--colocate", action="store_true")
    sglang, rest = parse_sglang_flags(list(flags))
    found = vars(parser.parse_known_args(rest)[0])
    colocate = found.pop("colocate")
    sizes = {name: _size(SIZES[name], text) for name, text in found.items() if text is not None}
    sizes.setdefault("etp", sizes.get("tp", 1))  # Megatron's default
    return Wanted(**sizes, engine_size=engine_size(sglang), colocate=colocate)


def _size(flag: str, text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise ValueError(f"{flag} {text}: must be a positive number")
    return int(text)


def smoke_arguments(
    flags: Sequence[str], layout: Wanted, nodes: Nodes, folder: Path, timeout_s: float
) -> TrainSettings:
    """The smoke run's settings; ValueError for flags that train would also refuse.

    `flags` are a run's; `layout` is the part of their layout that fits `nodes`. `folder` has the model, and
    gets all output. No wait is longer than `timeout_s`.
    """
    sizes = layout_flags(layout)
    if layout.colocate and nodes.on_gpus and "--sglang-mem-fraction-static" not in flags:
        sizes += ["--sglang-mem-fraction-static", COLOCATED_SHARE]
    hidden = read_hf_config(folder / "model")["hidden_size"]
    own = [*_own_flags(layout, folder, timeout_s), "--lr", str(LOGIT_STEP / hidden)]
    argv = [*kept(flags, nodes.on_gpus), *sizes, *own]
    required = ("hf_checkpoint", "output_dir")
    return parse_settings(argv, "smoke", required, on_gpus=lambda address: nodes.on_gpus)


def kept(flags: Sequence[str], on_gpus: bool) -> list[str]:
    """The flags of a run, with their values, that decide how it computes."""
    left_out = LAYOUT | OF_THE_RUN | (set() if on_gpus else ON_GPUS_ONLY)
    prefixes = OF_THE_RUN_PREFIXES if on_gpus else (*OF_THE_RUN_PREFIXES, "--recompute-")
    words: list[str] = []
    for group in _groups(flags):
        name = group[0].partition("=")[0]
        if name not in left_out and not name.startswith(prefixes):
            words += group
    return words


def _groups(flags: Iterable[str]) -> list[list[str]]:
    """Each flag with its values."""
    groups: list[list[str]] = []
    for word in flags:
        if word.startswith("--") or not groups:
            groups.append([])
        groups[-1].append(word)
    return groups


def layout_flags(layout: Wanted) -> list[str]:
    sizes = {flag: getattr(layout, name) for name, flag in SIZES.items()}
    if layout.vpp == 1:
        del sizes[SIZES["vpp"]]
    words = [str(word) for pair in sizes.items() for word in pair]
    return [*words, "--sglang-tp-size", str(layout.engine_size), *["--colocate"] * layout.colocate]


def num_prompts(layout: Wanted) -> int:
    """Prompts per rollout batch: every rank gets samples in every step, every engine several requests."""
    assert layout.ranks is not None and layout.engines is not None
    shares = layout.ranks // (layout.tp * layout.pp * layout.cp) * (layout.pp if layout.vpp > 1 else 1)
    return MINI_BATCHES * shares * math.ceil(layout.engines / shares)


def _own_flags(layout: Wanted, folder: Path, timeout_s: float) -> list[str]:
    timeouts = (
        "engine-start", "worker-start", "generate", "train", "weight-sync", "weight-check", "engine-health",
    )  # fmt: skip
    words = {
        "--hf-checkpoint": folder / "model",
        "--output-dir": folder,
        "--save": folder / "checkpoint",
        "--load": folder / "checkpoint",  # empty at first
        "--rollout-batch-size": num_prompts(layout),
        "--group-size": NUM_COMPLETIONS,
        "--steps-per-rollout": MINI_BATCHES,
        "--train-iters": MINI_BATCHES,
        "--max-prompt-tokens": MAX_PROMPT_TOKENS,
        "--max-completion-tokens": MAX_COMPLETION_TOKENS,
        "--max-tokens-per-gpu": TOKEN_BUDGET,
        "--weight-check-interval": 1,  # after every sync
        "--engine-restarts": 0,  # an engine that dies is a finding
        "--min-engines": layout.engines,
        **{f"--{name}-timeout": timeout_s for name in timeouts},
    }
    return [str(word) for pair in words.items() for word in pair]
