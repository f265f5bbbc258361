"""Inputs that must not be trained on, and what the user is told."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

DOWN = "model.layers.2.mlp.experts.5.down_proj.weight"
QUERY = "model.layers.3.self_attn.q_proj.weight"
GATE = "model.layers.0.mlp.experts.1.gate_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
ROUTER = "model.layers.1.mlp.gate.weight"

# folder -> (tensor, its new shape or None to drop it)
BROKEN = {
    "missing expert": (DOWN, None),
    "missing query": (QUERY, None),
    "narrow query": (QUERY, (128, 63)),
    "few heads": (QUERY, (96, 64)),
    "narrow gate": (GATE, (24, 64)),
    "long vocabulary": (EMBEDDING, (132, 64)),
    "flat down": (DOWN, (64 * 48,)),
    "router": (ROUTER, (4, 64)),
}
RIGHT_SHAPES = {DOWN: (64, 48), QUERY: (128, 64), GATE: (48, 64), EMBEDDING: (131, 64), ROUTER: (8, 64)}


def break_model(source: Path, target: Path, name: str, shape: tuple[int, ...] | None) -> None:
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    assert tuple(tensors.pop(name).shape) == RIGHT_SHAPES[name]
    if shape is not None:
        tensors[name] = torch.zeros(shape)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def result(task, on_task, training_run, outputs, tmp_path_factory):
    training_run("tp2 pp2 ep2")
    folder = tmp_path_factory.mktemp("refusals")
    for case, (name, shape) in BROKEN.items():
        (folder / "models").mkdir(exist_ok=True)
        break_model(task.model, folder / "models" / case, name, shape)
    flags = ["--broken-models", str(folder / "models"), "--save", str(folder / "foreign")]
    flags += ["--expert-parallel-checkpoint", str(outputs / "tp2 pp2 ep2" / "saved")]
    return on_task("refusals.py", 1, *flags)[0]


@pytest.mark.parametrize("case", BROKEN)
def test_model_that_config_json_does_not_describe(result, case):
    name, shape = BROKEN[case]
    expected = (
        "is missing" if shape is None else f"is {shape}, by config.json it should be {RIGHT_SHAPES[name]}"
    )
    assert re.fullmatch(rf"\S+/{case}: tensor {name} {re.escape(expected)}", str(result[case])), result[case]


SAMPLE_MESSAGES = {
    "nan log-prob": "2 non-finite behavior_log_probs, the first one is nan at sampled token 1",
    "infinite log-prob": "2 non-finite behavior_log_probs, the first one is -inf at sampled token 1",
    "missing log-prob": "{fewer} behavior_log_probs for {completion} sampled tokens",
    "nan advantage": "the advantage nan, it must be finite",
    "temperature 0": "was sampled at temperature 0.0, it must be positive",
    "no prompt": "{tokens} tokens, 0 of them prompt: both prompt and completion need at least one",
    "no completion": "{tokens} tokens, {tokens} of them prompt: both prompt and completion need at least one",
    "short segments": "segments of {fewer} tokens for {completion} tokens after the prompt",
    "nothing sampled": "no token that the policy sampled: nothing of it can be trained on",
    "unknown token": "token ids from {lowest} to 131, the vocabulary has 0 to 130",
}


@pytest.fixture(scope="module")
def refused(on_task):
    """Of two data-parallel ranks, of which one has the sample."""
    return on_task("refused_samples.py", 2)


@pytest.mark.parametrize("case", SAMPLE_MESSAGES)
def test_every_rank_is_told_of_a_sample_that_cannot_be_trained_on(task, refused, case):
    sample = task.samples[5]
    expected = SAMPLE_MESSAGES[case].format(
        tokens=sample.num_tokens,
        completion=sample.completion_length,
        fewer=sample.completion_length - 1,
        lowest=sample.token_ids[:-1].min(),
    )
    verb = "" if expected.startswith("was ") else "has "
    for result in refused:
        assert result["good samples"] == "accepted"
        assert result[case] == result[f"{case}, ratio"] == f"sample 5 (group 1) {verb}{expected}"
        assert str(result["the first of two"]).startswith("sample 3 (group 0) has the advantage nan")


FRESH = "--no-load-optim takes the weights alone and starts the optimizer afresh"
SAVED = "--load .*/saved/iter_0000002 was saved with"
CHECKPOINT_MESSAGES = {
    "denominator": "denominator 'recomputed': sample 0 has no old_log_probs",
    "foreign": r"--load \S+/foreign/iter_0000001 was not written by this program: it has no rollout state",
    "learning rate": rf"{SAVED} --lr \S+, now it is 0.5: with --decoupled-lr it cannot change; {FRESH}",
    "optimizer": f"{SAVED} --optimizer adam, now it is sgd, whose state is another; {FRESH}",
    "expert parallel": f"{SAVED} --expert-model-parallel-size 2, now it is 1: Megatron's optimizer state "
    f"only fits if both or none are above 1; {FRESH}",
}


@pytest.mark.parametrize("case", CHECKPOINT_MESSAGES)
def test_a_policy_or_checkpoint_that_cannot_be_used(result, case):
    assert re.fullmatch(CHECKPOINT_MESSAGES[case], str(result[case])), result[case]


def test_the_weights_alone_of_a_checkpoint_whose_optimizer_does_not_fit(task, training_run, result):
    """They are those after two steps, neither the first nor the last ones."""
    assert result["iteration"] == 2
    for other in (task.log_probs, training_run("tp2 pp2 ep2")[0]["log_probs_after"]):
        assert np.abs(result["log_probs"] - other).max() > 0.01
