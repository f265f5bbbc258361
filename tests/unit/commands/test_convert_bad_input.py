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

INDEX, CONFIG, TRACKER = "model.safetensors.index.json", "config.json", "latest_checkpointed_iteration.txt"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def write_moe(folder, num_files=1):
    config = tiny_config(MOE)
    return write_hf(folder, config, random_tensors(config, torch.bfloat16), num_files)


@pytest.fixture
def hf(tmp_path):
    return write_moe(tmp_path / "hf", num_files=3)


@pytest.fixture
def megatron(tmp_path, hf, capsys):
    assert convert("hf-to-megatron", hf, tmp_path / "megatron") == 0
    capsys.readouterr()
    return tmp_path / "megatron"


@pytest.fixture
def refused(tmp_path, capsys):
    """Runs the command, which must leave nothing behind; returns its one line without the program's name."""

    def run(command, path, *words, target=tmp_path / "out") -> str:
        targets = [target] if command in ("hf-to-megatron", "megatron-to-hf") else []
        before = sorted(tmp_path.rglob("*"))
        assert convert(command, path, *targets, *words) == 2
        out = capsys.readouterr()
        assert sorted(tmp_path.rglob("*")) == before and not out.out
        assert out.err.startswith("megatron-vespo: ") and out.err.count("\n") == 1
        line = out.err.removeprefix("megatron-vespo: ").rstrip("\n")
        assert all(ord(letter) >= 32 for letter in line)
        return line

    return run


# what a function does to an HF folder
def edit(name, **changes):
    def damage(folder):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))

    return damage


def norm_in_file(name):
    return lambda folder: edit(INDEX, weight_map=weight_map(folder) | {"model.norm.weight": name})(folder)


def weight_map(folder):
    return json.loads((folder / INDEX).read_text())["weight_map"]


def first_file(folder):
    return sorted(folder.glob("*.safetensors"))[0]


def config_is(content: bytes):
    return lambda folder: (folder / CONFIG).write_bytes(content)


def no_tokenizer_but_a_folder(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").mkdir()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda hf: os.truncate(first_file(hf), first_file(hf).stat().st_size - 1), "is cut short"),
        (lambda hf: first_file(hf).unlink(), f"/{INDEX} names files that do not exist: model-00001-of-"),
        *(
            (norm_in_file(name), "")
            for name in ("none.safetensors", "../x", "/etc/passwd", "a" * 300, "a\0b")
        ),
        (no_tokenizer_but_a_folder, "/tokenizer.json: Is a directory"),
        (lambda hf: (hf / CONFIG).unlink(), ": no config.json there; it must be an HF checkpoint folder"),
        *((config_is(content), "/config.json") for content in (b"{", b"", b"[]", b"\x00", b"[" * 99_999)),
        (config_is(b'{"a": ' + b"9" * 5000 + b"}"), "/config.json"),
        (config_is(b"\xff\xfe\x00"), "/config.json is not JSON: "),
        (edit(CONFIG, architectures=["GPT2LMHeadModel"]), ": its architecture is GPT2LMHeadModel; supported"),
        (edit(CONFIG, architectures=None), "/config.json: its architecture is none; supported: "),
        (edit(CONFIG, hidden_size=0), "/config.json: hidden_size is 0, must be a positive integer"),
        (edit(CONFIG, num_hidden_layers=10**9), ": num_hidden_layers x experts is 1000000000 x 2, more"),
        (edit(CONFIG, num_experts=10**12), ": num_hidden_layers x experts is 2 x 1000000000000, more"),
        (edit(CONFIG, rope_theta=10**400), "must be a positive whole number"),
        (edit(CONFIG, rms_norm_eps=float("nan")), ": rms_norm_eps is nan, must be a number between 0 and 1"),
    ],
)
def test_a_damaged_hf_folder(hf, damage, said, refused):
    damage(hf)
    line = refused("hf-to-megatron", hf)
    assert line.startswith(str(hf)) and said in line


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_other_commands_find_damage_too(hf, command, refused):
    first_file(hf).unlink()
    assert refused(command, hf, *([hf] if command == "verify" else [])).startswith(
        f"{hf / INDEX} names files"
    )


