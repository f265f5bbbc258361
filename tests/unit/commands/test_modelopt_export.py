"""convert modelopt without ModelOpt: what it says when it cannot work, and what it lets through."""

from __future__ import annotations

import json
import re
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_vespo.checkpoints.ranks import Ranks
from megatron_vespo.commands import main as cli
from megatron_vespo.commands.convert import modelopt_export
from megatron_vespo.commands.convert.modelopt_export import (
    Calibration,
    ModelOpt,
    export_quantised,
    load_modelopt,
)

ONE_RANK = Ranks()
RANDOM = Calibration(None, num_samples=3, num_tokens=5)
SCALE = "model.layers.0.mlp.up_proj.input_scale"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("modelopt") / "hf"
    shape = {"vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    Qwen3ForCausalLM(Qwen3Config(**shape, **heads)).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("the tokenizer")
    return folder


@pytest.fixture
def export(source, tmp_path):
    """Into the folder `out`: the lines that are said of it."""

    def export(calibration=RANDOM, fmt="fp8", force=False, ranks=ONE_RANK) -> list[str]:
        return export_quantised(source, tmp_path / "out", fmt, calibration, force, ranks)

    return export


def pretend(monkeypatch, version: str | Exception, quantization=None, export=None) -> None:
    """An installed nvidia-modelopt of that version, or what is raised in its place."""

    def found(package: str) -> str:
        assert package == "nvidia-modelopt"
        if isinstance(version, Exception):
            raise version
        return version

    def import_module(name: str):
        module = {"modelopt.torch.quantization": quantization, "modelopt.torch.export": export}[name]
        if module is None:
            raise ImportError(f"No module named '{name}'")
        return module

    monkeypatch.setattr(modelopt_export, "version", found)
    monkeypatch.setattr(modelopt_export.importlib, "import_module", import_module)


def test_without_the_package_there_is_one_line_and_nothing_is_written(monkeypatch, source, capsys):
    pretend(monkeypatch, PackageNotFoundError())
    target = source.parent / "nothing"
    assert (
        cli.run(["convert", "modelopt", str(source), str(target), "--format", "fp8"]) == cli.EXIT_USER_ERROR
    )
    assert capsys.readouterr().err == (
        "megatron-vespo: convert modelopt needs nvidia-modelopt, which is not installed: pip install "
        "nvidia-modelopt==0.47.0, or megatron-to-hf --dtype fp8, which needs nothing\n"
    )
    assert not target.exists()


@pytest.mark.parametrize(
    "version, quantization, line",
    [
        ("0.46.0", None, "nvidia-modelopt is 0.46.0, convert modelopt is made for 0.47.0"),
        ("0.47.0", None, "nvidia-modelopt 0.47.0 cannot be imported: No module named 'modelopt.torch."),
        (
            "0.47.0",
            SimpleNamespace(FP8_DEFAULT_CFG={}),
            "nvidia-modelopt 0.47.0 has no NVFP4_DEFAULT_CFG, which --format nvfp4 needs",
        ),
    ],
)
def test_what_the_package_lacks(monkeypatch, version, quantization, line):
    pretend(monkeypatch, version, quantization, SimpleNamespace())
    with pytest.raises(ValueError, match="^" + re.escape(line)):
        load_modelopt("nvfp4")


def test_the_version_is_the_one_that_setup_installs():
    setup = Path(__file__).parents[3] / "setup.py"
    assert f'"nvidia-modelopt=={modelopt_export.VERSION}"' in setup.read_text()


def test_several_processes_are_refused(export):
    with pytest.raises(ValueError, match="^convert modelopt is for one process, not 2$"):
        export(ranks=Ranks(0, 2))


@pytest.mark.parametrize("flag", ["--samples", "--max-tokens"])
def test_a_number_that_is_none(flag, capsys):
    with pytest.raises(SystemExit):
        cli.run(["convert", "modelopt", "a", "b", "--format", "fp8", flag, "0"])
    assert f"argument {flag}: '0' is no positive number" in capsys.readouterr().err


def fake(monkeypatch, change=lambda tensors: None) -> list[Tensor]:
    """A ModelOpt that runs the model and writes its weights after `change`; returns what the model saw."""
    seen: list[Tensor] = []

    def quantize(model, config, forward_loop):
        assert config == "the format's"
        model.register_forward_pre_hook(lambda module, inputs, more: seen.append(inputs[0]), with_kwargs=True)
        forward_loop(model)

    def export(model, export_dir):
        tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
        tensors[SCALE] = torch.tensor(0.5)
        change(tensors)
        save_file(tensors, export_dir / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(
        modelopt_export, "load_modelopt", lambda fmt: ModelOpt(quantize, "the format's", export)
    )
    return seen


def test_it_runs_on_the_samples_and_leaves_a_folder_with_a_manifest(monkeypatch, export, tmp_path):
    seen = fake(monkeypatch)
    target = tmp_path / "out"
    lines = export()
    assert [tuple(tokens.shape) for tokens in seen] == [(1, 5)] * 3
    assert not seen[0].equal(seen[1])
    assert f"{target}: 15 tensors" in lines[0]
    assert "3 samples, 15 tokens, random tokens, which are not what the model will see" in lines[1]
    assert (target / "tokenizer.json").read_text() == "the tokenizer"
    manifest = json.loads((target / "manifest.json").read_text())
    found = load_file(target / "model.safetensors")
    assert manifest["tensors"].keys() == found.keys()
    assert manifest["tensors"][SCALE]["shape"] == []
    with pytest.raises(ValueError, match="is already there; --force replaces it"):
        export()
    export(force=True)


def renamed(tensors):
    tensors["odd"] = tensors.pop("model.layers.0.mlp.up_proj.weight")


def cut(tensors):
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(24, 8)


def unmeasured(tensors):
    tensors[SCALE] = torch.tensor(0.0)


@pytest.mark.parametrize(
    "change, line",
    [
        (renamed, "ModelOpt's export lacks model.layers.0.mlp.up_proj.weight"),
        (cut, "ModelOpt's export has model.layers.0.mlp.up_proj.weight as (24, 8), the source (24, 16)"),
        (unmeasured, f"ModelOpt's export has {SCALE} = 0.0; it must be positive"),
    ],
)
def test_a_wrong_export_gets_no_name(monkeypatch, export, tmp_path, change, line):
    fake(monkeypatch, change)
    with pytest.raises(RuntimeError, match="^" + re.escape(line) + "$"):
        export()
    assert not list(tmp_path.iterdir())


def test_packed_values_are_two_a_byte(monkeypatch, export):
    def pack(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(24, 8, dtype=torch.uint8)

    fake(monkeypatch, pack)
    export(fmt="nvfp4")


class Letters:
    """A tokenizer: one token a letter."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 37 for letter in text]}


@pytest.fixture
def letters(monkeypatch):
    import transformers

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda folder: Letters())


def calibration(tmp_path: Path, *rows: object) -> Calibration:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Calibration(path, num_samples=2, num_tokens=4)


def test_prompts_of_a_file(monkeypatch, export, tmp_path, letters):
    seen = fake(monkeypatch)
    given = calibration(tmp_path, {"text": "abcdefgh", "question": "x"}, {"question": "ab"}, {"text": "c"})
    lines = export(given)
    assert [tokens.tolist() for tokens in seen] == [
        [[ord(x) % 37 for x in "abcd"]],
        [[ord("a") % 37, ord("b") % 37]],
    ]
    assert lines[1].endswith(f"2 samples, 6 tokens, {given.path}")


@pytest.mark.parametrize(
    "rows, line",
    [
        ([], "--calibration {path}: the file is empty"),
        ([{"prompt": "a"}], "{path} line 1: neither text nor question is there as a string"),
        ([{"text": "a"}, {"text": ""}], "{path} line 2: the prompt has no tokens"),
        (None, "--calibration {path}: no such file"),
    ],
)
def test_a_file_that_is_no_use(monkeypatch, export, tmp_path, letters, rows, line):
    fake(monkeypatch)
    given = calibration(tmp_path, *rows or ())
    if rows is None:
        given.path.unlink()
    with pytest.raises(ValueError, match="^" + re.escape(line.format(path=given.path)) + "$"):
        export(given)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_tokenizer(monkeypatch, export, tmp_path):
    fake(monkeypatch)
    with pytest.raises(ValueError, match="has no tokenizer that loads, which --calibration needs$"):
        export(calibration(tmp_path, {"text": "a"}))
