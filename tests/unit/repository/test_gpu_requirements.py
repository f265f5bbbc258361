"""The lock of GPU machines: it is what setup.py resolves to, and what docs/install.md installs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from megatron_vespo.commands.doctor.versions import TESTED

ROOT = Path(__file__).resolve().parents[3]
LOCK = ROOT / "requirements-gpu.txt"
CPU_LOCK = ROOT / "patches/cpu/requirements.txt"
UV = [sys.executable, "-m", "uv"]
RESOLVE_TIMEOUT_S = 240
# what uv says where no registry answers
NO_REGISTRY = ("Failed to fetch", "error sending request", "network was disabled", "dns error")
# what decides numbers: tested on CPU at these versions
DECIDING = ("megatron-core", "math-verify", "ray", "safetensors", "sglang", "torch", "transformers", "triton")


def pins(file: Path) -> dict[str, str]:
    lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9.-]*==[a-z0-9.+]+", line) for line in lines), (
        "NAME==VERSION only"
    )
    return dict(line.split("==") for line in lines)


def resolve(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """The command in the lock's head, on a copy of what it reads; versions in the lock stay if they may."""
    (folder / "megatron_vespo").mkdir()
    for name in ("setup.py", "pyproject.toml", "megatron_vespo/__init__.py", LOCK.name):
        shutil.copy(ROOT / name, folder / name)
    [command] = [line for line in LOCK.read_text().splitlines() if line.startswith("#    uv pip compile ")]
    environment = os.environ | {"UV_HTTP_TIMEOUT": "30"}
    index = [
        sys.executable,
        "-m",
        "pip",
        "config",
        "get",
        "global.index-url",
    ]  # uv does not read pip's settings
    found = subprocess.run(index, capture_output=True, text=True, timeout=60).stdout.strip()
    if found:
        environment.setdefault("UV_DEFAULT_INDEX", found)
    return subprocess.run(
        [*UV, *command.removeprefix("#    uv ").split(), "--quiet", *flags],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=RESOLVE_TIMEOUT_S,
    )  # fmt: skip


@pytest.mark.long
def test_the_lock_is_what_setup_resolves_to(tmp_path):
    done = resolve(tmp_path)
    if done.returncode and any(text in done.stderr for text in NO_REGISTRY):
        pytest.skip(f"no package registry answers: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / LOCK.name).read_text() == LOCK.read_text()


def test_without_a_registry_it_says_so(tmp_path):
    done = resolve(tmp_path, "--offline", "--cache-dir", str(tmp_path / "empty"))
    assert done.returncode and any(text in done.stderr for text in NO_REGISTRY)


def test_the_lock_has_what_setup_pins_and_what_was_tested():
    """Without a registry too."""
    locked, tested = pins(LOCK), pins(CPU_LOCK)
    for name in DECIDING:
        assert locked[name] == tested[name], name
    for name, version in TESTED.items():
        assert name == "python" or locked[name] == version, name
    setup = (ROOT / "setup.py").read_text()
    required = [Requirement(line) for line in re.findall(r'"([^"\s]+==[^"\s]+)"', setup)]
    assert {"megatron-core", "sglang", "transformer-engine"} < {requirement.name for requirement in required}
    for requirement in required:
        assert requirement.specifier.contains(locked[requirement.name]), requirement


def test_plans_assume_the_transformer_engine_of_the_lock():
    source = (ROOT / "megatron_vespo/trainer/planned_machine.py").read_text()
    assert f'ASSUMED_TRANSFORMER_ENGINE = Version("{pins(LOCK)["transformer-engine"]}")' in source


def test_transformer_engine_is_whole_and_for_the_cuda_of_torch():
    locked = pins(LOCK)
    [cuda] = {line.split(".")[0] for line in (locked["cuda-toolkit"], locked["nvidia-cuda-runtime"])}
    parts = {name for name in locked if name.startswith("transformer-engine")}
    assert parts == {"transformer-engine", f"transformer-engine-cu{cuda}", "transformer-engine-torch"}
    assert len({locked[name] for name in parts}) == 1
    torch = [Requirement(line) for line in distribution("torch").requires or []]
    assert any(r.name == "cuda-toolkit" and r.specifier.contains(locked["cuda-toolkit"]) for r in torch)


def test_the_page_installs_torch_before_it_compiles_against_it(tmp_path):
    """Its lines, run by a shell whose programs only write down what they are asked."""
    page = (ROOT / "docs/install.md").read_text()
    block = page.partition("## A GPU machine { #gpus }\n")[2].strip("\n").partition("\n\n")[0]
    log = tmp_path / "log"
    for name in ("uv", "pip", "python", "python3.12", "megatron-vespo"):
        program = tmp_path / name
        program.write_text(f'#!/bin/bash\n[[ "$*" == *"-r -"* ]] && tr "\\n" " "\necho {name} "$@" >>{log}\n')
        program.chmod(0o755)
    script = block.replace(". .venv/bin/activate", "true")
    done = subprocess.run(
        ["bash", "-euc", script], cwd=ROOT, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True,
        text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first = done.stdout.split()
    assert set(first) >= {f"{name}=={pins(LOCK)[name]}" for name in pins(LOCK)} - {
        f"transformer-engine-torch=={pins(LOCK)['transformer-engine-torch']}"
    }
    assert not any(line.startswith("transformer-engine-torch") for line in first)
    assert log.read_text().splitlines() == [
        "python3.12 -m venv .venv",
        "pip install uv",
        "uv pip install -r -",
        "uv pip install --no-build-isolation -r requirements-gpu.txt -e .",
        "python patches/apply.py apply",
        "megatron-vespo doctor",
    ]