def other(*size, value=1.0, dtype=torch.bfloat16) -> dict:
    return {Q_PROJ: torch.full(size, value).to(dtype)}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (other(4, 4), f"tensor {Q_PROJ} is (4, 4), by config.json it should be (16, 8)"),
        (other(8, 16), f"tensor {Q_PROJ} is (8, 16), by config.json it should be (16, 8)"),
        (other(16, 8, dtype=torch.int16), f"{Q_PROJ} is torch.int16, no float32, float16 or bfloat16"),
        (other(16, 8, dtype=torch.float64), f"{Q_PROJ} is torch.float64, no float32, float16 or bfloat16"),
        (other(16, 8, dtype=torch.float8_e4m3fn), f"{Q_PROJ} is torch.float8_e4m3fn, no float32, float16"),
        (other(16, 8, dtype=torch.float32), "mixes torch.bfloat16, torch.float32; --dtype makes them one"),
        (other(16, 8, value=torch.nan), f"{Q_PROJ}[0:8] holds NaN or infinity"),
        (other(16, 8, value=torch.inf), f"{Q_PROJ}[0:8] holds NaN or infinity"),
        ({Q_PROJ: None}, f"tensor {Q_PROJ} is missing"),
        (
            {"model.norm.weight": None, "lm_head.weight": None},
            "model.norm.weight, lm_head.weight, ... (2 ten",
        ),
        ({"model.extra": torch.ones(2)}, "tensor model.extra is not in the model that config.json describes"),
    ],
)
def test_wrong_tensors(changes, said, tmp_path, refused):
    folder = write_moe(tmp_path / "single")
    path = folder / "model.safetensors"
    tensors = load_file(path) | changes
    save_file({name: value for name, value in tensors.items() if value is not None}, path)
    line = refused("hf-to-megatron", folder)
    assert line.startswith(str(folder)) and said in line


def test_a_value_too_large_for_the_dtype(tmp_path, refused):
    config = tiny_config(LLAMA)
    tensors = random_tensors(config, torch.float32)
    tensors["model.norm.weight"][2] = 1e6
    source = write_hf(tmp_path / "hf", config, tensors)
    expected = f"{source}: model.norm.weight[0:8] holds NaN or infinity as torch.float16"
    assert refused("hf-to-megatron", source, "--dtype", "fp16") == expected


def test_what_is_no_checkpoint(hf, tmp_path, refused):
    assert "no config.json there" in refused("hf-to-megatron", tmp_path / "none")
    expected = f"{hf} is no Megatron checkpoint: neither .metadata nor {TRACKER} there"
    assert refused("megatron-to-hf", hf) == expected
    assert refused("verify", hf) == f"{hf} has no manifest.json; name a second checkpoint to compare with"
    for path in hf.glob("model*"):
        path.unlink()
    (hf / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    expected = "pytorch_model.bin is a pickle, which is not read: save it as safetensors first"
    assert refused("hf-to-megatron", hf).endswith(expected)


def test_not_enough_disk(hf, tmp_path, refused, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40, 0))
    assert refused("hf-to-megatron", hf).startswith(f"{tmp_path} has 0.00 GiB free, out needs ")


def test_the_disk_fills_up(megatron, tmp_path, refused, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert refused("megatron-to-hf", megatron) == f"{tmp_path / 'out'}: No space left on device"


def test_a_target_that_cannot_be_written(hf, tmp_path, refused):
    (tmp_path / "file").write_text("")
    (tmp_path / ".out.incomplete").write_text("")
    for target, expected in [
        (tmp_path / "file" / "out", f"{tmp_path / 'file'} is no folder"),
        (tmp_path / "none" / "out", f"{tmp_path / 'none'} is no folder"),
        (tmp_path / "out", f"{tmp_path} cannot be written: File exists"),
        (tmp_path / "file", f"{tmp_path / 'file'} is already there; --force replaces it"),
    ]:
        assert refused("hf-to-megatron", hf, target=target) == expected


def test_the_target_is_what_is_read(hf, megatron, tmp_path, refused):
    reads = "which is read: the result needs another place"
    (tmp_path / "link").symlink_to(hf)
    (hf.parent / ".metadata").write_text("")  # so that --force would replace it
    for target in (hf, tmp_path / "link", hf.parent):
        assert (
            refused("hf-to-megatron", hf, "--force", target=target) == f"{target} is or holds {hf}, {reads}"
        )
    release = megatron / "release"
    words = ("--hf-config", hf, "--force")
    expected = f"{megatron} is or holds {release}, {reads}"
    assert refused("megatron-to-hf", release, "--force", target=megatron) == expected
    assert refused("megatron-to-hf", megatron, *words, target=hf).endswith(reads)


def chunk_file(megatron):
    return max((megatron / "release").glob("__0_*.distcp"), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--memory-budget inf", "--memory-budget inf: a number of GiB"),
        ("--memory-budget -1", "--memory-budget -1.0: a number of GiB"),
        ("--memory-budget 0.5", "0.50 GiB of memory are too few: at least "),
        ("--workers 0", "--workers 0: at least 1"),
        ("--workers 1000000", "2.00 GiB of memory are too few: at least "),
        ("--max-shard-size 0", "--max-shard-size 0.0: a positive number of GB"),
        ("--max-shard-size inf", "--max-shard-size inf: a positive number of GB"),
    ],
)
def test_flags(megatron, flags, said, refused):
    assert refused("megatron-to-hf", megatron, *flags.split()).startswith(said)


