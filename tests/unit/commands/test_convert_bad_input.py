"""Mistakes and damage, each answered by one clear line, exit code 2 and an untouched disk."""

import json
import os
import pickle
import shutil
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import Metadata

from tests.support.tiny_checkpoints import LLAMA, MOE, convert, random_tensors, tiny_config, write_hf

INDEX, CONFIG = "model.safetensors.index.json", "config.json"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def hf(tmp_path):
    config = tiny_config(MOE)
    return write_hf(tmp_path / "hf", config, random_tensors(config, torch.bfloat16), num_files=3)


@pytest.fixture
def single(tmp_path):
    config = tiny_config(MOE)
    return write_hf(tmp_path / "single", config, random_tensors(config, torch.bfloat16))


@pytest.fixture
def megatron(tmp_path, hf, capsys):
    assert convert("hf-to-megatron", hf, tmp_path / "megatron") == 0
    capsys.readouterr()
    return tmp_path / "megatron"


@pytest.fixture
def refused(tmp_path, capsys):
    """Runs the command, which must leave nothing behind; returns its one line without the program's name."""

    def run(*words) -> str:
        before = sorted(tmp_path.rglob("*"))
        assert convert(*words) == 2
        out = capsys.readouterr()
        assert sorted(tmp_path.rglob("*")) == before and not out.out
        assert out.err.startswith("megatron-vespo: ") and out.err.count("\n") == 1
        return out.err.removeprefix("megatron-vespo: ").rstrip("\n")

    return run


def edit(path, **changes) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | changes))


def resave(folder, **changes) -> None:
    """Tensors by name with dots for double underscores; None removes one."""
    path = folder / "model.safetensors"
    tensors = load_file(path) | {name.replace("__", "."): value for name, value in changes.items()}
    save_file({name: value for name, value in tensors.items() if value is not None}, path)


def first_file(folder):
    return sorted(folder.glob("*.safetensors"))[0]


def test_missing_shard(hf, tmp_path, refused):
    path = first_file(hf)
    path.unlink()
    expected = f"{hf / INDEX} names files that do not exist: {path.name}"
    assert refused("hf-to-megatron", hf, tmp_path / "out") == expected
    assert refused("verify", hf, hf) == expected
    assert refused("inspect", hf) == expected


def test_truncated_shard(hf, tmp_path, refused):
    path = first_file(hf)
    os.truncate(path, path.stat().st_size - 1)
    assert "is cut short" in refused("hf-to-megatron", hf, tmp_path / "out")


@pytest.mark.parametrize("file", ["none.safetensors", "../x", "/etc/passwd", "a" * 300, "a\0b"])
def test_index_names_other_files(hf, file, tmp_path, refused):
    index = json.loads((hf / INDEX).read_text())
    edit(hf / INDEX, weight_map=index["weight_map"] | {"model.norm.weight": file})
    text = refused("hf-to-megatron", hf, tmp_path / "out")
    assert str(hf) in text and not any(ord(letter) < 32 for letter in text)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.ones(4, 4), "tensor {} is (4, 4), by config.json it should be (16, 8)"),
        (torch.ones(8, 16), "tensor {} is (8, 16), by config.json it should be (16, 8)"),
        (torch.ones(16, 8, dtype=torch.int16), "tensor {} is torch.int16, no float32, float16 or bfloat16"),
        (
            torch.ones(16, 8, dtype=torch.float64),
            "tensor {} is torch.float64, no float32, float16 or bfloat16",
        ),
        (
            torch.ones(16, 8, dtype=torch.float8_e4m3fn),
            "tensor {} is torch.float8_e4m3fn, no float32, float16",
        ),
        (torch.ones(16, 8), "mixes torch.bfloat16, torch.float32; --dtype makes them one"),
        (None, "tensor {} is missing"),
        (torch.full((16, 8), torch.nan, dtype=torch.bfloat16), "{}[0:8] holds NaN or infinity"),
        (torch.full((16, 8), torch.inf, dtype=torch.bfloat16), "{}[0:8] holds NaN or infinity"),
    ],
)
def test_wrong_tensor(single, value, expected, tmp_path, refused):
    resave(single, **{Q_PROJ: value})
    text = refused("hf-to-megatron", single, tmp_path / "out")
    assert text.startswith(str(single)) and expected.format(Q_PROJ) in text


def test_extra_and_missing_tensors(single, tmp_path, refused):
    resave(single, model__extra=torch.ones(2))
    assert refused("hf-to-megatron", single, tmp_path / "out") == (
        f"{single}: tensor model.extra is not in the model that config.json describes"
    )
    resave(single, model__extra=None, model__norm__weight=None, lm_head__weight=None)
    assert refused("hf-to-megatron", single, tmp_path / "out") == (
        f"{single}: tensor model.norm.weight, lm_head.weight, ... (2 tensors) are missing"
    )


