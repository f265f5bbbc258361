"""What a run hands to its trackers: ids that outlive a restart, configuration, files of the end."""

from __future__ import annotations

import json
import os
import re
import socket
from argparse import ArgumentParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_vespo.arguments.tracking import (
    TrackingSettings,
    add_tracking_arguments,
    check_tracker_packages,
    check_tracking,
)
from megatron_vespo.driver import tracking as module
from megatron_vespo.driver.tracking import Tracking, tracker_config
from megatron_vespo.observability.metrics import MetricsWriter
from megatron_vespo.observability.trackers import packages

ROOT = Path(__file__).parents[3]


def parsed(*flags: str) -> TrackingSettings:
    parser = ArgumentParser()
    add_tracking_arguments(parser)
    args = parser.parse_args(flags)
    check_tracking(args)
    return TrackingSettings.of(args)


class FakeProcess:
    """Notes what it gets; its id is that of its start, or a new one."""

    made: list[FakeProcess] = []

    def __init__(self, name, start, log, say, on_started):
        self.name, self.start, self.sent, self.joined = name, start, [], None
        on_started(start.run_id or f"{name}-{len(self.made)}", "somewhere")
        self.made.append(self)

    def send(self, kind, **content):
        self.sent.append((kind, content))

    def join(self, deadline):
        self.joined = deadline

    def kill(self):
        pass


@pytest.fixture
def tracking(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TrackerProcess", FakeProcess)
    FakeProcess.made = []

    def make(*flags: str, resumes: bool = False, record: dict | None = None) -> Tracking:
        run = SimpleNamespace(output_dir=tmp_path, train_iters=80)
        settings = SimpleNamespace(tracking=parsed(*flags), run=run)
        return Tracking(settings, record or {}, resumes, lambda text: None)

    return make


def ids() -> list[str | None]:
    return [process.start.run_id for process in FakeProcess.made]


def test_tensorboard_alone_is_the_default_and_others_replace_it():
    assert parsed().names == ("tensorboard",)
    assert parsed("--tracker", "none").names == ()
    assert parsed("--tracker", "wandb", "--tracker", "mlflow", "--tracker", "wandb").names == (
        "wandb",
        "mlflow",
    )


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--tracker none --tracker swanlab", "--tracker none contradicts --tracker swanlab"),
        ("--prometheus-port -1", "--prometheus-port is -1"),
    ],
)
def test_flags_that_contradict_are_refused(flags, named):
    with pytest.raises(ValueError, match=named):
        parsed(*flags.split())


@pytest.mark.parametrize(
    "flag", ["--tracker-project", "--tracker-run-name", "--tracker-group", "--tracker-tag"]
)
def test_empty_names_are_refused(flag):
    with pytest.raises(ValueError, match=f"{flag} is empty"):
        parsed(flag, " ")


@pytest.mark.parametrize(
    ("tracker", "flag", "value"),
    [
        *(("wandb", "--tracker-project", f"a{character}b") for character in "/\\#?%:"),
        ("wandb", "--tracker-project", "x" * 129),
        ("wandb", "--tracker-tag", "x" * 65),
        ("swanlab", "--tracker-project", "team/project"),
        ("swanlab", "--tracker-project", "two words"),
        ("swanlab", "--tracker-project", "x" * 101),
    ],
)
def test_names_that_a_package_would_refuse_later_are_refused_at_once(tracker, flag, value):
    with pytest.raises(ValueError, match=f"^{flag} is .*; --tracker {tracker} allows "):
        parsed("--tracker", "tensorboard", "--tracker", tracker, flag, value)
    assert parsed("--tracker", "mlflow", flag, value)  # its names are free
    assert parsed("--tracker", tracker, "--tracker-project", "My_project-1.0")


@pytest.mark.parametrize(
    ("flags", "module_name", "requirement"),
    [
        *((f"--tracker {name}", *packages.PACKAGES[name]) for name in packages.PACKAGES),
        ("--prometheus-port 0", *packages.PROMETHEUS),
    ],
)
def test_a_missing_package_is_named_with_the_pip_command(monkeypatch, flags, module_name, requirement):
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None if name == module_name else 1)
    with pytest.raises(ValueError) as refused:
        check_tracker_packages(parsed(*flags.split()))
    assert str(refused.value).endswith(f"{module_name} is not installed: pip install '{requirement}'")
    assert "\n" not in str(refused.value)


def test_extras_are_the_requirements_of_the_code():
    text = (ROOT / "setup.py").read_text()
    for name, (_, requirement) in packages.PACKAGES.items() | {("prometheus", packages.PROMETHEUS)}:
        assert f'"{name}": ["{requirement}"]' in text


def test_ids_outlive_a_restart_in_the_same_project(tracking, tmp_path):
    two = ("--tracker", "wandb", "--tracker", "mlflow")
    for _ in range(2):
        with tracking(*two, resumes=True):
            pass
    assert ids() == [None, None, "wandb-0", "mlflow-1"]
    assert json.loads((tmp_path / "trackers.json").read_text())["wandb"]["id"] == "wandb-0"
    with tracking(*two, "--tracker-project", "other", resumes=True):
        pass
    with tracking(*two, "--tracker-project", "other", resumes=False):
        pass
    assert ids()[4:] == [None] * 4