def test_missing_and_truncated_chunks(megatron, refused):
    path = chunk_file(megatron)
    os.truncate(path, path.stat().st_size // 2)
    assert refused("megatron-to-hf", megatron).startswith(f"{path}")
    path.unlink()
    line = refused("megatron-to-hf", megatron)
    assert line.startswith(f"{path}: ") and "No such file or directory" in line


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_a_malicious_pickle(megatron, tmp_path, refused):
    mark = tmp_path / "mark"
    path = megatron / "release" / ".metadata"
    path.write_bytes(pickle.dumps(Metadata({}, planner_data=Evil(mark), storage_data={})))
    lines = {refused(command, megatron) for command in ("megatron-to-hf", "inspect", "verify")}
    assert lines == {f"{path} is no metadata of a torch_dist checkpoint: it asks for posix.system"}
    assert not mark.exists()


@pytest.mark.parametrize("named", ["7", "release", "", "relaese", "9" * 5000, "../x", "-1", "\x1b[31m"])
def test_tracker(megatron, named, refused):
    (megatron / TRACKER).write_text(named)
    (megatron / "release").rename(megatron / "elsewhere")
    expected = f"{megatron / TRACKER} says {named[:40]!r}, "
    assert refused("megatron-to-hf", megatron).startswith(expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 1}, {"num_hidden_layers": 3}, {"num_experts": 4}, {"vocab_size": 12},
        {"hidden_size": 16}, {"num_key_value_heads": 4}, {"tie_word_embeddings": True}, {"head_dim": 8},
        {"moe_intermediate_size": 8},
        {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    ],
)  # fmt: skip
def test_wrong_hf_config(megatron, hf, changes, refused):
    config = json.loads((hf / CONFIG).read_text()) | changes
    if "model_type" in changes:
        config = {k: v for k, v in config.items() if "exp" not in k and "moe" not in k}
    (hf / CONFIG).write_text(json.dumps(config))
    refused("megatron-to-hf", megatron, "--hf-config", hf)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 2}, ("num_attention_heads", 8, 4)),
        ({"rope_theta": 20000.0}, ("rotary_base", 20000, 10000)),
        ({"rms_norm_eps": 1e-5}, ("layernorm_epsilon", 1e-05, 1e-06)),
    ],
)
@pytest.mark.parametrize("manifest", [True, False])
def test_an_hf_config_that_fits_every_shape(changes, said, manifest, tmp_path, refused, capsys):
    config = tiny_config(LLAMA)
    hf = write_hf(tmp_path / "hf", config, random_tensors(config, torch.bfloat16))
    megatron = tmp_path / "megatron"
    assert convert("hf-to-megatron", hf, megatron) == 0
    if not manifest:
        (megatron / "manifest.json").unlink()
    capsys.readouterr()
    edit(CONFIG, **changes)(hf)
    name, given, saved = said
    expected = f"{hf / CONFIG}: {name} is {given}, {megatron / 'release'} was saved with {saved}"
    assert refused("megatron-to-hf", megatron, "--hf-config", hf) == expected


def test_no_hf_config(megatron, refused):
    shutil.rmtree(megatron / "release" / "hf")
    expected = f"{megatron / 'release'} holds no HF config: --hf-config DIR names the HF folder of its model"
    assert refused("megatron-to-hf", megatron) == expected


def test_changed_since_its_manifest(megatron, refused, capsys):
    path = chunk_file(megatron)
    data = bytearray(path.read_bytes())
    data[data.index(b"archive/data/0") + 100] ^= 1
    path.write_bytes(data)
    assert refused("megatron-to-hf", megatron).endswith(": it has changed since then")
    assert convert("verify", megatron) == 1
    assert "its xxh3_128 is not the manifest's\nDIFFERENT: " in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "[" * 99_999, '{"tensors": 3, "hash": "xxh3_128"}'])
def test_broken_manifest(megatron, text, refused):
    (megatron / "manifest.json").write_text(text)
    for command in ("verify", "megatron-to-hf"):
        assert refused(command, megatron).startswith(f"{megatron / 'manifest.json'} is no manifest: ")