def test_a_value_too_large_for_the_dtype(tmp_path, refused):
    config = tiny_config(LLAMA)
    tensors = random_tensors(config, torch.float32)
    tensors["model.norm.weight"][2] = 1e6
    source = write_hf(tmp_path / "hf", config, tensors)
    assert refused("hf-to-megatron", source, tmp_path / "out", "--dtype", "fp16") == (
        f"{source}: model.norm.weight[0:8] holds NaN or infinity as torch.float16"
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "its architecture is GPT2LMHeadModel; supported: "),
        ({"architectures": None}, "its architecture is none; supported: "),
        ({"hidden_size": 0}, "hidden_size is 0, must be a positive integer"),
        (
            {"num_hidden_layers": 10**9},
            "num_hidden_layers x experts is 1000000000 x 2, more than any model has",
        ),
        ({"num_experts": 10**12}, "num_hidden_layers x experts is 2 x 1000000000000, more than "),
        ({"rope_theta": 10**400}, "must be a positive whole number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, must be a number between 0 and 1"),
    ],
)
def test_config(hf, changes, expected, tmp_path, refused):
    edit(hf / CONFIG, **changes)
    text = refused("hf-to-megatron", hf, tmp_path / "out")
    assert text.startswith(f"{hf / CONFIG}: ") and expected in text


@pytest.mark.parametrize("content", ["{", "", "[]", "\x00", "[" * 99_999, '{"a": ' + "9" * 5000 + "}"])
def test_unreadable_config(hf, content, tmp_path, refused):
    (hf / CONFIG).write_text(content)
    assert refused("hf-to-megatron", hf, tmp_path / "out").startswith(f"{hf / CONFIG}")
    (hf / CONFIG).write_bytes(b"\xff\xfe\x00")
    assert refused("hf-to-megatron", hf, tmp_path / "out").startswith(f"{hf / CONFIG} is not JSON: ")


def test_no_config(hf, tmp_path, refused):
    (hf / CONFIG).unlink()
    expected = f"{hf}: no config.json there; it must be an HF checkpoint folder"
    assert refused("hf-to-megatron", hf, tmp_path / "out") == expected
    assert "no config.json there" in refused("hf-to-megatron", tmp_path / "none", tmp_path / "out")


def test_pickles_only(tmp_path, refused):
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(tiny_config(MOE)))
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    assert refused("hf-to-megatron", folder, tmp_path / "out").endswith(
        "pytorch_model.bin is a pickle, which is not read: save it as safetensors first"
    )


def test_a_folder_in_a_files_place(hf, tmp_path, refused):
    (hf / "tokenizer.json").unlink()
    (hf / "tokenizer.json").mkdir()
    assert refused("hf-to-megatron", hf, tmp_path / "out") == f"{hf / 'tokenizer.json'}: Is a directory"


def test_not_enough_disk(hf, tmp_path, refused, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40, 0))
    text = refused("hf-to-megatron", hf, tmp_path / "out")
    assert text.startswith(f"{tmp_path} has 0.00 GiB free, out needs ")


def test_the_disk_fills_up(megatron, tmp_path, refused, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert (
        refused("megatron-to-hf", megatron, tmp_path / "out")
        == f"{tmp_path / 'out'}: No space left on device"
    )


def test_a_target_that_cannot_be_written(hf, tmp_path, refused):
    (tmp_path / "file").write_text("")
    (tmp_path / ".out.incomplete").write_text("")
    for target, expected in [
        (tmp_path / "file" / "out", f"{tmp_path / 'file'} is no folder"),
        (tmp_path / "none" / "out", f"{tmp_path / 'none'} is no folder"),
        (tmp_path / "out", f"{tmp_path} cannot be written: File exists"),
        (tmp_path / "file", f"{tmp_path / 'file'} is already there; --force replaces it"),
    ]:
        assert refused("hf-to-megatron", hf, target) == expected


def test_the_target_is_what_is_read(hf, megatron, tmp_path, refused):
    reads = "which is read: the result needs another place"
    (tmp_path / "link").symlink_to(hf)
    (hf.parent / ".metadata").write_text("")  # so that --force would replace it
    for target in (hf, tmp_path / "link", hf.parent):
        assert refused("hf-to-megatron", hf, target, "--force") == f"{target} is or holds {hf}, {reads}"
    release = megatron / "release"
    assert (
        refused("megatron-to-hf", release, megatron, "--force")
        == f"{megatron} is or holds {release}, {reads}"
    )
    assert refused("megatron-to-hf", megatron, hf, "--hf-config", hf, "--force").endswith(reads)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--memory-budget", "inf"], "--memory-budget inf: a number of GiB"),
        (["--memory-budget", "-1"], "--memory-budget -1.0: a number of GiB"),
        (["--memory-budget", "0.5"], "0.50 GiB of memory are too few: at least "),
        (["--workers", "0"], "--workers 0: at least 1"),
        (["--workers", "1000000"], "2.00 GiB of memory are too few: at least "),
        (["--max-shard-size", "0"], "--max-shard-size 0.0: a positive number of GB"),
        (["--max-shard-size", "inf"], "--max-shard-size inf: a positive number of GB"),
    ],
)
def test_flags(megatron, flags, expected, tmp_path, refused):
    assert refused("megatron-to-hf", megatron, tmp_path / "out", *flags).startswith(expected)


