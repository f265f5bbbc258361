"""Makes the wheels of `pack.py` importable without pip. Standard library only."""

from __future__ import annotations

import importlib.util
import platform
import re
import sys
import zipfile
from importlib import metadata
from pathlib import Path

PATCHES = Path(__file__).resolve().parents[2] / "patches"
# always from the pack: its files are changed by our patches, and what is installed stays as it is
PATCHED = "megatron_core"


def unpack(pack: Path, folder: Path) -> list[str]:
    """Put the packages of `pack` into `folder`; returns the names of the wheels that are in it.

    Left out are packages that are installed, and compiled ones of another Python or processor: who imports
    one of these says so. Megatron's compiled part is not used here, so it may be of any Python.
    """
    taken = []
    for wheel in sorted(pack.glob("*.whl")):
        name = wheel.name.split("-")[0]
        if name != PATCHED and (_installed(name) or not _runs_here(wheel.name)):
            continue
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        taken.append(wheel.name)
        if name == PATCHED:
            _patch(wheel.name.split("-")[1], folder)
    return taken


def _installed(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _runs_here(wheel: str) -> bool:
    """By the tags at the end of its name: pythons-abis-platforms."""
    python, abi, system = wheel.removesuffix(".whl").split("-")[-3:]
    if system == "any":
        return True
    own = "".join(map(str, sys.version_info[:2]))
    versions = re.findall(r"cp3(\d+)", python)
    stable = abi == "abi3" and any(int(minor) <= sys.version_info[1] for minor in versions)
    return platform.machine() in system and (stable or f"cp{own}" in python)


def apply_module():
    """patches/apply.py, which is a program and no part of a package."""
    spec = importlib.util.spec_from_file_location("apply_patches", PATCHES / "apply.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its classes look themselves up there
    spec.loader.exec_module(module)
    return module


def _patch(version: str, folder: Path) -> None:
    apply = apply_module()
    for diff in sorted((PATCHES / f"{PATCHED.replace('_', '-')}-{version}").glob("*.diff")):
        for file_patch in apply.parse_diff(diff):
            apply.run("apply", file_patch, folder)
