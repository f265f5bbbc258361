"""tests/gpu/run.py where there is no GPU: what it says, what it survives, what it hands back."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from tests.gpu import pack, run, wheels
from tests.gpu.items.table import ITEMS

BY_NAME = {item.name: item for item in ITEMS}
RUNNER = Path(run.__file__)
HERE = {"gpus": [], "python": "3.12.0"}
GPU = HERE | {"gpus": [{"name": "a GPU"}]}


def items(folder, *chosen, machine=HERE, seconds=100.0):
    return list(run.run_items(chosen, "cpu", machine, folder, [], time.monotonic() + seconds))


@pytest.mark.long
def test_without_a_gpu_everything_is_skipped_and_the_json_says_so(tmp_path):
    report = tmp_path / "figures.json"
    command = [sys.executable, str(RUNNER), "--json", str(report), "--pack", str(tmp_path)]
    done = subprocess.run(
        command, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == run.NOTHING_RAN, done.stdout + done.stderr
    told = json.loads(report.read_text())
    assert [item["name"] for item in told["items"]] == [item.name for item in ITEMS]
    assert {(item["outcome"], item["reason"]) for item in told["items"]} == {("skipped", "no CUDA device")}
    assert told["machine"]["torch"] and told["machine"]["gpus"] == []
    assert f"0 ok, 0 failed, {len(ITEMS)} skipped" in done.stdout.splitlines()[-1]


@pytest.mark.long
def test_an_item_that_hangs_and_one_that_crashes_stop_no_other(tmp_path):
    hangs = dataclasses.replace(BY_NAME["ceilings"], limit_s=0.2)
    crashes = dataclasses.replace(BY_NAME["ceilings"], environment={"PYTHONHOME": str(tmp_path)})
    results = items(tmp_path, hangs, crashes, BY_NAME["router"])
    assert [result["outcome"] for result in results] == ["failed", "failed", "ok"], results
    assert results[0]["reason"] == "still ran after 0 s" and results[0]["seconds"] < 5
    assert "ended with code 1" in results[1]["reason"] and "encodings" in results[1]["log"]
    assert results[2]["figures"]["bfloat16: logits that differ, repeated"] == 0.0
    assert run.exit_code(results) == 1 and "ok" in run.table(results[2])


def test_an_item_whose_check_does_not_hold_says_why(tmp_path):
    """The policy's programs need a model: a file where its folder should be."""
    (tmp_path / "small").write_text("")
    [result] = items(tmp_path, BY_NAME["policy, fp32"])
    assert result["outcome"] == "failed" and "Error: " in result["reason"] and "Traceback" in result["log"]


def test_reasons_to_skip(tmp_path):
    item, kernels = BY_NAME["CUDA IPC"], BY_NAME["kernels, values"]
    strange = dataclasses.replace(item, modules=("torch", "no_such_module", "no_such_parent.child"))
    assert items(tmp_path, kernels, seconds=run.LEAST_S - 1)[0]["reason"] == "no time left"
    assert items(tmp_path, item)[0]["reason"] == "needs a CUDA device"
    assert run.obstacle(item, "cuda", HERE, []) == "no CUDA device"
    assert run.obstacle(item, "cuda", GPU, []) == ""
    assert run.obstacle(item, "cuda", {"gpus": [], "problem": "no libcudart"}, []) == "no libcudart"
    assert run.obstacle(strange, "cuda", GPU, []).startswith("no_such_module, no_such_parent.child not")
    (tmp_path / "no_such_module").mkdir()
    assert run.obstacle(strange, "cuda", GPU, [str(tmp_path)]).startswith("no_such_parent.child not")


def test_exit_codes():
    def code(*outcomes: str) -> int:
        return run.exit_code([{"outcome": outcome} for outcome in outcomes])

    assert code("ok", "skipped") == 0 and code("ok", "failed") == 1 and code("skipped") == run.NOTHING_RAN


