"""Apply, check or revert the patches to installed packages that this folder holds.

    python patches/apply.py apply|check|revert [--python PYTHON]

PYTHON is the interpreter whose packages are meant; without it, the one that runs this. A folder NAME-VERSION
holds the diffs for exactly that version of the package NAME. Standard library only, any Python >= 3.8.

Each file changes in one atomic step and its content tells whether it is patched: the command may be killed
and repeated at any moment. A file is never written in place: installers hard-link files from a shared cache.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

PATCHES = Path(__file__).resolve().parent

_HUNK = re.compile(r"^@@ -(\d+)(?:,\d+)? \+(\d+)(?:,\d+)? @@")

_FIND_PACKAGE = """
import importlib.metadata, json, sys
try:
    found = importlib.metadata.distribution(sys.argv[1])
    print(json.dumps({"version": found.version, "root": str(found.locate_file(""))}))
except importlib.metadata.PackageNotFoundError:
    print(json.dumps(None))
"""


class PatchError(ValueError):
    """A patch cannot be applied, checked or reverted; says which and why."""


class Hunk(NamedTuple):
    old_start: int  # index of its first line in the original file
    new_start: int  # the same in the patched file
    old: list[str]
    new: list[str]


class FilePatch(NamedTuple):
    diff: Path
    target: str  # path below site-packages
    hunks: list[Hunk]


def parse_diff(diff: Path) -> list[FilePatch]:
    """Read a unified diff; what stands before its first '--- a/' line is prose."""
    patches: list[FilePatch] = []
    for line in diff.read_text(encoding="utf-8").splitlines(keepends=True):
        hunk_header = _HUNK.match(line)
        if line.startswith("--- a/"):
            patches.append(FilePatch(diff, line[len("--- a/") :].strip(), []))
        elif not patches or line.startswith("+++ b/"):
            continue
        elif hunk_header:
            start = [int(number) - 1 for number in hunk_header.groups()]
            patches[-1].hunks.append(Hunk(start[0], start[1], [], []))
        elif line[0] in " -+":
            hunk = patches[-1].hunks[-1]
            if line[0] in " -":
                hunk.old.append(line[1:])
            if line[0] in " +":
                hunk.new.append(line[1:])
        else:
            raise PatchError(f"{diff.name}: unexpected line {line!r}")
    if not patches or not all(patch.hunks for patch in patches):
        raise PatchError(f"{diff}: no changes found in it")
    return patches


def convert(patch: FilePatch, text: str, revert: bool) -> str | None:
    """The text with (revert: without) the patch, or None if it is not in the state to start from."""
    lines = text.splitlines(keepends=True)
    result: list[str] = []
    position = 0
    for hunk in patch.hunks:
        start, before, after = (
            (hunk.new_start, hunk.new, hunk.old) if revert else (hunk.old_start, hunk.old, hunk.new)
        )
        if lines[start : start + len(before)] != before:
            return None
        result += lines[position:start] + after
        position = start + len(before)
    return "".join(result + lines[position:])


def replace_file(path: Path, text: str) -> None:
    """Put a new file in the place of an old one, whose other hard links keep the old content."""
    temporary = path.with_name(f".{path.name}.patching-{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        shutil.copymode(path, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def packages(folder: Path) -> dict[str, list[str]]:
    """{package name: the versions for which there are diffs}."""
    found: dict[str, list[str]] = {}
    for child in sorted(folder.iterdir()):
        if child.is_dir() and any(child.glob("*.diff")):
            name, _, version = child.name.rpartition("-")
            found.setdefault(name, []).append(version)
    return found


def find_site_packages(python: str, name: str, versions: list[str]) -> tuple[str, Path]:
    """The installed version of a package and the folder it is installed in."""
    command = [python, "-I", "-c", _FIND_PACKAGE, name]
    try:
        output = subprocess.run(
            command, stdout=subprocess.PIPE, timeout=60, check=True, encoding="utf-8"
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise PatchError(f"cannot run {python}: {error}") from error
    installed = json.loads(output)
    if installed is None:
        raise PatchError(
            f"{name} is not installed for {python}; the patches are for {name} {', '.join(versions)}"
        )
    if installed["version"] not in versions:
        raise PatchError(
            f"{name} {installed['version']} is installed for {python}; the patches are for {name} "
            f"{', '.join(versions)}: install that version, or write patches/{name}-{installed['version']}/"
        )
    return installed["version"], Path(installed["root"])


def run(action: str, patch: FilePatch, site_packages: Path) -> bool:
    """Do one action on one file; returns whether the patch is applied afterwards."""
    path = site_packages / patch.target
    try:
        with open(path, encoding="utf-8", newline="") as file:
            text = file.read()
    except OSError as error:
        raise PatchError(f"{patch.diff.name}: cannot read {path}: {error}") from error
    patched = convert(patch, text, revert=False)
    original = convert(patch, text, revert=True)
    if (patched is None) == (original is None):
        raise PatchError(
            f"{patch.diff.name}: {path} is neither the original nor the patched file; reinstall the package"
        )
    if action == "apply" and patched is not None:
        replace_file(path, patched)
    elif action == "revert" and original is not None:
        replace_file(path, original)
    return {"apply": True, "revert": False, "check": original is not None}[action]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Patches to installed packages.")
    parser.add_argument(
        "action", choices=["apply", "check", "revert"], help="check exits 0 if all are applied"
    )
    parser.add_argument("--python", default=sys.executable, help="interpreter whose packages are meant")
    parser.add_argument("--patches", type=Path, default=PATCHES, help="folder of NAME-VERSION folders")
    options = parser.parse_args(argv)
    all_applied = True
    try:
        for name, versions in packages(options.patches).items():
            version, site_packages = find_site_packages(options.python, name, versions)
            diffs = sorted((options.patches / f"{name}-{version}").glob("*.diff"))
            patches = [patch for diff in diffs for patch in parse_diff(diff)]
            targets = [patch.target for patch in patches]
            if len(set(targets)) != len(targets):
                raise PatchError(f"{name}-{version}: two diffs change one file; make them one diff")
            for patch in patches:
                applied = run(options.action, patch, site_packages)
                all_applied = all_applied and applied
                print(f"{'applied' if applied else 'not applied'}: {name} {version} {patch.diff.stem}")
    except PatchError as error:
        print(f"patches: {error}", file=sys.stderr)
        return 1
    return 1 if options.action == "check" and not all_applied else 0


if __name__ == "__main__":
    sys.exit(main())
