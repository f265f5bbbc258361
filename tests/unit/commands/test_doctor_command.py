"""The doctor's processes of its own, and its report."""

import json
import sys

import pytest

from megatron_vespo.commands.doctor import command, network
from megatron_vespo.commands.doctor.finding import Finding
from megatron_vespo.commands.doctor.meeting import Meeting


@pytest.fixture
def worker(monkeypatch, tmp_path):
    """`worker(source)`: what runs in the place of the ranks of an all-reduce."""

    def replace(source: str) -> None:
        program = tmp_path / "worker.py"
        program.write_text(source)
        popen = network.subprocess.Popen
        monkeypatch.setattr(
            network.subprocess, "Popen",
            lambda command, **options: popen([sys.executable, str(program), *command[3:]], **options),
        )  # fmt: skip

    return replace


ANSWER = "import json, sys\nif sys.argv[4] == '0': print(json.dumps({'gb_per_s': %s, 'ms': 0.5}))\n"


@pytest.mark.parametrize(("backend", "status"), [("gloo", "ok"), ("nccl", "warn")])
def test_an_all_reduce_is_slow_for_gpus_only(worker, backend, status):
    worker(ANSWER % 1.25)
    found = network.all_reduce(Meeting(), backend, 2, "127.0.0.1")
    assert found.status == status
    if backend == "gloo":
        assert found == Finding("gloo all-reduce", "ok", "2 processes, 1.25 GB/s, 0.50 ms")


@pytest.mark.parametrize("ranks", [0, 1])
def test_nothing_to_reduce(ranks):
    assert network.all_reduce(Meeting(), "nccl", ranks, "127.0.0.1") is None


def test_a_rank_that_fails(worker):
    worker("import sys\nif sys.argv[4] == '1': raise RuntimeError('no route to host')\n")
    found = network.all_reduce(Meeting(), "gloo", 2, "127.0.0.1")
    assert found.status == "FAIL" and found.text == "2 processes, RuntimeError: no route to host"
    assert "GLOO_SOCKET_IFNAME" in found.fix


def test_a_rank_that_hangs(worker, monkeypatch):
    monkeypatch.setattr(network, "TIMEOUT_S", 1.0)
    worker("import time\ntime.sleep(60)\n")
    found = network.all_reduce(Meeting(), "gloo", 2, "127.0.0.1")
    assert found.status == "FAIL" and "no end" in found.text


@pytest.mark.parametrize(("ahead", "status"), [(0.2, "ok"), (-0.9, "ok"), (-3.0, "warn"), (100.0, "FAIL")])
def test_clock(ahead, status):
    assert command.judge_clock(ahead).status == status


def test_processes():
    meeting = Meeting()
    meeting.size = 4
    assert command.judge_processes(meeting).status == "ok"
    meeting.absent = {3, 1}
    finding = command.judge_processes(meeting)
    assert finding.status == "FAIL" and "ranks 1, 3" in finding.text


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warn", 0), ("FAIL", 1)])
def test_exit_code_and_json(tmp_path, capsys, status, code):
    options = command.DoctorOptions(shared_dir=tmp_path, json=tmp_path / "report.json")
    findings = {"n1": [Finding("disk", status, "some", "do it")], "n2": [Finding("disk", "ok", "much")]}
    assert command._report(options, findings) == code
    assert capsys.readouterr().out.startswith(f"disk  {status:4}")
    report = json.loads(options.json.read_text())
    assert report["ok"] == (code == 0)
    assert report["nodes"]["n1"][0]["text"] == "some" and len(report["lines"]) == 1
    options.json.unlink()
    assert command._report(options, findings, speaks=False) == code
    assert capsys.readouterr().out == "" and not options.json.exists()


def test_a_shared_folder_that_is_not_there(tmp_path):
    finding = command._shared(tmp_path / "nowhere", "7.0", Meeting())
    assert finding.status == "FAIL" and "no such folder here" in finding.text


def test_the_shared_folder_is_left_as_it_was(tmp_path):
    finding = command._shared(tmp_path, "7.0", Meeting())
    assert finding.status in ("ok", "warn") and str(tmp_path) in finding.text
    assert list(tmp_path.iterdir()) == []