def test_a_machine_whose_torch_does_not_start_is_described(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open')")
    machine = run.look(os.environ | {"PYTHONPATH": str(tmp_path)})
    assert machine["problem"] == "ImportError: libcudart.so.13: cannot open"


def test_the_items_of_the_table_exist_and_fit_the_time():
    for item in ITEMS:
        module, _, function = item.function.partition(":")
        tree = ast.parse((RUNNER.parent / f"items/{module}.py").read_text())
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert item.limit_s < run.DEADLINE_S / 2
    assert len(BY_NAME) == len(ITEMS)
    # with the start and the transfer of a fresh machine
    assert run.DEADLINE_S <= 480


@pytest.mark.parametrize("name", ["run.py", "wheels.py", "items/table.py"])
def test_an_older_python_can_say_that_it_is_too_old(name):
    ast.parse((RUNNER.parent / name).read_text(), feature_version=(3, 10))


def make_wheel(folder: Path, name: str, tags: str, files: dict[str, str]) -> None:
    with zipfile.ZipFile(folder / f"{name}-{tags}.whl", "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)


def test_wheels_that_are_installed_or_of_another_machine_are_left_out(tmp_path):
    held, target = tmp_path / "pack", tmp_path / "target"
    held.mkdir()
    own = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    machine = os.uname().machine
    make_wheel(held, "numpy-1.0", "py3-none-any", {"numpy/__init__.py": ""})
    make_wheel(held, "absent_pure-1.0", "py3-none-any", {"absent_pure/__init__.py": ""})
    make_wheel(held, "absent_own-1.0", f"{own}-{own}-manylinux_2_28_{machine}", {"absent_own.so": ""})
    make_wheel(held, "absent_stable-1.0", f"cp38-abi3-manylinux_2_28_{machine}", {"absent_stable.so": ""})
    make_wheel(held, "absent_old-1.0", f"cp37-cp37m-manylinux_2_28_{machine}", {"absent_old.so": ""})
    make_wheel(held, "absent_arm-1.0", f"{own}-{own}-manylinux_2_28_other", {"absent_arm.so": ""})
    wheels.unpack(held, target)
    names = {path.name for path in target.iterdir()}
    assert names == {"absent_pure", "absent_own.so", "absent_stable.so"}
    assert wheels.unpack(tmp_path / "no such folder", target) == []


def test_megatron_of_another_python_is_unpacked_and_patched(tmp_path):
    """Its compiled part is for data sets, which nothing here reads."""
    held, target = tmp_path / "pack", tmp_path / "target"
    held.mkdir()
    diffs = sorted((wheels.PATCHES / "megatron-core-0.19.2").glob("*.diff"))
    apply = wheels.apply_module()
    files = {}
    for file_patch in (patch for diff in diffs for patch in apply.parse_diff(diff)):
        lines = [""] * 20_000  # the original, as far as the patch knows it
        for hunk in file_patch.hunks:
            lines[hunk.old_start : hunk.old_start + len(hunk.old)] = hunk.old
        files[file_patch.target] = "".join(line or "\n" for line in lines)
    make_wheel(held, "megatron_core-0.19.2", "cp37-cp37m-manylinux_2_28_x86_64", files)
    assert wheels.unpack(held, target)
    for diff in diffs:
        for file_patch in apply.parse_diff(diff):
            assert apply.run("check", file_patch, target)


def test_requirements_of_a_wheel():
    headers = [
        "tqdm>=4", "Typing_Extensions", 'colorama; sys_platform == "win32"', 'ruff; extra == "dev"',
        'tomli; python_version < "3.11"',
    ]  # fmt: skip
    assert pack.requirements(headers, "3.12") == {"tqdm", "typing-extensions"}
    assert {"torch", "sympy", "jinja2"} <= pack.installed_closure("torch", "3.12")


def test_a_package_without_a_locked_version_is_named(tmp_path):
    with pytest.raises(pack.PackError, match="requirements.txt has no version of no-such-package"):
        pack.download({"no-such-package"}, pack.locked_versions(), "3.12", tmp_path)


def test_wheels_that_are_too_large_are_refused(tmp_path, monkeypatch, capsys):
    def download(names, versions, python_version, folder):
        folder.mkdir()
        for name in names:
            make_wheel(folder, name, "1-py3-none-any", {f"{name}.dist-info/METADATA": "Name: x\n"})

    monkeypatch.setattr(pack, "download", download)
    monkeypatch.setattr(pack, "MAX_BYTES", 100)
    assert pack.main([str(tmp_path / "pack")]) == 1
    assert "MiB, more than 0" in capsys.readouterr().err and not (tmp_path / "pack").exists()
