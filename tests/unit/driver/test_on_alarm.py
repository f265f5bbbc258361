"""--on-alarm through the controller's loop; what generates and trains is a stand-in."""

import pytest

from megatron_vespo.driver.controller import StoppedByAlarm
from megatron_vespo.driver.learner import FLOOR_INTERVAL
from megatron_vespo.observability.metrics import batch_records, read_metrics
from tests.support.controllers import MINI_BATCHES, controller


def alarms_on(tmp_path) -> list[int]:
    """Steps whose records have the alarm."""
    records = batch_records(read_metrics(tmp_path / "metrics.jsonl"))
    return [record["step"] for record in records if record.get("alarm/truncated_responses") == 1.0]


def test_warn_says_it_once_though_it_comes_and_goes(tmp_path, capsys):
    run = controller(tmp_path, "warn", 6, {2, 3, 5})
    assert run.train().iteration == 12
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("alarm ")]
    assert [line.partition(":")[0] for line in said] == ["alarm truncated_responses at optimizer step 4"]
    assert alarms_on(tmp_path) == [4, 6, 10]
    assert [state["iteration"] for state in run.trainer.saved] == [12]


def test_stop_ends_the_run_with_its_metrics_written_and_nothing_saved(tmp_path):
    run = controller(tmp_path, "stop", 6, {2})
    with pytest.raises(
        StoppedByAlarm, match="^stopped by alarm truncated_responses at optimizer step 4: 100%"
    ):
        run.train()
    assert run.trainer.saved == []
    assert alarms_on(tmp_path) == [4]


def test_checkpoint_and_stop_saves_first(tmp_path):
    run = controller(tmp_path, "checkpoint-and-stop", 6, {2})
    with pytest.raises(StoppedByAlarm, match="; checkpoint in folder$") as stopped:
        run.train()
    assert isinstance(stopped.value, RuntimeError) and "\n" not in str(stopped.value)
    assert [state["iteration"] for state in run.trainer.saved] == [4]
    assert run.trainer.saved[0]["consumed_prompts"] == 4
    assert alarms_on(tmp_path) == [4]


@pytest.mark.parametrize("on_alarm", ["warn", "stop", "checkpoint-and-stop"])
def test_without_an_alarm_all_run_to_the_end(tmp_path, on_alarm):
    run = controller(tmp_path, on_alarm, 2, set())
    assert run.train().iteration == 4
    assert [state["iteration"] for state in run.trainer.saved] == [4]


def test_what_was_said_before_a_resume_is_not_said_again(tmp_path, capsys):
    controller(tmp_path / "first", "warn", 2, {2}).train()
    capsys.readouterr()
    run = controller(tmp_path / "second", "warn", 1, {1})
    run.history = batch_records(read_metrics(tmp_path / "first/metrics.jsonl"))
    run.train()
    assert "alarm " not in capsys.readouterr().out
    assert len(run.history) == 3


def test_the_floor_of_log_w_is_measured_at_the_start_and_every_so_many_batches(tmp_path):
    run = controller(tmp_path, "warn", FLOOR_INTERVAL + 2, set())
    run.train()
    assert run.trainer.floors_measured == 2
    records = batch_records(read_metrics(tmp_path / "metrics.jsonl"))
    assert all(record["ratio/floor_std"] == 0.0 for record in records)
    assert run.trainer.saved[-1]["log_w_floor"] == run.state.log_w_floor
    # a resumed run has the last one
    resumed = controller(tmp_path / "resumed", "warn", FLOOR_INTERVAL, set())
    resumed.state.iteration, resumed.state.log_w_floor = MINI_BATCHES, run.state.log_w_floor
    resumed.train()
    assert resumed.trainer.floors_measured == 0
