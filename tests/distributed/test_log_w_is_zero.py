"""W = 1 where nothing has changed: log W of identical weights and packs is 0, to the last bit."""

from __future__ import annotations

import itertools
import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from megatron_vespo.types import TrainingSample
from tests.support.launch import PROGRAMS, TIMEOUT_S, launch
from tests.support.named_layouts import LAYOUTS, RECOMPUTE
from tests.support.random_task import random_samples, transformers_log_probs

NUM_SAMPLES, MAX_PROMPT, MAX_COMPLETION = 24, 20, 120
FLAGS = (
    f"--rollout-batch-size 6 --steps-per-rollout 1 --max-completion-tokens {MAX_COMPLETION} --lr 1e-3 "
    "--max-tokens-per-gpu 512 --ratio-denominator recomputed"
).split()
NUM_EXPERTS = 16
TOP_K = (2, 4, 8)
PRECISIONS = {"fp32": [], "bf16": ["--bf16"]}
# all that Megatron accepts for this model without Transformer Engine
RECOMPUTATION = {
    "nothing": [],
    "full, uniform": RECOMPUTE.split(),
    "full, block": "--recompute-granularity full --recompute-method block --recompute-num-layers 1".split(),
    "core_attn": "--recompute-granularity selective --recompute-modules core_attn".split(),
    "moe": "--recompute-granularity selective --recompute-modules moe".split(),
    "core_attn moe": "--recompute-granularity selective --recompute-modules core_attn moe".split(),
}
POLICIES = {
    "current": [],
    "R2": ["--routing-replay", "R2"],
    "R3": ["--routing-replay", "R3"],
    "snapshot": ["--old-policy", "snapshot"],
    "snapshot, R3": ["--old-policy", "snapshot", "--routing-replay", "R3"],
    "ewma": ["--old-policy", "ewma"],
}
FIRST_BATCH_ONLY = ("ewma",)  # an average is not the weights of now once they have changed
QUICK_LAYOUTS = ("tp2 pp2 ep2", "cp2 ep2, allgather")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[int, Path]:
    """Random ones, by the experts that a token is sent to."""
    folder = tmp_path_factory.mktemp("models")
    one = folder / "one.pkl"
    one.write_bytes(pickle.dumps(random_samples(1)))
    found = {}
    for top_k in TOP_K:
        sizes = json.dumps({"num_experts": NUM_EXPERTS, "num_experts_per_tok": top_k})
        found[top_k] = folder / f"top-{top_k}"
        transformers_log_probs(found[top_k], one, "--make-model", "--sizes", sizes)
    return found


@pytest.fixture(scope="module")
def samples_file(tmp_path_factory) -> Path:
    samples: list[TrainingSample] = random_samples(NUM_SAMPLES, MAX_PROMPT, MAX_COMPLETION)
    path = tmp_path_factory.mktemp("samples") / "samples.pkl"
    path.write_bytes(pickle.dumps(samples))
    return path


@pytest.fixture
def log_w(models, samples_file, tmp_path):
    """{case: the largest |log W|} of cases (top-k, precision, recomputation, policy) on a layout."""

    def measure(layout: str, cases, *more: str) -> dict[str, float]:
        num_ranks, layout_flags = LAYOUTS[layout]
        # packs of one sample: the smallest that the longest sample of the flags, 20 + 120 tokens, fits in
        layout_flags = layout_flags.replace("--max-tokens-per-gpu 64", "--max-tokens-per-gpu 140")
        flags = {
            " | ".join(["top-" + str(case[0]), *case[1:]]): [
                "--hf-checkpoint", str(models[case[0]]),
                *PRECISIONS[case[1]], *RECOMPUTATION[case[2]], *POLICIES[case[3]],
            ]
            for case in cases
        }  # fmt: skip
        (tmp_path / "cases.json").write_text(json.dumps(flags))
        arguments = ["--samples", str(samples_file), "--cases", str(tmp_path / "cases.json")]
        arguments += [*FLAGS, *layout_flags.split(), *more]
        timeout_s = TIMEOUT_S + 15 * len(flags)
        ranks = launch(PROGRAMS / "log_w_is_zero.py", num_ranks, arguments, timeout_s, tmp_path / "run")
        largest = {}
        for name in flags:
            batches = 1 if name.endswith(FIRST_BATCH_ONLY) else None
            largest[name] = max(float(np.abs(rank[name][:batches]).max()) for rank in ranks)
            assert all(rank[name].shape[1] == NUM_SAMPLES for rank in ranks)
        print("\n".join(f"| {layout} | {name} | {value:.1e} |" for name, value in largest.items()))
        return largest

    return measure


def without_recomputation(layout: str) -> bool:
    return "--recompute" not in LAYOUTS[layout][1]


def recomputation(layout: str) -> tuple[str, ...]:
    """What to add to the flags of the layout, which may have some already."""
    return tuple(RECOMPUTATION) if without_recomputation(layout) else ("nothing",)


def policies(top_k: int, recompute: str) -> tuple[str, ...]:
    """How pi_old is made does not meet what the backward pass recomputes."""
    return tuple(POLICIES) if top_k == max(TOP_K) and recompute == "nothing" else ("current",)


def all_cases(layout: str):
    for top_k, precision, recompute in itertools.product(TOP_K, PRECISIONS, recomputation(layout)):
        for policy in policies(top_k, recompute):
            yield top_k, precision, recompute, policy


@pytest.mark.parametrize("layout", QUICK_LAYOUTS)
def test_with_eight_experts_per_token(log_w, layout):
    cases = [(8, "bf16", recompute, "current") for recompute in recomputation(layout)]
    cases += [(8, "bf16", "nothing", policy) for policy in POLICIES if policy != "current"]
    assert set(log_w(layout, cases).values()) == {0.0}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_everywhere(log_w, layout):
    assert set(log_w(layout, all_cases(layout)).values()) == {0.0}


def test_an_unsorted_router_shows(log_w):
    """What the diff of megatron-core mends, this measurement sees: from three experts per token on."""
    cases = [(top_k, "bf16", "nothing", "current") for top_k in TOP_K]
    two, four, eight = log_w("one rank", cases, "--unsorted").values()
    assert two == 0.0 and max(four, eight) > 1e-3
