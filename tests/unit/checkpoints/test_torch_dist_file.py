"""torch_dist files: what torch.save writes is found, nothing else is, and no pickle runs code."""

import io
import os
import pickle
import time
import zipfile
from argparse import Namespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from megatron_vespo.checkpoints import torch_dist_writer
from megatron_vespo.checkpoints.names import METADATA_NAME
from megatron_vespo.checkpoints.torch_dist_file import locate_chunk, read_metadata
from megatron_vespo.checkpoints.torch_dist_names import addresses
from megatron_vespo.models.family import family_of, shape_of
from tests.support.tiny_checkpoints import LLAMA, MOE, convert, random_tensors, tiny_config, write_hf


def saved(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(3,), (2, 3), (1, 1, 5), (0, 3), (1000,)])
def test_finds_what_torch_saves(tmp_path, dtype, shape):
    values = torch.rand(shape).to(dtype)
    before, archive = b"before", saved(values)
    (tmp_path / "file").write_bytes(before + archive + b"after")
    found = locate_chunk(tmp_path / "file", len(before), len(archive))
    assert (found.dtype, found.shape) == (dtype, shape)
    content = (tmp_path / "file").read_bytes()[found.offset : found.offset + values.nbytes]
    assert content == values.reshape(-1).view(torch.uint8).numpy().tobytes()


def refused(path, offset, length) -> str:
    with pytest.raises(ValueError) as error:
        locate_chunk(path, offset, length)
    text = str(error.value)
    assert text.startswith(f"{path}: the {length} bytes at {offset} are no tensor saved by torch: ")
    return text


def test_the_range_is_one_archive(tmp_path):
    """zipfile finds an archive behind anything and before a comment: a neighbour's, of the same shape."""
    one, two = saved(torch.zeros(4)), saved(torch.ones(4))
    path, size = tmp_path / "file", len(one)
    assert len(two) == size
    path.write_bytes(one + two + one)
    assert locate_chunk(path, size, size).offset > size
    for offset, length in [
        (0, 2 * size), (size - 1, size + 1), (1, size), (size // 2, size), (size, size + 8), (size, size - 1),
        (2 * size, size + 1), (3 * size, size), (0, 0), (0, 10), (10**15, size), (0, 10**15),
    ]:  # fmt: skip
        refused(path, offset, length)


@pytest.mark.parametrize(
    "value",
    [
        [torch.ones(2)], {"a": torch.ones(2)}, None, 3, torch.ones(2, dtype=torch.int32),
        torch.ones(2, 3).T, torch.ones(4)[1:3], torch.ones(1).expand(4), torch.ones(2).to_sparse(),
        torch.nn.Parameter(torch.ones(2)),
    ],
)  # fmt: skip
def test_other_values_are_refused(tmp_path, value):
    (tmp_path / "file").write_bytes(saved(value))
    refused(tmp_path / "file", 0, (tmp_path / "file").stat().st_size)


@pytest.mark.long
def test_every_flipped_bit_is_refused_or_of_no_consequence(tmp_path):
    """Of the archive, the values themselves excepted: these have only a manifest to protect them."""
    values = torch.arange(4.0)
    archive, path = saved(values), tmp_path / "file"
    path.write_bytes(archive)
    intact = locate_chunk(path, 0, len(archive))
    outside = [n for n in range(len(archive)) if not intact.offset <= n < intact.offset + values.nbytes]
    refusals = 0
    for byte in outside:
        for bit in range(8):
            damaged = bytearray(archive)
            damaged[byte] ^= 1 << bit
            path.write_bytes(damaged)
            try:
                assert locate_chunk(path, 0, len(archive)) == intact, (byte, bit)
            except ValueError:
                refusals += 1
    assert refusals > 1000


def hf_source(tmp_path, architecture: str, dtype=torch.bfloat16):
    """An HF folder, its shape, and Megatron's parameters of the same values by their names."""
    config = tiny_config(architecture)
    tensors = random_tensors(config, dtype)
    source = write_hf(tmp_path / "hf", config, tensors)
    family, shape = family_of(config), shape_of(config)
    mappings = {name: family.mapping_for(name, shape) for name in family.parameters(shape)}
    parameters = {
        name: mapping.shard([tensors[hf_name] for hf_name in mapping.hf_names], 1)[0]
        for name, mapping in mappings.items()
    }
    return source, shape, parameters


class Evil:
    def __init__(self, function, *arguments):
        self._call = function, arguments

    def __reduce__(self):
        return self._call


def evils(mark) -> list:
    return [
        Evil(os.system, f"touch {mark}"),
        Evil(open, str(mark), "w"),
        Evil(eval, f"open({str(mark)!r}, 'w')"),
        Evil(__import__, "os"),
    ]


@pytest.mark.parametrize("number", range(4))
def test_a_malicious_pickle_does_not_run(tmp_path, number):
    path, mark = tmp_path / "file", tmp_path / "mark"
    evil = evils(mark)[number]
    hidden = Metadata({"a": BytesStorageMetadata()}, planner_data=evil, storage_data={})
    for content in (evil, hidden):
        (tmp_path / METADATA_NAME).write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match="is no metadata of a torch_dist checkpoint: it asks for "):
            read_metadata(tmp_path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(evil))
    assert "it asks for " in refused(path, 0, path.stat().st_size)
    assert not mark.exists()


