"""Headers of safetensors files, against the safetensors library in both directions."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_vespo.checkpoints.hf_writer import ShardFile, plan_shards
from megatron_vespo.checkpoints.safetensors_file import DTYPES, TensorInfo, header, read_header
from megatron_vespo.checkpoints.spans import Span

SHAPES = [(), (1,), (0,), (3, 0), (0, 3), (5,), (2, 3), (2, 1, 3)]


def values_of(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Every byte another one."""
    size = math.prod(shape) * dtype.itemsize
    if dtype == torch.bool:
        return (torch.arange(size) % 2 == 0).view(shape)
    return (torch.arange(size) % 256).to(torch.uint8).view(dtype).view(shape)


def all_tensors() -> dict[str, torch.Tensor]:
    return {f"{dtype}{shape}": values_of(dtype, shape) for dtype in DTYPES.values() for shape in SHAPES}


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return one.reshape(-1).view(torch.uint8).equal(other.reshape(-1).view(torch.uint8))


def test_reads_what_the_library_writes(tmp_path):
    tensors, path = all_tensors(), tmp_path / "file"
    save_file(tensors, path)
    found, content = read_header(path), path.read_bytes()
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        info = found[name]
        assert (info.dtype, info.shape, info.nbytes) == (tensor.dtype, tuple(tensor.shape), tensor.nbytes)
        assert info.rows * info.row_bytes == info.nbytes or not info.nbytes
        assert (
            content[info.offset : info.offset + info.nbytes]
            == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        )


def test_the_library_reads_what_is_written(tmp_path):
    tensors, path = all_tensors(), tmp_path / "file"
    infos = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    shards = plan_shards(infos, 10**9)
    assert list(shards) == ["model.safetensors"]
    with ShardFile(path, shards["model.safetensors"]) as file:
        for name, tensor in reversed(tensors.items()):
            rows = infos[name].rows
            for row in reversed(range(rows)):
                file.write(Span(name, row, row + 1), tensor[row : row + 1] if tensor.dim() else tensor)
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    assert all(same_bits(loaded[name], tensor) for name, tensor in tensors.items())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    own = read_header(path)
    assert all(tensor.offset % tensor.dtype.itemsize == 0 for tensor in own.values()), "not aligned"


def test_the_header_is_aligned():
    for length in range(1, 20):
        text, offsets = header({"x" * length: TensorInfo(torch.float32, (2,))})
        assert len(text) % 8 == 0 and list(offsets.values()) == [len(text)]


def write_raw(path, entries, data: bytes = b"", length: int | None = None) -> None:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("entries", "data", "expected"),
    [
        ({"a": entry()}, 7, "(76 bytes) is cut short"),
        ({"a": entry()}, 9, "not fully covered"),
        ({"a": entry(offsets=(1, 9))}, 9, "invalid offset for tensor `a`"),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, 12, "`b`"),
        ({"a": entry(), "b": entry()}, 8, "invalid offset for tensor"),
        ({"a": entry(shape=(3,))}, 8, "invalid shape"),
        ({"a": entry(dtype="BF16")}, 8, "invalid shape"),
        ({"a": entry(offsets=(8, 0))}, 8, "`a`"),
        ({"a": entry(shape=(2**62, 2**62))}, 8, "overflow"),
        ({"a": entry(dtype="F33")}, 8, "`F33`"),
        ({"a": entry(dtype="U64", shape=(1,))}, 8, "tensor a is U64; supported are BOOL, U8"),
        ({"a": entry(dtype=["F32"])}, 8, ""),
        ({"a": entry(dtype=None)}, 8, ""),
        ({"a": entry(shape=None)}, 8, ""),
        ({"a": entry(shape=(2.0,))}, 8, ""),
        ({"a": entry(shape=(True, 2))}, 8, ""),
        ({"a": entry(shape=(-2,))}, 8, ""),
        ({"a": entry(shape="2")}, 8, ""),
        ({"a": entry(offsets=(0,))}, 8, ""),
        ({"a": entry(offsets=(0, 8, 8))}, 8, ""),
        ({"a": entry(offsets=("0", "8"))}, 8, ""),
        ({"a": {"dtype": "F32"}}, 8, "missing field"),
        ({"a": []}, 8, ""),
        ({"a": "F32"}, 8, ""),
        ({"a": None}, 8, ""),
        ({"a\nb": entry(shape=(3,))}, 8, ""),
        ({"a\nb": entry(), "c": entry()}, 8, "invalid offset"),
        ([], 0, "invalid JSON"),
        (None, 0, "invalid JSON"),
        (b"{", 0, "invalid JSON"),
        (b"\xff\xfe", 0, "invalid UTF-8"),
        (b"[" * 99_999, 0, "invalid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", 0, "invalid JSON"),
        (b'{"a": {}, "a": {}}', 0, "missing field"),
        (b'{"a": {"dtype": "F32", "dtype": "F32"}}', 0, "duplicate field"),
    ],
)  # fmt: skip
def test_a_header_that_lies(tmp_path, entries, data, expected):
    path = tmp_path / "file"
    write_raw(path, entries, bytes(data))
    check_refused(path, expected)


def check_refused(path: Path, expected: str) -> None:
    with pytest.raises(ValueError) as error:
        read_header(path)
    text = str(error.value)
    assert text.startswith(str(path)) and expected in text
    assert "\n" not in text and len(text) < len(str(path)) + 400


@pytest.mark.parametrize("content", [b"", b"\2", b"\2\0\0\0\0\0\0", b"\3\0\0\0\0\0\0\0{}", b"\xff" * 100])
def test_a_length_that_lies(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    check_refused(tmp_path / "file", f"({len(content)} bytes) is cut short or no safetensors file: ")


def test_no_file_at_all(tmp_path):
    with pytest.raises(ValueError, match=f"^{tmp_path}/none cannot be read: No such file or directory$"):
        read_header(tmp_path / "none")
    with pytest.raises(ValueError, match=f"^{tmp_path} cannot be read: Is a directory$"):
        read_header(tmp_path)


def infos(*rows: int, dtype=torch.float32) -> dict[str, TensorInfo]:
    return {f"t{number}": TensorInfo(dtype, (count,)) for number, count in enumerate(rows)}


def test_shards_hold_at_most_what_they_may():
    shards = plan_shards(infos(1, 2, 3, 10, 1), max_bytes=16)
    assert [list(shard) for shard in shards.values()] == [["t0", "t1"], ["t2"], ["t3"], ["t4"]]
    assert list(shards) == [f"model-0000{n}-of-00004.safetensors" for n in (1, 2, 3, 4)]


def test_wide_elements_come_first():
    mixed = {"a": TensorInfo(torch.bfloat16, (1,)), "b": TensorInfo(torch.float32, (1,))}
    assert list(plan_shards(mixed, 100)["model.safetensors"]) == ["b", "a"]


def test_a_file_that_is_there_is_not_written_over(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(FileExistsError):
        ShardFile(tmp_path / "file", infos(1))
    assert (tmp_path / "file").read_text() == "kept"
