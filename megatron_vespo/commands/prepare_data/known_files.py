"""Finds the files of a public set: a local copy, or a download from the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from megatron_vespo.commands.prepare_data.known_sets import KnownSet
from megatron_vespo.data.jsonl import kind
from megatron_vespo.data.located import located
from megatron_vespo.data.rows import file_rows

SUFFIXES = (".parquet", ".jsonl", ".json")
HUB_TIMEOUT_S = 30.0  # for one answer; the hub's own deadlines bound the rest


def source_files(known: KnownSet, source: Path) -> list[Path]:
    """`source` itself, or the files of the split in that folder; ValueError if they are ambiguous."""
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise ValueError(f"--source {source}: no such file or folder")
    found = sorted(path for path in source.rglob("*") if path.suffix in SUFFIXES and path.is_file())
    matching = [path for path in found if fnmatch(path.relative_to(source).as_posix(), known.files)]
    if matching:
        return matching
    if len(found) == 1:
        return found
    names = ", ".join(path.relative_to(source).as_posix() for path in found[:5]) or "no data files"
    raise ValueError(
        f"--source {source}: nothing there is {known.files}, the {known.split} split of {known.repo} "
        f"(there are {names}): name the file"
    )


def rows_of(path: Path) -> Iterator[tuple[str, dict]]:
    """(where, row) of a .parquet, .jsonl or .json file; a .json file has a list of objects."""
    if path.suffix != ".json":
        yield from file_rows(path, "--source")
        return
    with located(str(path)):
        rows = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(rows, list):
        raise ValueError(f"{path}: must hold a list of objects, it is {kind(rows)}")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"{path} entry {number}: must be an object, it is {kind(row)}")
        yield f"{path} entry {number}", row


def download(known: KnownSet, revision: str | None) -> Path:
    """The local folder of the set's files; ValueError if the hub cannot provide them."""
    elsewhere = "; --source takes a local copy"
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ValueError(f"huggingface_hub is not installed{elsewhere}") from error
    try:
        folder = snapshot_download(
            known.repo,
            repo_type="dataset",
            revision=revision,
            allow_patterns=known.files,
            etag_timeout=HUB_TIMEOUT_S,
        )
    except Exception as error:  # from the network, the hub or the disk: a dozen classes of several packages
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{known.repo} cannot be downloaded ({reason}){elsewhere}") from error
    return Path(folder)