def test_malicious_arguments_do_not_run(tmp_path, monkeypatch):
    mark, (source, *_) = tmp_path / "mark", hf_source(tmp_path, LLAMA)
    common_state = {"args": Namespace(a=evils(mark))}
    monkeypatch.setattr(torch_dist_writer, "_common_state", lambda arguments: common_state)
    assert convert("hf-to-megatron", source, tmp_path / "megatron") == 0
    assert convert("verify", tmp_path / "megatron", source) == 0
    assert not mark.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"", b".", b"N.", b"garbage", pickle.dumps(None), pickle.dumps({}), pickle.dumps(Metadata({})),
        pickle.dumps(Metadata(None, storage_data={})), pickle.dumps(Metadata({}, storage_data=[])),
        pickle.dumps(Metadata({"a": 3}, storage_data={})), pickle.dumps(Metadata({}, storage_data={"a": 3})),
        b"\x80\x04ctorch\nload\n.", b"\x80\x04cmegatron.core\nanything\n.",
        # memory that a few bytes ask for: a memo index, a byte array, a string, a frame
        b"\x80\x04Nr\xff\xff\xff\xff.", b"\x80\x05\x96" + bytes([0, 0, 0, 0, 4, 0, 0, 0]) + b".",
        b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f.", b"\x80\x04\x95" + b"\xff" * 7 + b"\x7f.",
    ],
)  # fmt: skip
def test_broken_metadata(tmp_path, content):
    (tmp_path / METADATA_NAME).write_bytes(content)
    started = time.monotonic()
    place = tmp_path / METADATA_NAME
    with pytest.raises(ValueError, match=f"^{place} is no metadata of a torch_dist checkpoint: "):
        read_metadata(tmp_path)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("architecture", [MOE, LLAMA])
def test_torchs_own_reader_agrees(tmp_path, architecture):
    """What is written, loaded by torch.distributed.checkpoint into whole stacked tensors."""
    source, shape, parameters = hf_source(tmp_path, architecture)
    assert convert("hf-to-megatron", source, tmp_path / "megatron") == 0
    folder = tmp_path / "megatron" / "release"
    stored = read_metadata(folder).state_dict_metadata
    state = {
        key: torch.full(value.size, torch.nan, dtype=value.properties.dtype)
        for key, value in stored.items()
        if not isinstance(value, BytesStorageMetadata)
    }
    dcp.load(state, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    assert all(value.isfinite().all() for value in state.values())
    for name, expected in parameters.items():
        for address in addresses(name, shape):
            assert state[address.key][address.index].equal(expected), name
    objects = {key: io.BytesIO() for key, value in stored.items() if isinstance(value, BytesStorageMetadata)}
    dcp.load(objects, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    (common,) = objects.pop("common_state/shard_0_1")
    assert common["args"].num_layers == 2 and common["checkpoint_version"] == 3.0
    assert objects and all(value == [None] for value in objects.values())


@pytest.mark.parametrize("named", ["iter_0000007", "release"])
def test_what_torch_writes_is_read(tmp_path, named):
    """Saved by torch.distributed.checkpoint itself, with tensors that are no part of a model."""
    source, shape, parameters = hf_source(tmp_path, LLAMA, torch.float32)
    state = {"optimizer.state.exp_avg": torch.ones(3), "rng_state": torch.zeros(2)}
    for name, values in parameters.items():
        (address,) = addresses(name, shape)
        stacked = state.setdefault(address.key, torch.full((*address.stack, *values.shape), torch.nan))
        stacked[address.index] = values
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path / "megatron" / named), no_dist=True)
    (tmp_path / "megatron" / "latest_checkpointed_iteration.txt").write_text(named.replace("iter_000000", ""))
    command = ("megatron-to-hf", tmp_path / "megatron", tmp_path / "out")
    assert convert(*command) == 2  # it holds no HF config
    assert convert(*command, "--hf-config", source) == 0
    assert convert("verify", tmp_path / "out", source) == 0
