"""Requests that run while the weights change, on a real server."""

from __future__ import annotations

import json
import time
from itertools import count

import numpy as np
import pytest

from megatron_vespo.data.rollout_file import batch_path, read_record
from megatron_vespo.observability.metrics import read_metrics
from megatron_vespo.rollout.async_collector import AsyncCollector
from megatron_vespo.rollout.buffer import PendingGroup, RolloutBuffer
from megatron_vespo.rollout.buffer_state import pack_pending, unpack_pending
from megatron_vespo.rollout.collector import Collector
from megatron_vespo.types import Completion, SamplingParams
from megatron_vespo.weight_sync.bucket_sender import BucketSender
from megatron_vespo.weight_sync.engine_admin import EngineAdmin
from tests.support.builders import make_prompt
from tests.support.references import chosen_experts, completion_log_probs, transformers_model
from tests.support.runs import finished, train_command, write_questions
from tests.support.send_weights import send_weights
from tests.support.servers import HOST, ROUTES, START_TIMEOUT_S, TOPK, make_tiny_model

SAMPLING = SamplingParams(temperature=1.0, max_new_tokens=300, stop_token_ids=())


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("mode", "version"), [("retract", 1), ("abort", 2), ("in_place", 3)])
def test_running_requests_go_on_with_the_new_weights(own_engine, tiny_model, tmp_path, mode, version):
    numbers = count(3)
    buffer = RolloutBuffer(
        lambda: make_prompt(number := next(numbers), [number, 7]),
        batch_size=4, steps_per_rollout=1, max_staleness=1, requeue=True, max_attempts=2,
        policy_version=version - 1,
    )  # fmt: skip
    collector = Collector([own_engine.url], routes=ROUTES, request_timeout_s=120.0, check=own_engine.check)
    stream = AsyncCollector(collector, buffer, SAMPLING, lambda group: [], num_completions=2, seed=1)
    admin = EngineAdmin([own_engine.url], START_TIMEOUT_S, mode)
    sender = BucketSender(admin, 1, f"policy_{version}", HOST, "gloo")
    folders = {v: make_tiny_model(tmp_path / str(v), seed=v) for v in (version - 1, version)}
    stream.start()
    try:
        time.sleep(0.2)  # a few tokens of each
        send_weights(sender, folders[version], version)
        stream.weights_synced(version)
        groups = stream.take(120) + stream.take(120)  # all that were in flight at the sync
    finally:
        stream.stop(10)
    completions = [completion for group in groups for completion in group]
    models = {v: transformers_model(folder) for v, folder in folders.items()}
    assert stream._messages == []
    mixed = 0
    for completion in completions:
        versions = completion.policy_versions.array()
        assert np.isfinite(completion.log_probs).all()
        assert (np.diff(versions) >= 0).all() and set(versions.tolist()) <= {version - 1, version}
        mixed += versions[0] != versions[-1]
        for number, model in models.items():
            expected = completion_log_probs(model, completion)
            difference = np.abs(completion.log_probs - expected)[versions == number]
            # keys and values of the old weights are what in_place goes on with
            if len(difference) and (mode != "in_place" or number < version):
                assert difference.max() <= 1e-4, (number, versions)
        check_routes(completion, models, mode, version)
    print(f"{mixed} of {len(completions)} completions were made by two policies")
    assert mixed > 0


def check_routes(completion: Completion, models: dict, mode: str, version: int) -> None:
    """Every token has the routes of the pass that made it, also where a later policy computed it again."""
    versions = completion.policy_versions.array()
    if mode == "retract" and versions[0] != versions[-1]:
        assert completion.routed_experts is None and completion.num_retractions > 0
        return
    assert isinstance(completion.routed_experts, np.ndarray)
    sent = np.sort(completion.routed_experts, axis=-1)
    made_by = np.concatenate([np.repeat(versions[0], len(completion.prompt.token_ids) - 1), versions])
    for number, model in models.items():
        if mode != "in_place" or number < version:
            own = made_by == number
            np.testing.assert_array_equal(sent[own], chosen_experts(model, completion, TOPK)[own])


@pytest.mark.timeout(300)
def test_responses_that_were_handed_back_go_on_as_if_they_had_not(engine, reference):
    """Also through the bytes of a checkpoint: log-probs, versions and routes are those of one piece."""
    prompts = {number: make_prompt(number, [number, 7]) for number in range(3, 20)}
    numbers = iter(prompts)

    def start(state: list[PendingGroup]) -> AsyncCollector:
        buffer = RolloutBuffer(
            lambda: prompts[next(numbers)],
            batch_size=4, steps_per_rollout=1, max_staleness=0, requeue=True, max_attempts=2,
        )  # fmt: skip
        buffer.restore(state)
        collector = Collector([engine.url], routes=ROUTES, request_timeout_s=120.0)
        stream = AsyncCollector(collector, buffer, SAMPLING, lambda group: [], num_completions=2, seed=1)
        stream.start()
        return stream

    state: list[PendingGroup] = []
    lengths, unfinished = [], []
    for _ in range(3):  # stops twice on the way
        stream = start(state)
        if len(lengths) == 2:
            break
        time.sleep(0.15)
        stream.suspend(30)
        with stream.held() as buffer:
            state = unpack_pending(pack_pending(buffer.pending()), prompts)
        stream.stop(10)
        lengths.append([len(d.token_ids) for p in state for d in p.partials])
        unfinished.append(sum(d.finish_reason == "abort" for p in state for d in p.partials))
    try:
        groups = stream.take(120)
    finally:
        stream.stop(10)
    print("tokens at the two stops:", lengths, "unfinished:", unfinished)
    assert all(0 < first <= second for first, second in zip(*lengths, strict=True))
    assert sum(lengths[0]) < sum(lengths[1]) and unfinished[0] >= unfinished[1] > 0
    whole = Collector([engine.url], routes=ROUTES, request_timeout_s=120.0)
    for completion in (c for group in groups for c in group):
        assert completion.finish_reason == "stop" or len(completion.token_ids) == SAMPLING.max_new_tokens
        expected = completion_log_probs(reference, completion)
        assert np.abs(completion.log_probs - expected).max() < 1e-4
        longer = make_prompt(0, np.concatenate([completion.prompt.token_ids, completion.token_ids[:-1]]))
        one = SamplingParams(1.0, 1, ())
        [[forced]] = whole.collect([longer], one, num_completions=1, seed=0)
        assert (np.sort(completion.routed_experts) == np.sort(forced.routed_experts)).all()