def chunk_file(megatron):
    return max((megatron / "release").glob("__0_*.distcp"), key=lambda path: path.stat().st_size)


def test_missing_chunks(megatron, tmp_path, refused):
    path = chunk_file(megatron)
    path.unlink()
    text = refused("megatron-to-hf", megatron, tmp_path / "out")
    assert text.startswith(f"{path}: ") and "No such file or directory" in text


def test_truncated_chunks(megatron, tmp_path, refused):
    path = chunk_file(megatron)
    os.truncate(path, path.stat().st_size // 2)
    assert refused("megatron-to-hf", megatron, tmp_path / "out").startswith(f"{path}")


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_a_malicious_pickle(megatron, tmp_path, refused):
    mark = tmp_path / "mark"
    path = megatron / "release" / ".metadata"
    path.write_bytes(pickle.dumps(Metadata({}, planner_data=Evil(mark), storage_data={})))
    expected = f"{path} is no metadata of a torch_dist checkpoint: it asks for posix.system"
    for command in (
        ("megatron-to-hf", megatron, tmp_path / "out"),
        ("inspect", megatron),
        ("verify", megatron),
    ):
        assert refused(*command) == expected
    assert not mark.exists()


@pytest.mark.parametrize("named", ["7", "release", "", "relaese", "9" * 5000, "../x", "-1", "\x1b[31m"])
def test_tracker(megatron, named, tmp_path, refused):
    tracker = megatron / "latest_checkpointed_iteration.txt"
    tracker.write_text(named)
    (megatron / "release").rename(megatron / "elsewhere")
    assert refused("megatron-to-hf", megatron, tmp_path / "out").startswith(
        f"{tracker} says {named[:40]!r}, "
    )


def test_no_megatron_checkpoint(tmp_path, hf, refused):
    expected = (
        f"{hf} is no Megatron checkpoint: neither .metadata nor latest_checkpointed_iteration.txt there"
    )
    assert refused("megatron-to-hf", hf, tmp_path / "out") == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 1}, {"num_hidden_layers": 3}, {"num_experts": 4}, {"vocab_size": 12},
        {"hidden_size": 16}, {"num_key_value_heads": 4}, {"tie_word_embeddings": True}, {"head_dim": 8},
        {"moe_intermediate_size": 8},
        {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    ],
)  # fmt: skip
def test_wrong_hf_config(megatron, hf, changes, tmp_path, refused):
    edit(hf / CONFIG, **changes)
    if changes.get("model_type"):
        config = json.loads((hf / CONFIG).read_text())
        (hf / CONFIG).write_text(
            json.dumps({k: v for k, v in config.items() if "exp" not in k and "moe" not in k})
        )
    refused("megatron-to-hf", megatron, tmp_path / "out", "--hf-config", hf)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 2},
            "num_attention_heads is 8, {} was saved with 4",
        ),
        ({"rope_theta": 20000.0}, "rotary_base is 20000, {} was saved with 10000"),
        ({"rms_norm_eps": 1e-5}, "layernorm_epsilon is 1e-05, {} was saved with 1e-06"),
    ],
)
@pytest.mark.parametrize("manifest", [True, False])
def test_an_hf_config_that_fits_every_shape(changes, expected, manifest, tmp_path, refused, capsys):
    config = tiny_config(LLAMA)
    hf = write_hf(tmp_path / "hf", config, random_tensors(config, torch.bfloat16))
    assert convert("hf-to-megatron", hf, tmp_path / "megatron") == 0
    if not manifest:
        (tmp_path / "megatron" / "manifest.json").unlink()
    capsys.readouterr()
    edit(hf / CONFIG, **changes)
    text = refused("megatron-to-hf", tmp_path / "megatron", tmp_path / "out", "--hf-config", hf)
    assert text == f"{hf / CONFIG}: {expected.format(tmp_path / 'megatron' / 'release')}"


def test_no_hf_config(megatron, tmp_path, refused):
    shutil.rmtree(megatron / "release" / "hf")
    assert refused("megatron-to-hf", megatron, tmp_path / "out") == (
        f"{megatron / 'release'} holds no HF config: --hf-config DIR names the HF folder of its model"
    )


def test_changed_since_its_manifest(megatron, tmp_path, refused, capsys):
    path = chunk_file(megatron)
    content = bytearray(path.read_bytes())
    place = content.index(b"archive/data/0") + 100
    content[place] ^= 1
    path.write_bytes(content)
    assert refused("megatron-to-hf", megatron, tmp_path / "out").endswith(": it has changed since then")
    assert convert("verify", megatron) == 1
    assert "its xxh3_128 is not the manifest's\nDIFFERENT: " in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "[" * 99_999, '{"tensors": 3, "hash": "xxh3_128"}'])
def test_broken_manifest(megatron, content, tmp_path, refused):
    (megatron / "manifest.json").write_text(content)
    for command in (("verify", megatron), ("megatron-to-hf", megatron, tmp_path / "out")):
        assert refused(*command).startswith(f"{megatron / 'manifest.json'} is no manifest: ")


def test_no_manifest(hf, refused):
    assert refused("verify", hf) == f"{hf} has no manifest.json; name a second checkpoint to compare with"
