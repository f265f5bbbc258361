"""What a run leaves about itself."""

import argparse
import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from megatron_vespo.driver import run_record
from megatron_vespo.driver.run_record import (
    LEFT_OUT,
    RunRecord,
    describe_run,
    source_commit,
    without_secrets,
)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    for flag, default in {
        "--lr": None,
        "--seed": 1,
        "--output-dir": None,
        "--engine-api-key": "auto",
    }.items():
        parser.add_argument(flag, default=default)
    parser.add_argument("--wandb-api-key")
    return parser


@pytest.fixture()
def args() -> Namespace:
    return Namespace(
        lr=1e-6, seed=1, output_dir=Path("out"), engine_api_key="never", wandb_api_key="hush", hidden_size=64,
        sglang_flags=["--api-key", "hush", "--tp-size", "2"], bounds=(0.5, float("inf")), loss=print,
    )  # fmt: skip


def described(args: Namespace, monkeypatch, *argv: str) -> dict:
    monkeypatch.setattr(sys, "argv", ["megatron-vespo", "train", *argv])
    return json.loads(json.dumps(describe_run(vars(args), parser())))


def test_keys_of_trackers_are_not_recorded(args, monkeypatch):
    for name in ("WANDB_API_KEY", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD", "SWANLAB_API_KEY"):
        monkeypatch.setenv(name, "do not tell")
    assert "do not tell" not in json.dumps(described(args, monkeypatch, "--lr", "1e-6"))


def test_what_is_told(args, tmp_path, monkeypatch):
    recipe = tmp_path / "r.flags"
    recipe.write_text("--lr 1e-6 # the paper's\n--wandb-api-key=hush")
    monkeypatch.setenv("NCCL_CUMEM_ENABLE", "1")
    told = described(args, monkeypatch, "--recipe", str(recipe), "--sglang-api-key", "hush")
    assert told["command"] == f"megatron-vespo train --recipe {recipe} --sglang-api-key '{LEFT_OUT}'"
    assert told["recipes"] == {str(recipe): f"--lr 1e-6 '--wandb-api-key={LEFT_OUT}'"}
    assert told["changed"] == {
        "engine_api_key": "never", "lr": 1e-6, "output_dir": "out", "wandb_api_key": LEFT_OUT
    }  # fmt: skip
    assert told["seed"] == 1
    assert told["packages"]["torch"].startswith("2.") and "megatron-core" in told["packages"]
    assert "applied" in told["patches"]
    assert told["machine"]["cores"] >= 1 and told["machine"]["python"].startswith("3.")
    assert told["environment"]["exported"]["NCCL_CUMEM_ENABLE"] == "1"
    assert told["environment"]["engines"]["NCCL_CUMEM_ENABLE"] == "1"
    assert told["arguments"]["hidden_size"] == 64 and told["arguments"]["bounds"] == [0.5, "inf"]
    assert told["arguments"]["sglang_flags"] == ["--api-key", LEFT_OUT, "--tp-size", "2"]
    assert "hush" not in json.dumps(told)


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        ("--sglang-api-key x --lr 1", f"--sglang-api-key {LEFT_OUT} --lr 1"),
        ("--sglang-admin-api-key=x --lr 1", f"--sglang-admin-api-key={LEFT_OUT} --lr 1"),
        ("--engine-api-key never --api-key-env NAME", "--engine-api-key never --api-key-env NAME"),
        ("--prompt-key a.b --max-prompt-tokens 3", "--prompt-key a.b --max-prompt-tokens 3"),
        ("--db-password x --hub-access-token y", f"--db-password {LEFT_OUT} --hub-access-token {LEFT_OUT}"),
    ],
)
def test_secrets_are_left_out(words, kept):
    assert " ".join(without_secrets(words.split())) == kept


def test_every_life_has_a_file(tmp_path):
    first = RunRecord(tmp_path, {"seed": 1})
    (tmp_path / "run-x.json").touch()
    second = RunRecord(tmp_path, {"seed": 2})
    second.add(nodes=[])
    assert [path.name for path in (first.path, second.path)] == ["run-001.json", "run-002.json"]
    assert json.loads(first.path.read_text()) == {"seed": 1}
    assert json.loads(second.path.read_text()) == {"seed": 2, "nodes": []}


def test_the_commit_and_whether_files_differ(tmp_path):
    assert source_commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    file = tmp_path / "file"
    file.write_text("one")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    clean = source_commit(tmp_path)
    assert len(clean["commit"]) == 40 and clean["changed"] == []
    file.write_text("two")
    assert source_commit(tmp_path) == clean | {"changed": ["file"]}


def test_what_a_broken_installation_has_left_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "broken-1.0.dist-info").mkdir()
    (tmp_path / "whole-2.0.dist-info").mkdir()
    (tmp_path / "whole-2.0.dist-info" / "METADATA").write_text("Name: whole\nVersion: 2.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    packages = run_record._packages()
    assert packages["whole"] == "2.0" and None not in packages