def test_ids_that_cannot_be_written_end_nothing(tracking, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_atomically", full)
    with tracking("--tracker", "wandb", "--tracker", "mlflow"):
        assert len(FakeProcess.made) == 2


def test_a_broken_file_of_ids_is_named(tracking, tmp_path):
    (tmp_path / "trackers.json").write_text("{")
    with pytest.raises(ValueError, match=r"trackers\.json: not JSON .*: remove it"):
        tracking("--tracker", "wandb", resumes=True)


@pytest.mark.parametrize("content", ["[]", "null", '{"wandb": "id"}', '{"wandb": null}'])
def test_a_file_of_ids_with_other_content_is_named(tracking, tmp_path, content):
    (tmp_path / "trackers.json").write_text(content)
    with pytest.raises(ValueError, match=r"trackers\.json: holds no ids of runs: remove it"):
        tracking("--tracker", "wandb", resumes=True)


def test_a_taken_port_is_one_line(tracking):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            ValueError, match=rf"^--prometheus-port {port}: cannot listen on 127.0.0.1 \(.*\): .*$"
        ):
            tracking("--prometheus-port", str(port))


@pytest.mark.parametrize("host", ["a..b", "", "192.0.2.1"])
def test_an_address_that_is_none_of_this_machine_is_one_line(tracking, host):
    with pytest.raises(
        ValueError, match=r"^--prometheus-port 0: cannot listen on .* choose another address$"
    ):
        tracking("--prometheus-port", "0", "--prometheus-host", host)


@pytest.mark.parametrize(
    ("error", "state", "seconds"),
    [(None, "finished", 30), (RuntimeError, "failed", 30), (KeyboardInterrupt, "interrupted", 10)],
)
def test_the_end_hands_over_what_the_run_has_written(tracking, tmp_path, error, state, seconds):
    (tmp_path / "report.html").write_text("of an earlier start")
    os.utime(tmp_path / "report.html", (1e9, 1e9))
    try:
        with tracking("--tracker", "swanlab"):
            (tmp_path / "summary.json").write_text('{"steps": 3}')
            if error:
                raise error
    except (RuntimeError, KeyboardInterrupt):
        pass
    [process] = FakeProcess.made
    [(kind, content)] = process.sent
    assert kind == "finish" and content["state"] == state and content["summary"] == {"steps": 3}
    assert content["files"] == [str(tmp_path / "summary.json")]
    assert 0 < process.joined - module.time.monotonic() <= seconds


def test_records_alarms_samples_and_restarts_are_sent(tracking, tmp_path):
    with tracking("--tracker", "wandb") as made:
        writer = MetricsWriter(tmp_path, None, tensorboard=made.tensorboard, on_record=made.record)
        made.attempt_started(0, 0)
        writer.write(4, {"reward/mean": 0.5})
        made.alarm(4, "dead_share", "half are dead")
        made.samples(4, [{"prompt": "half a \ud83d character", "turns": [{"text": "\ud83d"}], "log_w": 0.5}])
        made.attempt_started(1, 2)
        writer.close()
    [process] = FakeProcess.made
    [(_, log), (_, note), (_, samples), (_, again), _] = process.sent
    assert log["step"] == 4 and log["metrics"] == {"reward/mean": 0.5} and log["time"] > 1.7e9
    assert note == {"step": 4, "title": "alarm.dead_share", "text": "half are dead"}
    assert samples["rows"] == [
        {"prompt": r"half a \ud83d character", "turns": [{"text": r"\ud83d"}], "log_w": 0.5}
    ]
    assert again["step"] == 2 and "restart 1 of the trainer: it continues after step 2" in again["text"]
    assert not (tmp_path / "tensorboard").exists()


def test_a_tracker_without_a_process_does_not_end_the_run(tracking, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(module, "TrackerProcess", refuse)
    said: list[str] = []
    made = tracking("--tracker", "wandb")
    made._say = said.append
    with made:
        made.record(1, 0.0, {})
    [line] = said
    assert "Cannot allocate memory" in line and "the run continues without it" in line


def test_tensorboard_gets_texts_and_the_picture(tracking, tmp_path):
    png = (ROOT / "examples/tiny/curves.png").read_bytes()
    with tracking() as made:
        writer = MetricsWriter(tmp_path, None, tensorboard=made.tensorboard, on_record=made.record)
        writer.write(4, {"reward/mean": 0.5})
        writer.write_text(4, "samples", "**largest log W**: \ud83d")
        writer.close()
        (tmp_path / "curves.png").write_bytes(png)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    [text] = events.Tensors("samples")
    assert text.step == 4 and text.tensor_proto.string_val == [rb"**largest log W**: \ud83d"]
    [image] = events.Images("curves")
    assert image.step == 4 and image.encoded_image_string == png
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [(4, 0.5)]


def test_the_configuration_is_what_differs_from_the_defaults():
    record = {
        "changed": {"lr": 1e-6}, "seed": 1, "command": "megatron-vespo train",
        "arguments": {"lr": 1e-6, "x": 1}, "packages": {"torch": "2.14", "pip": "1"}, "source": None,
        "machine": {"host": "h", "gpus": ["A", "B"]}, "environment": {"exported": {"OMP_NUM_THREADS": "1"}},
    }  # fmt: skip
    assert tracker_config(record) == {
        "lr": 1e-6, "seed": 1, "command": "megatron-vespo train", "commit": None, "host": "h", "gpus": "A, B",
        "version.torch": "2.14",
    }  # fmt: skip


def test_prometheus_shows_the_health_of_a_run(tracking):
    made = tracking("--prometheus-port", "0", "--tracker", "none")
    fleet = SimpleNamespace(
        urls=["http://a", None],
        states=lambda: SimpleNamespace(lost=[1]),
        metrics=lambda: {"engines/restarts": 2.0, "engines/lost_requests": 3.0},
    )
    with made:
        made.watch(lambda: "train", fleet)
        made.attempt_started(1, 4)
        health = made._endpoint.health()
    assert health.phase == "train" and health.engines == {0: 1.0, 1: 0.0} and health.engines_lost == 1
    assert (health.trainer_restarts, health.engine_restarts, health.lost_requests) == (1, 2, 3)
    assert re.fullmatch(r"\d+", str(made._endpoint.port))
