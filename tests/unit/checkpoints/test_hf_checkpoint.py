"""HF checkpoint folders: reading, writing, and what transformers makes of the result."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vespo.checkpoints.buckets import buckets
from megatron_vespo.checkpoints.hf_checkpoint import HFCheckpointReader
from megatron_vespo.checkpoints.hf_shards import finish_checkpoint, write_shards
from megatron_vespo.checkpoints.names import INDEX_NAME
from tests.support.tensors import assert_same

A = torch.arange(6, dtype=torch.bfloat16).view(2, 3)
B = torch.tensor([0.5, -0.5])


def write_index(folder, weight_map: dict[str, str]) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def single(tmp_path):
    save_file({"a": A, "b": B}, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    save_file({"a": A}, tmp_path / "one.safetensors")
    save_file({"b": B}, tmp_path / "two.safetensors")
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    return tmp_path


@pytest.fixture(params=["single", "sharded"])
def either(request):
    return request.getfixturevalue(request.param)


def test_reads_both_layouts(either):
    with HFCheckpointReader(either) as reader:
        found = {name: (info.dtype, info.shape) for name, info in reader.tensors.items()}
        assert found == {"a": (torch.bfloat16, (2, 3)), "b": (torch.float32, (2,))}
        assert_same({name: reader.get(name) for name in "ab"}, {"a": A, "b": B})
        path, offset = reader.place("a")
        assert path.read_bytes()[offset : offset + 12] == A.view(torch.uint8).numpy().tobytes()
        out = torch.zeros(6, dtype=torch.uint8)
        reader.read_rows("a", 1, 2, out)
        assert out.view(torch.bfloat16).equal(A[1])
        with pytest.raises(ValueError, match=f"^{either}: tensor c is missing$"):
            reader.get("c")


def refused(folder) -> str:
    with pytest.raises(ValueError) as error:
        HFCheckpointReader(folder)
    return str(error.value)


def test_missing_file_is_named_before_anything_is_read(sharded):
    (sharded / "two.safetensors").unlink()
    assert refused(sharded) == f"{sharded / INDEX_NAME} names files that do not exist: two.safetensors"


def test_a_folder_without_weights(tmp_path):
    nothing = f"{tmp_path}: neither {INDEX_NAME} nor model.safetensors is there"
    assert refused(tmp_path) == nothing
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert refused(tmp_path) == (
        f"{nothing}; pytorch_model.bin is a pickle, which is not read: save it as safetensors first"
    )


def test_no_folder(tmp_path):
    assert refused(tmp_path / "none") == f"{tmp_path / 'none'} is no folder"


def test_truncated_file(either):
    path = max(either.glob("*.safetensors"))
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-4])
    assert refused(path.parent).startswith(f"{path} ({size - 4} bytes) is cut short or no safetensors file: ")


def test_a_file_that_shrinks_while_it_is_read(single):
    path = single / "model.safetensors"
    with HFCheckpointReader(single) as reader:
        size = path.stat().st_size
        path.write_bytes(path.read_bytes()[:-4])
        last = max(reader.tensors, key=lambda name: reader.place(name)[1])
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))} is cut short at byte {size - 4}$"):
            reader.get(last)


ONE, TWO = "one.safetensors", "two.safetensors"


@pytest.mark.parametrize(
    ("weight_map", "expected"),
    [
        ({"a": ONE, "b": ONE}, f"{{}}: {ONE} lacks b, which the index places there"),
        ({"a": TWO, "b": TWO}, f"{{}}: {TWO} lacks a, which the index places there"),
        ({"a": TWO, "b": ONE}, f"{{}}/{TWO} holds tensor b, which the index places in {ONE}"),
        ({"b": ONE}, f"{{}}/{ONE} holds tensor a, which the index places in no file"),
    ],
)
def test_an_index_that_is_wrong_about_a_file(sharded, weight_map, expected):
    write_index(sharded, weight_map)
    assert refused(sharded) == expected.format(sharded)


def test_a_tensor_in_two_files(sharded):
    save_file({"a": A, "b": B}, sharded / "two.safetensors")
    assert refused(sharded) == f"{sharded}: tensor a is in one.safetensors and in two.safetensors"


@pytest.mark.parametrize(
    "text",
    [
        "{", "{}", "[]", "", "\x00", '{"weight_map": null}', '{"weight_map": []}', '{"weight_map": {}}',
        '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "../one.safetensors"}}', "[" * 99_999,
        '{"weight_map": {"a": ".."}}',
        '{"weight_map": {"a": "/one.safetensors"}}', '{"weight_map": {"a": ""}}',
    ],
)  # fmt: skip
def test_broken_index(tmp_path, text):
    (tmp_path / INDEX_NAME).write_text(text)
    assert refused(tmp_path).startswith(f"{tmp_path / INDEX_NAME} ")


def test_one_file_a_bucket(tmp_path):
    strided = torch.arange(6.0).view(2, 3).T
    first, second = (f"model-rank0-0000{n}.safetensors" for n in (0, 1))
    weight_map = write_shards(iter([{"a": A, "s": strided}, {"b": B}]), tmp_path, "model-rank0")
    assert weight_map == {"a": first, "s": first, "b": second}
    assert_same(load_file(tmp_path / first), {"a": A, "s": strided})
    assert_same(load_file(tmp_path / second), {"b": B})


@pytest.fixture
def folders(tmp_path):
    """Source, staging and target, of which the first two are there."""
    source, staging, target = (tmp_path / name for name in ("source", "staging", "target"))
    source.mkdir()
    staging.mkdir()
    return source, staging, target


def test_finished_checkpoint_appears_by_rename_and_replaces_the_old_one(folders):
    source, staging, target = folders
    target.mkdir()
    taken = ("config.json", "tokenizer.json", "merges.txt", "chat_template.jinja", "LICENSE")
    for name in (*taken, INDEX_NAME, "model.safetensors"):
        (source / name).write_text(f"source {name}")
    (source / "config.json").write_text('{"hidden_size": 8}')
    (target / "stale.safetensors").write_bytes(b"")
    weight_map = write_shards(iter([{"b": B, "a": A}]), staging, "model")

    finish_checkpoint(source, staging, target, weight_map, total_size=A.nbytes + B.nbytes)

    assert not staging.exists()
    assert {path.name for path in target.iterdir()} == {*taken, INDEX_NAME, "model-00000.safetensors"}
    assert (target / "config.json").read_text() == '{"hidden_size": 8}'
    assert json.loads((target / INDEX_NAME).read_text()) == {
        "metadata": {"total_size": 20},
        "weight_map": {"a": "model-00000.safetensors", "b": "model-00000.safetensors"},
    }


def test_nothing_is_at_the_target_until_all_is_written(folders, monkeypatch):
    source, staging, target = folders
    weight_map = write_shards(iter([{"a": A}]), staging, "model")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    (source / "config.json").write_text("{}")
    monkeypatch.setattr("shutil.copyfile", full_disk)
    with pytest.raises(OSError, match="No space left"):
        finish_checkpoint(source, staging, target, weight_map, total_size=12)
    assert not target.exists()


def test_transformers_loads_what_was_written(folders):
    from tests.support.tiny_qwen3_moe import tiny_qwen3_moe

    source, staging, target = folders
    model = tiny_qwen3_moe()
    model.save_pretrained(source)
    with HFCheckpointReader(source) as reader:
        stream = [(name, reader.get(name)) for name in sorted(reader.tensors)]
        total_size = sum(tensor.nbytes for _, tensor in stream)
        weight_map = write_shards(buckets(stream, max_bytes=total_size // 3), staging, "model")
    finish_checkpoint(source, staging, target, weight_map, total_size)

    assert len(set(weight_map.values())) >= 3
    loaded, info = type(model).from_pretrained(target, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        expected, found = model(tokens).logits, loaded.eval()(tokens).logits
    assert expected.std() > 0.01
    assert found.equal(expected)
