"""The blocks of docs/guides/python-api.md run, each section in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "python-api.md"
TIMEOUT_S = 120


def blocks() -> dict[str, str]:
    """Section -> its code."""
    sections = re.split(r"^## (.+)\n", PAGE.read_text(), flags=re.MULTILINE)[1:]
    return {
        title: "\n".join(re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL))
        for title, text in zip(sections[::2], sections[1::2], strict=True)
    }


def run(section: str, **given: str) -> str:
    """What the section's code prints; `given` are the names that a reader sets."""
    code = "".join(f"{name} = {value!r}\n" for name, value in given.items()) + blocks()[section]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_section_has_code_that_runs():
    assert [title for title, code in blocks().items() if code] == [
        "Losses on your own tensors",
        "Advantages and diagnostics",
        "A policy, and training on your own samples",
        "Generating with running engines",
    ]


@pytest.mark.parametrize("section", ["Losses on your own tensors", "Advantages and diagnostics"])
def test_without_a_model(section):
    assert run(section)


def test_a_policy_and_own_samples(tiny_model):
    printed = run("A policy, and training on your own samples", HF_FOLDER=str(tiny_model))
    assert [line.split()[0] for line in printed.splitlines() if line[:1].isdecimal()] == ["1", "2", "3"]


def test_generating(engine):
    printed = run("Generating with running engines", ENGINE_URL=engine.url)
    assert printed.count("[") == 2 * 2  # two completions, each with tokens and log-probs
