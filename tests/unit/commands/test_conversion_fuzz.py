"""Damaged checkpoints: refused in one line, or what is written is the content of the intact one.

Where a manifest is beside the checkpoint there is no third way; without one, a weight is only a weight.
"""

from __future__ import annotations

import io
import os
import random
import resource
import shutil
import time
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

from tests.support.corruptions import CASES, files
from tests.support.tiny_checkpoints import MOE, convert, random_tensors, tiny_config, write_hf

ROUNDS = 7  # of every corruption, each at another place
MEMORY = 12 * 2**30  # bytes; a damaged number must not be allocated
LONGEST_S = 20  # of one case, on a busy machine


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> dict[str, Path]:
    """The same weights in all three: an HF folder, one with a manifest, and a Megatron checkpoint."""
    folder = tmp_path_factory.mktemp("intact")
    config = tiny_config(MOE)
    plain = write_hf(folder / "plain", config, random_tensors(config, torch.bfloat16), num_files=3)
    with redirect_stdout(io.StringIO()):
        assert convert("hf-to-megatron", plain, folder / "megatron") == 0
        assert convert("megatron-to-hf", folder / "megatron", folder / "hf", "--max-shard-size", "2e-6") == 0
    assert len(files(folder / "hf", "*.safetensors")) > 1
    return {kind: folder / kind for kind in CASES}


@pytest.fixture
def fast_and_bounded(monkeypatch):
    """Nothing here outlives a loss of power; and nobody may take the machine's memory."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


def quietly(*words: object) -> tuple[int, str]:
    """Exit code and what went to stderr."""
    with redirect_stderr(io.StringIO()) as err, redirect_stdout(io.StringIO()):
        code = convert(*words)
    return code, err.getvalue()


def check_refusal(text: str) -> None:
    assert text.startswith("megatron-vespo: ") and text.endswith("\n"), text
    assert text.count("\n") == 1 and len(text) < 1200, text
    assert "Traceback" not in text


def check_case(kind: str, damaged: Path, original: Path, room: Path) -> str:
    """What became of it: 'refused', 'the same', or 'unknowable': other weights, and no manifest."""
    to_other = "megatron-to-hf" if kind == "megatron" else "hf-to-megatron"
    out = room / "out"
    code, err = quietly(to_other, damaged, out)
    proof, proof_err = quietly("verify", damaged) if kind != "plain" else (2, "")
    if proof_err:
        check_refusal(proof_err)
    if proof == 0:
        assert quietly("verify", damaged, original)[0] == 0, "verify accepts what differs"
    if code:
        assert code == 2, err
        check_refusal(err)
        assert os.listdir(room) == [damaged.name], "something is left behind"
        return "refused"
    assert sorted(os.listdir(room)) == sorted([damaged.name, "out"])
    same, err = quietly("verify", out, original)
    if same == 0:
        return "the same"
    assert kind == "plain", f"a wrong result: {err}"
    assert quietly("verify", out, damaged)[0] == 0, "not even what was read"
    return "unknowable"


@pytest.mark.long
@pytest.mark.parametrize("kind", CASES)
def test_nothing_wrong_is_accepted(kind, intact, tmp_path, fast_and_bounded):
    found: Counter[tuple[str, str]] = Counter()
    failures, started = [], time.monotonic()
    for number, corruption in enumerate(CASES[kind] * ROUNDS):
        rng = random.Random(f"{kind} {number}")
        room = tmp_path / str(number)
        room.mkdir()
        damaged = shutil.copytree(intact[kind], room / kind)
        what = f"{number} {corruption.__name__}: {corruption(damaged, rng)}"
        began = time.monotonic()
        try:
            found[check_case(kind, damaged, intact[kind], room), corruption.__name__] += 1
            assert time.monotonic() - began < LONGEST_S, "it takes too long"
        except Exception as error:
            failures.append(f"{what}\n    {type(error).__name__}: {str(error)[:500]}")
        shutil.rmtree(room)
    outcomes = Counter()
    for (outcome, _), count in found.items():
        outcomes[outcome] += count
    unknowable = {name for outcome, name in found if outcome == "unknowable"}
    print(
        f"\n{kind}: {sum(found.values())} corruptions, {dict(outcomes)}, {time.monotonic() - started:.0f} s; "
        f"unknowable: {sorted(unknowable)}"
    )
    assert not failures, f"{len(failures)} failures\n" + "\n".join(failures)
    assert unknowable <= {"flip_data", "random_bytes", "moved_bytes", "exchanged_tensors"}
    assert outcomes["refused"] > outcomes["the same"] > 0