@pytest.fixture(scope="module")
def asynchronous_run(tiny_model, tmp_path_factory):
    """Eight optimizer steps, two a batch, on random weights; its command, flags and folder."""
    folder = tmp_path_factory.mktemp("asynchronous")
    questions = write_questions(folder / "questions.jsonl", 64)
    flags = f"--steps-per-rollout 2 --save {folder / 'checkpoints'} --max-completion-tokens 200".split()
    flags += ["--weight-check-interval", "2"]  # while requests run
    more = ["--max-staleness", "3", "--train-iters", "8"]
    finished(train_command(tiny_model, questions, folder / "out", *flags, *more), folder / "log")
    return questions, flags, folder


@pytest.mark.timeout(600)
def test_a_run_trains_on_what_was_generated_meanwhile(asynchronous_run):
    records = [r for r in read_metrics(asynchronous_run[2] / "out/metrics.jsonl") if "reward/mean" in r]
    for record in records:
        print({name: value for name, value in record.items() if name.startswith(("stale", "time/"))})
    assert [record["step"] for record in records] == [2, 4, 6, 8]
    assert all(record["staleness/total_max"] <= 3 for record in records)
    for record in records:
        shares = [record[f"staleness/share/{lag}"] for lag in range(4)]
        assert sum(shares) == pytest.approx(1)
        assert np.dot(shares, range(4)) == pytest.approx(record["staleness/total_mean"])
    # the first batch is as synchronous, later ones were in flight while the one before was trained
    assert records[0]["staleness/asynchronous_mean"] == 0
    assert all(record["staleness/asynchronous_mean"] > 0 for record in records[1:])
    assert records[-1]["staleness/trained_groups"] == 16
    assert all(record["sync/weight_check_seconds"] > 0 for record in records)
    events = json.loads((asynchronous_run[2] / "out/trace.json").read_text())
    assert sum(event.get("args", {}).get("completions") == 1 for event in events) > 0
    last = read_metrics(asynchronous_run[2] / "out/metrics.jsonl")[-1]
    assert last["check/last_sync_logprob_difference"] <= 1e-4


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_resumed_run_generates_what_was_in_flight(asynchronous_run, tiny_model):
    questions, flags, folder = asynchronous_run
    flags = [*flags, "--load", str(folder / "checkpoints"), "--train-iters", "12", "--sync-interval", "1"]
    for staleness, status in (("0", 2), ("4", 0)):
        flags_now = flags[:-2] if staleness == "0" else [*flags, "--on-weight-update", "in-place"]
        command = train_command(
            tiny_model, questions, folder / "again", *flags_now, "--max-staleness", staleness
        )
        output = finished(command, folder / f"log-{staleness}", code=status)
        if staleness == "0":
            assert "prompts were in flight when this asynchronous run was saved" in output
    records = [r for r in read_metrics(folder / "again/metrics.jsonl") if "reward/mean" in r]
    assert [record["step"] for record in records] == [10, 12]
    assert all(record["staleness/total_max"] <= 4 for record in records)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("on_update", ["abort", pytest.param("in-place", marks=pytest.mark.slow)])
def test_a_run_replays_the_routes_of_several_policies(tiny_model, tmp_path, on_update):
    """The engines' routes of all responses, also of those that a checkpoint holds unfinished."""
    questions = write_questions(tmp_path / "questions.jsonl", 64)
    flags = "--steps-per-rollout 2 --max-staleness 3 --sync-interval 1 --max-completion-tokens 200"
    flags += f" --routing-replay R3 --save {tmp_path / 'checkpoints'} --no-hf-export"
    flags += f" --on-weight-update {on_update} --max-logprob-difference 1e-3"
    for train_iters, more in ((4, ""), (8, f"--load {tmp_path / 'checkpoints'}")):
        recorded = tmp_path / f"rollouts-{train_iters}"
        now = f"{flags} --train-iters {train_iters} --save-rollouts {recorded} {more}".split()
        output = finished(train_command(tiny_model, questions, tmp_path / "out", *now), tmp_path / "log")
        assert "without routing replay" not in output
    records = [r for r in read_metrics(tmp_path / "out/metrics.jsonl") if "reward/mean" in r]
    assert [record["step"] for record in records] == [2, 4, 6, 8]
    mixed = 0
    for batch in range(4):
        record = read_record(batch_path(tmp_path / f"rollouts-{4 if batch < 2 else 8}", batch))
        for completion in (completion for group in record.groups for completion in group):
            entered = len(completion.prompt.token_ids) + len(completion.token_ids) - 1
            assert completion.routed_experts.shape == (entered, *ROUTES)
            mixed += len(completion.policy_versions.versions) > 1
    floors = [{name: value for name, value in record.items() if "floor_std" in name} for record in records]
    print(f"{mixed} responses of several policies; log W of rounding alone: {floors}")
    assert mixed > 0
    assert all(record["rollout/retracted_share"] == 0 for record in records)
    assert all(abs(value) < 1e-3 for floor in floors for value in floor.values())
