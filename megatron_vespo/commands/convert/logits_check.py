"""Compares transformers' logits with Megatron's, on the first layers of both sides of a conversion.

That bytes arrive in the right place does not prove what the place means. So a few random tokens go through
the first layers of both sides, in fp32, each side in its own process. On a machine without GPUs, parts of
torch are replaced for Megatron, and the reference must not see that. Memory must hold those layers in fp32.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_vespo.checkpoints.hf_shards import copy_companions
from megatron_vespo.checkpoints.sources import opened_hf
from megatron_vespo.commands.convert.first_layers import link_first_layers
from megatron_vespo.data.context_parallel import TokenLayout
from megatron_vespo.system.ports import find_free_port

NUM_LAYERS = 2
BOUND = 1e-5  # relative to the largest logit
_TIMEOUT_S = 1800
_DISTRIBUTED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def check_logits(hf_folder: Path, megatron_folder: Path, num_tokens: int) -> str:
    """One line about the result. ValueError if the logits differ by more than `BOUND`.

    `megatron_folder` is the folder of one iteration. RuntimeError if a side breaks.
    """
    with tempfile.TemporaryDirectory() as folder:
        first_layers = Path(folder) / "model"
        num_layers = _cut(hf_folder, first_layers)
        link_first_layers(megatron_folder, Path(folder) / "megatron", num_layers)
        outputs = []
        for side, more in (("transformers", ()), ("megatron", (Path(folder) / "megatron",))):
            output = Path(folder) / f"{side}.npy"
            _in_process([side, output, first_layers, num_tokens, *more])
            outputs.append(np.load(output))
    theirs, ours = outputs
    difference, scale = float(np.abs(theirs - ours).max()), float(np.abs(theirs).max())
    found = (
        f"logits of {num_tokens} tokens after {num_layers} layers differ by {difference:.1e}, "
        f"{difference / scale:.1e} of the largest"
    )
    # not >, which is false for NaN
    if not difference <= BOUND * scale:
        raise ValueError(f"the proof fails: {found}; at most {BOUND:.0e} are rounding")
    return found


def _cut(hf_folder: Path, target: Path) -> int:
    """Writes an HF checkpoint of the first layers only; returns their number."""
    target.mkdir()
    copy_companions(hf_folder, target)
    with opened_hf(hf_folder) as source:
        # one more than the first layers without experts
        num_layers = min(max(NUM_LAYERS, source.shape.dense_layers + 1), source.shape.num_layers)
        shape = replace(source.shape, num_layers=num_layers)
        tensors = {name: cast(Any, source.reader).get(name) for name in source.family.hf_tensors(shape)}
        config = {**source.hf_config, "num_hidden_layers": num_layers}
    if config.get("layer_types"):
        config["layer_types"] = config["layer_types"][:num_layers]
    (target / "config.json").write_text(json.dumps(config))
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return num_layers


def _in_process(words: Sequence[object]) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in _DISTRIBUTED}
    command = [sys.executable, "-m", "megatron_vespo.commands.convert.logits_check", *map(str, words)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"the logits of {words[0]} took more than {_TIMEOUT_S} s") from error
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise RuntimeError(f"the logits of {words[0]} cannot be computed: {last}")


def _tokens(vocab_size: int, num_tokens: int) -> Tensor:
    return torch.randint(vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _transformers_logits(model: Path, num_tokens: int) -> Tensor:
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    return loaded(_tokens(loaded.config.vocab_size, num_tokens)[None]).logits[0]


@torch.no_grad()
def _megatron_logits(model: Path, num_tokens: int, checkpoint: str) -> Tensor:
    from megatron_vespo.arguments.parse import parse_args
    from megatron_vespo.trainer.attention import PackedSequences
    from megatron_vespo.trainer.initialize import device, initialize
    from megatron_vespo.trainer.released_weights import load_model

    argv = ["--hf-checkpoint", str(model), "--steps-per-rollout", "1", "--max-prompt-tokens", "1"]
    argv += ["--max-completion-tokens", str(num_tokens), "--train-iters", "1", "--lr", "0"]
    argv += ["--transformer-impl", "local"]
    host = "127.0.0.1"
    args = initialize(parse_args(argv, required=("hf_checkpoint",)), 0, 0, host, find_free_port(host))
    gpt = load_model(args, Path(checkpoint))
    tokens = _tokens(args.vocab_size, num_tokens).to(device())
    cu_seqlens = torch.tensor([0, num_tokens], dtype=torch.int32, device=device())
    pack = PackedSequences.of(cu_seqlens, num_tokens, TokenLayout(1), use_kernel=False)
    positions = torch.arange(num_tokens, device=device())
    logits = gpt(tokens[None], positions[None], None, packed_seq_params=pack)
    return logits[0, :, : args.vocab_size].cpu()


def _main(side: str, output: str, model: str, num_tokens: str, *more: str) -> None:
    compute = {"transformers": _transformers_logits, "megatron": _megatron_logits}[side]
    np.save(output, compute(Path(model), int(num_tokens), *more).numpy())


if __name__ == "__main__":
    _main(*sys.argv[1:])
