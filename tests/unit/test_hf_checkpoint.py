"""HF checkpoint folders: reading, writing, and what transformers makes of the result."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vespo.conversion.buckets import buckets
from megatron_vespo.conversion.hf_checkpoint import (
    INDEX_NAME,
    HFCheckpointReader,
    finish_checkpoint,
    write_shards,
)

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


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_reads_both_layouts(layout, request):
    with HFCheckpointReader(request.getfixturevalue(layout)) as reader:
        assert reader.names() == {"a", "b"}
        assert reader.get("b").equal(B)
        assert reader.get("a").equal(A)
        assert reader.get("a").dtype == torch.bfloat16


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_missing_tensor_is_named(layout, request):
    folder = request.getfixturevalue(layout)
    with (
        HFCheckpointReader(folder) as reader,
        pytest.raises(ValueError, match=f"^--hf-checkpoint {folder}: tensor c is missing$"),
    ):
        reader.get("c")


def test_missing_file_is_named_before_anything_is_read(sharded):
    (sharded / "two.safetensors").unlink()
    with pytest.raises(ValueError) as error:
        HFCheckpointReader(sharded)
    missing = sharded / "two.safetensors"
    assert (
        str(error.value)
        == f"--hf-checkpoint: {sharded / INDEX_NAME} names files that do not exist: {missing}"
    )


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(ValueError) as error:
        HFCheckpointReader(tmp_path)
    assert str(error.value) == (
        f"--hf-checkpoint {tmp_path}: neither {INDEX_NAME} nor model.safetensors is there"
    )


def truncate(path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def test_truncated_single_file(single):
    truncate(single / "model.safetensors")
    with pytest.raises(ValueError, match=f"^--hf-checkpoint: cannot read {single}/model.safetensors: "):
        HFCheckpointReader(single)


def test_truncated_shard(sharded):
    truncate(sharded / "two.safetensors")
    with HFCheckpointReader(sharded) as reader:
        assert reader.get("a").equal(A)
        with pytest.raises(
            ValueError, match=f"^--hf-checkpoint: cannot read b from {sharded}/two.safetensors: "
        ):
            reader.get("b")


def test_an_index_that_is_wrong_about_a_file(sharded):
    write_index(sharded, {"a": "one.safetensors", "b": "one.safetensors"})
    with (
        HFCheckpointReader(sharded) as reader,
        pytest.raises(ValueError, match=f"^--hf-checkpoint: cannot read b from {sharded}/one.safetensors: "),
    ):
        reader.get("b")


@pytest.mark.parametrize("text", ["{", "{}"])
def test_broken_index(tmp_path, text):
    (tmp_path / INDEX_NAME).write_text(text)
    with pytest.raises(
        ValueError, match=f"^--hf-checkpoint: {tmp_path / INDEX_NAME} is no index of safetensors: "
    ):
        HFCheckpointReader(tmp_path)


def test_one_file_a_bucket(tmp_path):
    strided = torch.arange(6.0).view(2, 3).T
    weight_map = write_shards(iter([{"a": A, "s": strided}, {"b": B}]), tmp_path, "model-rank0")
    assert weight_map == {
        "a": "model-rank0-00000.safetensors",
        "s": "model-rank0-00000.safetensors",
        "b": "model-rank0-00001.safetensors",
    }
    first = load_file(tmp_path / "model-rank0-00000.safetensors")
    assert first["a"].equal(A) and first["s"].equal(strided)
    assert load_file(tmp_path / "model-rank0-00001.safetensors")["b"].equal(B)


def test_finished_checkpoint_appears_by_rename_and_replaces_the_old_one(tmp_path):
    source, staging, target = (tmp_path / name for name in ("source", "staging", "target"))
    for folder in (source, staging, target):
        folder.mkdir()
    for name in ("config.json", "tokenizer.json", "merges.txt", "chat_template.jinja", "LICENSE"):
        (source / name).write_text(f"source {name}")
    (source / INDEX_NAME).write_text("the source's own")
    (source / "model.safetensors").write_bytes(b"the source's weights")
    (target / "stale.safetensors").write_bytes(b"")
    weight_map = write_shards(iter([{"b": B, "a": A}]), staging, "model")

    finish_checkpoint(source, staging, target, weight_map, total_size=A.nbytes + B.nbytes)

    assert not staging.exists()
    assert {path.name for path in target.iterdir()} == {
        "config.json",
        "tokenizer.json",
        "merges.txt",
        "chat_template.jinja",
        "LICENSE",
        INDEX_NAME,
        "model-00000.safetensors",
    }
    assert (target / "config.json").read_text() == "source config.json"
    assert json.loads((target / INDEX_NAME).read_text()) == {
        "metadata": {"total_size": 20},
        "weight_map": {"a": "model-00000.safetensors", "b": "model-00000.safetensors"},
    }


def test_nothing_is_at_the_target_until_all_is_written(tmp_path, monkeypatch):
    source, staging, target = (tmp_path / name for name in ("source", "staging", "target"))
    source.mkdir()
    staging.mkdir()
    weight_map = write_shards(iter([{"a": A}]), staging, "model")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    (source / "config.json").write_text("{}")
    monkeypatch.setattr("shutil.copyfile", full_disk)
    with pytest.raises(OSError, match="No space left"):
        finish_checkpoint(source, staging, target, weight_map, total_size=12)
    assert not target.exists()


def test_transformers_loads_what_was_written(tmp_path):
    from tiny_qwen3_moe import tiny_qwen3_moe

    source, staging, target = (tmp_path / name for name in ("source", "staging", "target"))
    model = tiny_qwen3_moe()
    model.save_pretrained(source)
    staging.mkdir()
    with HFCheckpointReader(source) as reader:
        stream = [(name, reader.get(name)) for name in sorted(reader.names())]
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
