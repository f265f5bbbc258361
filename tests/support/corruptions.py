"""Corruptions of checkpoints: each changes one thing in a folder, by the random numbers, and says what."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata


def files(folder: Path, pattern: str = "*") -> list[Path]:
    return sorted(path for path in folder.rglob(pattern) if path.is_file())


def pick(folder: Path, rng: random.Random, *patterns: str) -> Path:
    return rng.choice([path for pattern in patterns for path in files(folder, pattern)])


@contextlib.contextmanager
def content_of(path: Path) -> Iterator[bytearray]:
    """What is changed in it is written back."""
    content = bytearray(path.read_bytes())
    yield content
    path.write_bytes(content)


def header_bytes(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def flipped(name: str, pattern: str, part: Callable[[Path], tuple[int, int | None]] = lambda path: (0, None)):
    """One bit of a file is flipped, in this part of it: its first byte and its end."""

    def corruption(folder: Path, rng: random.Random) -> str:
        path = pick(folder, rng, pattern)
        start, stop = part(path)
        bit = rng.randrange(8 * start, 8 * (stop or path.stat().st_size))
        with content_of(path) as content:
            content[bit // 8] ^= 1 << bit % 8
        return f"{path.name}: bit {bit}"

    corruption.__name__ = f"flip_{name}"
    return corruption


flip_header = flipped("header", "*.safetensors", lambda path: (0, header_bytes(path)))
flip_header_length = flipped("header_length", "*.safetensors", lambda path: (0, 8))
flip_data = flipped("data", "*.safetensors", lambda path: (header_bytes(path), None))
flip_index = flipped("index", "*.index.json")
flip_config = flipped("config", "config.json")
flip_manifest = flipped("manifest", "manifest.json")
flip_tracker = flipped("tracker", "*.txt")
flip_metadata = flipped("metadata", ".metadata")
flip_chunks = flipped("chunks", "__[0-9]*.distcp")


def random_bytes(folder: Path, rng: random.Random) -> str:
    path = pick(folder, rng, "*")
    size = path.stat().st_size
    start = rng.randrange(size)
    length = min(rng.choice([2, 8, 64, 512]), size - start)
    with content_of(path) as content:
        content[start : start + length] = rng.randbytes(length) if rng.random() < 0.5 else bytes(length)
    return f"{path.name}: {length} bytes at {start}"


def moved_bytes(folder: Path, rng: random.Random) -> str:
    """A part of the file, at another place of it."""
    path = pick(folder, rng, "*")
    size = path.stat().st_size
    length = min(size, rng.choice([4, 16, 128]))
    source, target = rng.randrange(size - length + 1), rng.randrange(size - length + 1)
    with content_of(path) as content:
        content[target : target + length] = content[source : source + length]
    return f"{path.name}: {length} bytes from {source} to {target}"


def truncation(folder: Path, rng: random.Random) -> str:
    path = pick(folder, rng, "*")
    size = path.stat().st_size
    left = max(0, size - rng.choice([1, 2, 8, 100])) if rng.random() < 0.5 else rng.randrange(size)
    os.truncate(path, left)
    return f"{path.name}: {left} of {size} bytes left"


def appended(folder: Path, rng: random.Random) -> str:
    path = pick(folder, rng, "*")
    more = rng.choice([b"\0", b" ", b"}", b"1", rng.randbytes(8), bytes(4096)])
    with path.open("ab") as file:
        file.write(more)
    return f"{path.name}: {len(more)} bytes more"


def inserted(folder: Path, rng: random.Random) -> str:
    path = pick(folder, rng, "*")
    place = rng.randrange(path.stat().st_size)
    more = rng.choice([b"0", b"\0", b'"', b"9" * 8, rng.randbytes(4)])
    with content_of(path) as content:
        content[place:place] = more
    return f"{path.name}: {more!r} inserted at {place}"


def swapped_files(folder: Path, rng: random.Random) -> str:
    kind = rng.choice(["*.safetensors", "__*.distcp", "*.json"])
    chosen = files(folder, kind) if len(files(folder, kind)) > 1 else files(folder, "*.json")
    one, other = rng.sample(chosen, 2)
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    return f"{one.name} and {other.name} exchanged"


def deleted(folder: Path, rng: random.Random) -> str:
    path = pick(folder, rng, "*")
    path.unlink()
    return f"{path.name} deleted"


def emptied(folder: Path, rng: random.Random) -> str:
    path = pick(folder, rng, "*")
    path.write_bytes(b"")
    return f"{path.name} empty"


def a_folder(folder: Path, rng: random.Random) -> str:
    path = pick(folder, rng, "*")
    path.unlink()
    path.mkdir()
    return f"{path.name} is a folder"


def other_name(folder: Path, rng: random.Random) -> str:
    path = pick(folder, rng, "*")
    path.rename(path.with_name(path.name[:-1]))
    return f"{path.name} has lost a letter"


def edited_header(folder: Path, rng: random.Random, edit: Callable[[dict, random.Random], str | None]) -> str:
    """Another header, well-formed or not; `edit` returns its text, or None for the JSON that it changed."""
    path = pick(folder, rng, "*.safetensors")
    length = header_bytes(path)
    content = path.read_bytes()
    header = json.loads(content[8:length])
    text = edit(header, rng) or json.dumps(header)
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + content[length:])
    return f"{path.name}: {text[:300]}"


def an_entry(header: dict, rng: random.Random) -> str:
    return rng.choice([name for name in header if name != "__metadata__"])


def renamed_tensor(header: dict, rng: random.Random) -> None:
    name = an_entry(header, rng)
    header[rng.choice([name + "x", name[:-1], name.replace(".", "", 1), ""])] = header.pop(name)


def exchanged_tensors(header: dict, rng: random.Random) -> None:
    one, other = an_entry(header, rng), an_entry(header, rng)
    header[one], header[other] = header[other], header[one]


def other_shape(header: dict, rng: random.Random) -> None:
    entry = header[an_entry(header, rng)]
    shape = entry["shape"]
    entry["shape"] = rng.choice(
        [shape[::-1], [*shape, 1], [1, *shape], [torch.Size(shape).numel()], [], [-1], [2.0], None, "2",
         [shape[0] * 2, *shape[1:]], [10**30], [0, *shape[1:]], [True]]
    )  # fmt: skip


def other_dtype(header: dict, rng: random.Random) -> None:
    header[an_entry(header, rng)]["dtype"] = rng.choice(
        ["F32", "F16", "I16", "U16", "F64", "f32", None, 3, ["F32"], "BOOL", ""]
    )


def other_offsets(header: dict, rng: random.Random) -> None:
    entry = header[an_entry(header, rng)]
    begin, end = entry["data_offsets"]
    shift = rng.choice([-8, -2, 2, 8, 2**31, 2**64])
    entry["data_offsets"] = rng.choice(
        [[begin + shift, end + shift], [begin, end + shift], [end, begin], [begin], [], None, [0, 10**40],
         ["0", "2"], [begin, end, end]]
    )  # fmt: skip


def doubled_entry(header: dict, rng: random.Random) -> str:
    name = an_entry(header, rng)
    text = json.dumps(header)
    return f"{text[:-1]}, {json.dumps(name)}: {json.dumps(header[name])}}}"


def missing_entry(header: dict, rng: random.Random) -> None:
    del header[an_entry(header, rng)]


def strange_header(header: dict, rng: random.Random) -> str:
    return rng.choice(
        ["[]", "null", "3", "{}", '{"a": 1}', "[" * 50_000, "9" * 5_000, '"x"', "\ud7ff", '{"a']
    )


def in_header(edit: Callable) -> Callable[[Path, random.Random], str]:
    def corruption(folder: Path, rng: random.Random) -> str:
        return edited_header(folder, rng, edit)

    corruption.__name__ = edit.__name__
    return corruption


def edited_index(folder: Path, rng: random.Random) -> str:
    path = pick(folder, rng, "*.index.json")
    index = json.loads(path.read_text())
    names = index["weight_map"]
    name, other = rng.sample(sorted(names), 2)
    file = names[name]
    what = rng.randrange(8)
    if what == 0:
        del names[name]
    elif what == 1:
        names[name] = next(value for value in names.values() if value != file)
    elif what == 2:
        names[name + "x"] = names.pop(name)
    elif what == 3:
        names[name] = rng.choice(
            ["none.safetensors", "../x", "/etc/passwd", "..", "", "a" * 300, "a\0b", file + "/"]
        )
    elif what == 4:
        names[name] = rng.choice([None, 3, [file], {"a": file}])
    elif what == 5:
        index = rng.choice([[], None, {}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": None}])
    elif what == 6:
        names["one.more"] = file
    else:
        names[name], names[other] = names[other], names[name]
    path.write_text(json.dumps(index))
    return f"index: edit {what} of {name}"


def edited_config(folder: Path, rng: random.Random) -> str:
    path = pick(folder, rng, "config.json")
    config = json.loads(path.read_text())
    field = rng.choice(sorted(config))
    numbers = [0, -1, *range(1, 5), 16, 10**7, 10**13, 10**400, 1.5, 1e308]
    value = rng.choice([None, *numbers, "x", [], {}, True, False, [[]], {"a": 1}])
    if rng.random() < 0.2:
        del config[field]
    else:
        config[field] = value
    path.write_text(json.dumps(config))
    return f"config: {field} {value!r:.40}"


def edited_manifest(folder: Path, rng: random.Random) -> str:
    path = pick(folder, rng, "manifest.json")
    manifest = json.loads(path.read_text())
    entries = manifest["tensors"]
    name = rng.choice(sorted(entries))
    what = rng.randrange(5)
    if what == 0:
        del entries[name]
    elif what == 1:
        entries[name]["shape"] = rng.choice([None, 3, [2], "x"])
    elif what == 2:
        entries[name]["hash"] = rng.choice([None, "00", 3])
    elif what == 3:
        entries[name] = rng.choice([None, [], 3, {}])
    else:
        manifest = rng.choice([[], None, {}, {"tensors": {}}, manifest | {"hash": "md5"}])
    path.write_text(json.dumps(manifest))
    return f"manifest: edit {what} of {name}"


def edited_metadata(folder: Path, rng: random.Random) -> str:
    """Metadata that is a sound pickle, and wrong."""
    path = pick(folder, rng, ".metadata")
    metadata = pickle.loads(path.read_bytes())
    tensors, places = metadata.state_dict_metadata, metadata.storage_data
    key = rng.choice([key for key, value in tensors.items() if isinstance(value, TensorStorageMetadata)])
    number = rng.randrange(len(tensors[key].chunks))
    chunk = tensors[key].chunks[number]
    index = next(index for index in places if index.fqn == key and index.offset == chunk.offsets)
    place = places[index]
    twin = rng.choice([i for i in places if i.offset is not None and places[i] != place])
    what = rng.randrange(16)
    if what == 0:
        del tensors[key].chunks[number]
    elif what == 1:
        tensors[key].chunks.append(chunk)
    elif what == 2:
        chunk.offsets = torch.Size(n + rng.choice([-1, 1]) * (i == 0) for i, n in enumerate(chunk.offsets))
    elif what == 3:
        chunk.sizes = torch.Size(n * rng.choice([2, 0, 2**40]) for n in chunk.sizes)
    elif what == 4:
        chunk.sizes = torch.Size(reversed(chunk.sizes))
    elif what == 5:
        tensors[key].properties.dtype = rng.choice([torch.float32, torch.float16, torch.int8, None, "x"])
    elif what == 6:
        places[index] = replace(
            place, relative_path=rng.choice(["../x", "x", "", "..", "/etc/passwd", None, 3, "a\0"])
        )
    elif what == 7:
        places[index] = replace(place, offset=place.offset + rng.choice([-64, -1, 1, 64, 2**40, -(2**40)]))
    elif what == 8:
        places[index] = replace(
            place, length=place.length + rng.choice([-64, -1, 1, 64, place.length, 2**40])
        )
    elif what == 9:
        places[index], places[twin] = places[twin], place
    elif what == 10:
        places[index] = places[twin]
    elif what == 11:
        del places[index]
    elif what == 12:
        tensors[rng.choice([key + "x", "model", ""])] = tensors.pop(key)
    elif what == 13:
        tensors["another"] = tensors[key]
    elif what == 14:
        tensors[key].size = torch.Size(n * rng.choice([2, 3, 2**40]) for n in tensors[key].size)
    else:
        wrong = rng.choice([None, 3, [], {}, {"a": 1}])
        setattr(metadata, rng.choice(["state_dict_metadata", "storage_data"]), wrong)
    path.write_bytes(pickle.dumps(metadata))
    return f"metadata: edit {what} of {key}"


def earlier_archive(folder: Path, rng: random.Random) -> str:
    """A chunk's range has its neighbour in it: zipfile skips what is before an archive."""
    path = pick(folder, rng, ".metadata")
    metadata = pickle.loads(path.read_bytes())
    places = metadata.storage_data
    chunks = sorted(
        (index for index in places if index.offset is not None),
        key=lambda index: (places[index].relative_path, places[index].offset),
    )
    number = rng.randrange(1, len(chunks))
    before, place = places[chunks[number - 1]], places[chunks[number]]
    both = before.length + place.length
    change = rng.choice(
        [{"offset": before.offset}, {"offset": before.offset, "length": both}, {"offset": before.offset - 7},
         {"offset": before.offset, "length": before.length}, {"length": both}]
    )  # fmt: skip
    places[chunks[number]] = replace(place, **change)
    path.write_bytes(pickle.dumps(metadata))
    return f"{chunks[number].fqn} at {change}"


ANY_FILE = (
    random_bytes, moved_bytes, truncation, appended, inserted, swapped_files, deleted, emptied, a_folder,
    other_name, flip_config, edited_config,
)  # fmt: skip
HEADERS = tuple(
    in_header(edit)
    for edit in (
        renamed_tensor, exchanged_tensors, other_shape, other_dtype, other_offsets, doubled_entry,
        missing_entry, strange_header,
    )
)  # fmt: skip
HF = (*ANY_FILE, *HEADERS, flip_header, flip_header_length, flip_data, flip_index, edited_index)
MANIFEST = (flip_manifest, edited_manifest)
MEGATRON = (
    *ANY_FILE, *MANIFEST, flip_tracker, flip_metadata, flip_metadata, flip_metadata, flip_chunks, flip_chunks,
    edited_metadata, edited_metadata, earlier_archive,
)  # fmt: skip
CASES = {"plain": HF, "hf": (*HF, *MANIFEST), "megatron": MEGATRON}
