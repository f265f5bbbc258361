"""--record-responses: what is written, what a failing disk does, and what a resumed run keeps."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from megatron_vespo.algorithms.losses.settings import LossSettings
from megatron_vespo.data.step_records import read_step, record_path, step_files, write_step
from megatron_vespo.data.token_values import TokenValues
from megatron_vespo.driver import response_recorder
from megatron_vespo.driver.response_recorder import (
    MOST_WAITING,
    ResponseRecorder,
    make_recorder,
    make_room,
    recorded_settings,
)
from megatron_vespo.driver.trained_step import TrainedStep
from tests.support.builders import make_completion, make_prompt, make_sample
from tests.support.letter_tokenizer import letters
from tests.support.settings import flat_settings
from tests.support.step_records import random_step

SETTINGS = {"steps_per_rollout": 4, "vespo_positive": (2.0, 3.0), "vespo_negative": (3.0, 2.0)}


def trained(number: int = 1, **result) -> TrainedStep:
    """Two responses, of two and three tokens; two ranks have their values."""
    prompt = make_prompt(7, [65, 66], text="which letters?", answer="b", metadata={"data_source": "letters"})
    completions = [
        make_completion(prompt, [97] * n, reward=float(n), routed_experts=np.zeros((n + 1, 2, 2), np.uint8))
        for n in (2, 3)
    ]
    samples = [make_sample(2, n, advantage=n - 2.5, group_id=5) for n in (2, 3)]
    parts = [
        TokenValues(np.array([4, 0]), np.array([-4.0, -0.5], np.float32), None, None, None),
        TokenValues(np.array([1, 2, 3]), np.array([-1, -2, -3], np.float32), None, None, None),
    ]
    columns = ("log_w", "weight", "correction", "rejected", "log_mismatch_in_w", "log_mismatch")
    values = {name: np.array([i, np.nan], np.float32) for i, name in enumerate(columns)}
    values |= {"tokens": parts, "kernel_c2": np.full(2, np.nan), "clip_bounds": np.zeros(2)}
    return TrainedStep(number, completions, samples, values | result)


@pytest.fixture
def told():
    return []


@pytest.fixture
def recorder(tmp_path, told):
    made = ResponseRecorder(tmp_path, letters(None), SETTINGS, told.append, deadline_s=30.0)
    yield made
    made.close()


def test_a_step_is_written_with_its_own_numbers(tmp_path, recorder, told):
    recorder(trained(6))
    recorder.close()
    record = read_step(record_path(tmp_path, 6))
    assert (record.step, record.mini_batch, told) == (6, 1, [])
    np.testing.assert_array_equal(record.pi, np.array([-0.5, -1, -2, -3, -4], np.float32))
    assert record.pi_old is None and record.expert_differences is None
    np.testing.assert_array_equal(record.advantages, [-0.5, 0.5])
    np.testing.assert_array_equal(record.group_ids, [5, 5])
    np.testing.assert_array_equal(record.log_w, [0.0, np.nan])
    assert [one.reward for one in record.completions] == [2.0, 3.0]
    assert record.completions[0].prompt.metadata == {"data_source": "letters"}
    assert record.pieces == {65: b" A", 66: b" B", 97: b" a"}
    assert all(one.routed_experts is None for one in record.completions)


def test_advantages_per_token_and_their_mean(tmp_path, recorder):
    step = trained(1)
    step.samples[0].token_advantages = np.array([1.0, -0.25], np.float32)
    recorder(step)
    recorder(trained(2))
    recorder.close()
    first, second = (read_step(record_path(tmp_path, number)) for number in (1, 2))
    np.testing.assert_array_equal(first.advantages_per_token, np.float32([0.5, -0.75, 0.5, 0.5, 0.5]))
    np.testing.assert_array_equal(first.advantages, [-0.125, 0.5])
    assert first.settings["has_advantages_per_token"]
    assert second.advantages_per_token is None and not second.settings["has_advantages_per_token"]


def test_values_of_pi_old_and_experts(tmp_path, recorder):
    places = np.arange(5)
    first = TokenValues(places, -places.astype(np.float32), -2 * places.astype(np.float32), None, None)
    experts = [
        TokenValues(np.empty(0, np.int32), np.empty(0, np.float32), None, at, np.array(at, np.uint8))
        for at in ([0, 3], [1, 2, 4])
    ]
    recorder(trained(1, tokens=[first, *experts]))
    recorder.close()
    record = read_step(record_path(tmp_path, 1))
    np.testing.assert_array_equal(record.pi_old, -2 * places)
    np.testing.assert_array_equal(record.expert_differences, places)


def test_what_a_step_chose_is_in_its_settings(tmp_path, recorder):
    recorder(trained(1, kernel_c2=np.array([3.5, np.nan]), clip_bounds=np.array([0.7, 1.4])))
    recorder(trained(2))
    recorder.close()
    first, second = (read_step(record_path(tmp_path, step)).settings for step in (1, 2))
    assert first["vespo_positive"] == [2.0, 3.5] and first["vespo_negative"] == [3.0, 2.0]
    assert first["clip_bounds"] == [0.7, 1.4]
    assert second["vespo_positive"] == [2.0, 3.0] and second["clip_bounds"] is None


def test_without_a_tokenizer_there_are_token_ids(tmp_path):
    recorder = ResponseRecorder(tmp_path, None, SETTINGS)
    recorder(trained())
    recorder.close()
    record = read_step(record_path(tmp_path, 1))
    assert record.pieces == {} and record.completions[0].token_ids.tolist() == [97, 97]


def test_an_error_is_told_once_and_the_run_goes_on(tmp_path, told):
    folder = tmp_path / "responses"
    folder.write_text("in the way")
    recorder = ResponseRecorder(folder, None, SETTINGS, told.append)
    for step in range(1, 9):
        recorder(trained(step))
    recorder.close()
    [line] = told
    assert line.startswith("WARNING: RESPONSES ARE NO LONGER RECORDED") and "\n" not in line
    assert "optimizer step 1: FileExistsError" in line


def test_a_full_disk_in_the_middle(tmp_path, told, recorder, monkeypatch):
    recorder(trained(1))
    while not step_files(tmp_path):
        time.sleep(0.01)

    def full(path, record):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(response_recorder, "write_step", full)
    recorder(trained(2))
    recorder.close()
    assert len(told) == 1 and "No space left on device" in told[0]
    assert [step for step, _ in step_files(tmp_path)] == [1]
    recorder(trained(3))


def test_the_run_waits_when_the_disk_is_slow(tmp_path, recorder, monkeypatch):
    """At most MOST_WAITING steps wait in memory beside the one that is written."""
    go_on, written = threading.Event(), []

    def slow(path, record):
        go_on.wait(20)
        written.append(record.step)

    monkeypatch.setattr(response_recorder, "write_step", slow)
    handed = []

    def run():
        for step in range(1, 6):
            recorder(trained(step))
            handed.append(step)

    thread = threading.Thread(target=run)
    thread.start()
    time.sleep(1.5)
    assert len(handed) == 1 + MOST_WAITING and written == []
    go_on.set()
    thread.join(20)
    recorder.close()
    assert written == [1, 2, 3, 4, 5]


def test_a_disk_that_hangs_ends_the_recording_not_the_run(tmp_path, told, monkeypatch):
    hanging = threading.Event()
    monkeypatch.setattr(response_recorder, "write_step", lambda path, record: hanging.wait(30))
    recorder = ResponseRecorder(tmp_path, None, SETTINGS, told.append, deadline_s=0.2)
    started = time.monotonic()
    for step in range(1, 7):
        recorder(trained(step))
    recorder.close()
    assert time.monotonic() - started < 5
    assert len(told) == 1 and "is not written after 0.2 s" in told[0]
    hanging.set()


def test_the_end_waits_for_the_last_step_but_not_for_ever(tmp_path, told, monkeypatch):
    hanging = threading.Event()
    monkeypatch.setattr(response_recorder, "write_step", lambda path, record: hanging.wait(30))
    recorder = ResponseRecorder(tmp_path, None, SETTINGS, told.append, deadline_s=0.2)
    recorder(trained(1))
    recorder.close()
    assert len(told) == 1 and "the last steps are not written after 0.2 s" in told[0]
    hanging.set()


def write(folder, *steps: int) -> None:
    for step in steps:
        write_step(record_path(folder, step), random_step(step))


def kept(folder) -> list[int]:
    return [step for step, _ in step_files(folder)]


def test_a_resumed_run_drops_what_it_writes_again(tmp_path):
    write(tmp_path, 1, 2, 3, 4)
    make_room(tmp_path, 2, goes_back=False)
    assert kept(tmp_path) == [1, 2]
    assert not list(tmp_path.glob("set-aside-*"))
    make_room(tmp_path, -1, goes_back=False)  # a restart from the beginning
    assert kept(tmp_path) == []


def test_a_run_that_goes_back_sets_later_steps_aside(tmp_path):
    write(tmp_path, 1, 2, 3, 4)
    make_room(tmp_path, 2, goes_back=True)
    assert kept(tmp_path) == [1, 2] and kept(tmp_path / "set-aside-001") == [3, 4]


def test_a_new_run_sets_those_of_another_aside(tmp_path):
    make_room(tmp_path / "missing", None, goes_back=False)
    assert not (tmp_path / "missing").exists()
    write(tmp_path, 1, 2)
    make_room(tmp_path, None, goes_back=False)
    assert kept(tmp_path) == [] and kept(tmp_path / "set-aside-001") == [1, 2]


def run_settings(tmp_path, **loss) -> flat_settings:
    settings = flat_settings(
        output_dir=tmp_path, steps_per_rollout=4, routing_replay=None, max_staleness=0, ckpt_step=None,
        hf_checkpoint=tmp_path / "model",
    )  # fmt: skip
    settings.loss = LossSettings(**loss)
    return settings


def test_settings_have_the_values_of_the_methods_authors(tmp_path):
    vespo = recorded_settings(run_settings(tmp_path))
    assert (vespo["policy_loss"], vespo["vespo_positive"], vespo["clip_range"]) == ("vespo", (2.0, 3.0), None)
    assert recorded_settings(run_settings(tmp_path, policy_loss="grpo"))["clip_range"] == [0.2, 0.28]
    assert recorded_settings(run_settings(tmp_path, policy_loss="sapo"))["sapo_tau"] == [1.0, 1.05]
    given = recorded_settings(run_settings(tmp_path, policy_loss="grpo", clip_range=(0.1, 0.3)))
    assert given["clip_range"] == [0.1, 0.3]


def test_the_folder_of_a_reference_policy_is_recorded_too(tmp_path, told):
    settings = run_settings(tmp_path, kl_loss_coef=0.1, reference_checkpoint=tmp_path / "reference")
    recorder = make_recorder(settings, letters(None), None, told.append)
    recorder(trained(1))
    recorder.close()
    assert told == []
    recorded = read_step(record_path(tmp_path / "responses", 1)).settings
    assert recorded["reference_checkpoint"] == str(tmp_path / "reference")


def test_recorded_batches_take_the_checkpoints_tokenizer(tmp_path, told):
    settings = run_settings(tmp_path)
    without = make_recorder(settings, None, None, told.append)
    without(trained(1))
    without.close()
    [line] = told
    assert "keeps token ids without their text" in line and "\n" not in line
    letters(None).save_pretrained(tmp_path / "model")
    recorder = make_recorder(settings, None, 1, told.append)
    recorder(trained(2))
    recorder.close()
    folder = tmp_path / "responses"
    assert [len(read_step(path).pieces) for _, path in step_files(folder)] == [0, 3]
    assert len(told) == 1
