"""Collects the wheels that a machine with torch and a GPU, but without a package index, lacks.

    python tests/gpu/pack.py [FOLDER] [--python-version 3.12]

FOLDER (tests/gpu/pack) holds nothing but these wheels afterwards; `run.py` there finds it by itself. Versions
are those of patches/cpu/requirements.txt. torch and what it needs is left out: that machine has them.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from email.parser import Parser
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parents[2]
LOCK = REPOSITORY / "patches/cpu/requirements.txt"
DEFAULT_FOLDER = Path(__file__).with_name("pack")
# what tests/gpu imports by itself; what these need follows from their metadata
WANTED = ("megatron-core", "numpy", "psutil", "safetensors", "tqdm", "transformers", "xxhash")
PRESENT = "torch"
MAX_BYTES = 60 * 2**20
# pip takes no newer platform for an older one: all that the wheels of the list use
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014")
DOWNLOAD_TIMEOUT_S = 300


class PackError(ValueError):
    """The wheels cannot be collected; says which and why."""


def requirements(headers: list[str], python_version: str) -> set[str]:
    """Names that lines of Requires-Dist ask for on Linux, without extras."""
    environment = {
        "python_version": python_version,
        "python_full_version": f"{python_version}.0",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "platform_python_implementation": "CPython",
        "implementation_name": "cpython",
        "os_name": "posix",
        "extra": "",
    }
    parsed = map(Requirement, headers)
    return {canonicalize_name(r.name) for r in parsed if r.marker is None or r.marker.evaluate(environment)}


def installed_closure(name: str, python_version: str) -> set[str]:
    """Canonical names of an installed package and of all that it needs."""
    found: set[str] = set()
    names = {canonicalize_name(name)}
    while names:
        found |= names
        headers: list[str] = []
        for each in names:
            try:
                headers += metadata.requires(each) or []
            except metadata.PackageNotFoundError:
                continue  # of another platform's torch
        names = requirements(headers, python_version) - found
    return found


def locked_versions(lock: Path = LOCK) -> dict[str, str]:
    pinned = re.findall(r"^([\w.-]+)==(\S+)", lock.read_text(), re.MULTILINE)
    return {canonicalize_name(name): version for name, version in pinned}


def download(names: set[str], versions: dict[str, str], python_version: str, folder: Path) -> None:
    """The wheels of exactly these packages, by pip."""
    unknown = sorted(names - versions.keys())
    if unknown:
        raise PackError(f"{LOCK.name} has no version of {', '.join(unknown)}: add it there")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--implementation", "cp", "--python-version", python_version, "--dest", str(folder)]
    for platform in PLATFORMS:
        command += ["--platform", f"{platform}_x86_64"]
    command += [f"{name}=={versions[name]}" for name in sorted(names)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise PackError(f"pip download has not ended in {DOWNLOAD_TIMEOUT_S} s") from None
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise PackError(f"pip download: {errors[-1] if errors else done.stderr[-500:]}")


def needs(wheel: Path, python_version: str) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        [name] = [n for n in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n)]
        headers = Parser().parsestr(archive.read(name).decode(), headersonly=True)
    return requirements(headers.get_all("Requires-Dist", []), python_version)


def collect(folder: Path, python_version: str) -> list[Path]:
    """Fill `folder` with the wheels and no others; PackError if they cannot be had or are too large."""
    versions, present = locked_versions(), installed_closure(PRESENT, python_version)
    with tempfile.TemporaryDirectory() as scratch:
        wheels: list[Path] = []
        asked: set[str] = set()
        names = set(WANTED)
        while names:
            target = Path(scratch, str(len(asked)))
            download(names, versions, python_version, target)
            asked |= names
            new = sorted(target.glob("*.whl"))
            wheels += new
            names = set().union(*(needs(wheel, python_version) for wheel in new)) - asked - present
        total = sum(wheel.stat().st_size for wheel in wheels)
        if total > MAX_BYTES:
            raise PackError(f"the wheels have {total / 2**20:.1f} MiB, more than {MAX_BYTES / 2**20:.0f}")
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.whl"):
            old.unlink()
        return [Path(shutil.copy(wheel, folder)) for wheel in wheels]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Collects the wheels that a bare GPU machine lacks.")
    parser.add_argument("folder", type=Path, nargs="?", default=DEFAULT_FOLDER)
    parser.add_argument("--python-version", default="3.12", help="of that machine; megatron-core needs 3.12")
    options = parser.parse_args(argv)
    try:
        wheels = collect(options.folder, options.python_version)
    except PackError as error:
        print(f"pack: {error}", file=sys.stderr)
        return 1
    for wheel in sorted(wheels, key=lambda wheel: -wheel.stat().st_size):
        print(f"{wheel.stat().st_size / 2**20:7.2f} MiB  {wheel.name}")
    total = sum(wheel.stat().st_size for wheel in wheels)
    print(f"{total / 2**20:7.2f} MiB in {len(wheels)} wheels: {options.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
