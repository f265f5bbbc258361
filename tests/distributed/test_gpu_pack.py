"""The pack of tests/gpu on a machine that has torch and nothing else: the list of its wheels is complete."""

from __future__ import annotations

import json
import os
import subprocess
import venv
from importlib import metadata
from pathlib import Path

import pytest

from tests.gpu import pack
from tests.gpu.items.table import ITEMS

REPOSITORY = pack.REPOSITORY
PYTHON_VERSION = "3.12"
SHIM = "megatron_vespo_cpu"  # stands in for CUDA, as everywhere where there is none


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> Path:
    """What the package index hands out; skips where there is none."""
    folder = tmp_path_factory.mktemp("pack")
    try:
        pack.collect(folder, PYTHON_VERSION)
    except pack.PackError as error:
        if "No matching distribution" not in str(error) and "has not ended" not in str(error):
            raise
        pytest.skip(f"no package index: {error}")
    return folder


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory) -> Path:
    """An interpreter that sees torch, what torch needs, and the stand-in for CUDA."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=True)
    [site] = folder.glob("lib/python3*/site-packages")
    for name in pack.installed_closure("torch", PYTHON_VERSION):
        try:
            files = metadata.files(name) or []
        except metadata.PackageNotFoundError:
            continue
        root = Path(metadata.distribution(name).locate_file(""))
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(root / top)
    (site / SHIM).symlink_to(REPOSITORY / "patches/cpu" / SHIM)
    entry_points = site / f"{SHIM}-0.1.0.dist-info/entry_points.txt"
    entry_points.parent.mkdir()
    entry_points.write_text(f"[megatron_vespo.runtime]\ncpu = {SHIM}:activate\n")
    return folder / "bin/python"


def run(bare_python: Path, wheels: Path, folder: Path, *names: str) -> dict:
    report = folder / "figures.json"
    command = [str(bare_python), str(REPOSITORY / "tests/gpu/run.py"), "--device", "cpu"]
    command += ["--pack", str(wheels), "--json", str(report), *(["--only", *names] if names else [])]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=460)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return json.loads(report.read_text())


def test_the_pack_is_small_and_pure_where_it_can_be(wheels):
    sizes = {wheel.name: wheel.stat().st_size for wheel in wheels.iterdir()}
    print(f"\n{len(sizes)} wheels, {sum(sizes.values()) / 2**20:.1f} MiB")
    assert sum(sizes.values()) <= pack.MAX_BYTES
    names = {name.split("-")[0] for name in sizes}
    assert {"megatron_core", "transformers", "xxhash"} <= names
    assert not names & {"torch", "triton", "sympy"}, "the machine has these"


def test_nothing_of_the_policy_is_missing_beside_torch_and_the_pack(bare_python, wheels, tmp_path):
    report = run(bare_python, wheels, tmp_path, "policy, fp32", "unpermute")
    assert len(report["machine"]["unpacked"]) == len(list(wheels.iterdir()))
    policy, unpermute = report["items"]
    assert policy["figures"]["log-probs: largest difference from transformers"] < 1e-5
    assert unpermute["figures"]["scatter_add: share of values that differ"] == 0.0


@pytest.mark.slow
@pytest.mark.timeout(480)
def test_all_that_needs_no_gpu(bare_python, wheels, tmp_path):
    report = run(bare_python, wheels, tmp_path)
    outcomes = {item["name"]: item["outcome"] for item in report["items"]}
    assert outcomes == {item.name: "ok" if item.on_cpu else "skipped" for item in ITEMS}
    figures = {item["name"]: item["figures"] for item in report["items"]}["repeated passes"]
    # one order of sums, so the policy has no noise against itself
    assert figures["largest |log W|"] == figures["gradient, relative difference"] == 0.0
