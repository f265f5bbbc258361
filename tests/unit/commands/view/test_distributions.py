"""Distributions of recorded responses, and what other constants of phi and other N would have given."""

import json

import numpy as np
import pytest
import torch

from megatron_vespo.algorithms.diagnostics import weight_metrics
from megatron_vespo.algorithms.vespo import GammaKernel
from megatron_vespo.commands.view.distributions import Responses, distributions, what_if
from megatron_vespo.commands.view.index import RunIndex
from megatron_vespo.commands.view.kernel import Kernel
from megatron_vespo.data.step_records import FOLDER_NAME, read_step, record_path, write_step
from tests.support.step_records import StepShape, random_step, write_steps

STEPS = 8  # two rollout batches of four mini-batches


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    write_steps(run / FOLDER_NAME, STEPS, groups=8, group_size=4, mean_length=200)
    return run


@pytest.fixture(scope="module")
def records(run):
    return [read_step(record_path(run / FOLDER_NAME, step)) for step in range(1, STEPS + 1)]


def responses_of(run, step_min=None, step_max=None) -> Responses:
    index = RunIndex(run, run / "cache")
    index.refresh()
    with index.reading() as connection:
        return Responses.of(connection, step_min, step_max)


def joined(records, name):
    return np.concatenate([getattr(record, name) for record in records])


def test_ess_and_the_rest_are_the_metrics_of_training(run, records):
    found = distributions(responses_of(run, 1, 4))
    chosen = records[:4]
    lengths = joined(chosen, "num_sampled")
    mini_batches = np.repeat(np.arange(4), len(chosen[0].log_w))
    metrics = weight_metrics(joined(chosen, "weight"), joined(chosen, "advantages"), lengths, mini_batches)
    for part, name in (("all", ""), ("positive", "/positive"), ("negative", "/negative")):
        ours = found["overall"][part]
        assert ours["mean"] == pytest.approx(metrics[f"weight/mean{name}"], rel=1e-5)
        assert ours["ess"] == pytest.approx(metrics[f"weight/ess{name}"], rel=1e-5)
        assert ours["dead"] == pytest.approx(metrics[f"weight/dead_share{name}"], rel=1e-5)
    counts = {}
    for line in found["table"]:
        name = f"{line['sign']}/{line['length']}"
        counts[name] = counts.get(name, 0) + line["count"]
    assert counts == {
        name.removeprefix("weight/count/"): value for name, value in metrics.items() if "/count/" in name
    }
    assert found["mini_batches"] == 4 and found["responses"] == len(lengths)


def test_histograms_count_every_response_once(run, records):
    found = distributions(responses_of(run))
    advantages = joined(records, "advantages")
    for name in ("log_w", "weight"):
        for sign, chosen in (("positive", advantages > 0), ("negative", advantages < 0)):
            counted = sum(found[name]["counts"][sign]) + sum(found[name]["outside"][sign])
            assert counted == chosen.sum()
            edges, values = np.array(found[name]["edges"]), joined(records, name)[chosen]
            expected = np.histogram(values, edges)[0]
            # edges are rounded to eight digits
            assert np.abs(np.array(found[name]["counts"][sign]) - expected).sum() <= 2


def test_recorded_weights_are_recomputed(run):
    assert distributions(responses_of(run))["agreement"] < 1e-5


def test_with_advantages_per_token_there_is_no_one_phi_to_recompute(tmp_path):
    write_step(record_path(tmp_path / FOLDER_NAME, 1), random_step(1, StepShape(with_advantages=True)))
    found = distributions(responses_of(tmp_path))
    assert found["agreement"] is None and found["settings"]["has_advantages_per_token"]


def test_what_if_computes_the_phi_of_training(run, records):
    chosen = Kernel((1.0, 4.0), (5.0, 2.5))
    found = what_if(responses_of(run, 1, 3), chosen)
    log_w, advantages = (torch.tensor(joined(records[:3], name)) for name in ("log_w", "advantages"))
    phi = GammaKernel(chosen.positive, chosen.negative).phi(log_w, advantages).double()
    for part, mask in (
        ("all", advantages == advantages),
        ("positive", advantages > 0),
        ("negative", advantages < 0),
    ):
        weights = phi[mask]
        expected = float(weights.sum() ** 2 / (len(weights) * (weights**2).sum()))
        assert found["overall"][part]["mean"] == pytest.approx(float(weights.mean()), abs=1e-6)
        assert found["overall"][part]["ess"] == pytest.approx(expected, abs=1e-5)


def test_n_keeps_the_first_mini_batches_of_every_rollout_batch(run, records):
    found = what_if(responses_of(run), Kernel(), mini_batches=2)
    kept = [records[i] for i in (0, 1, 4, 5)]
    assert found["responses"] == sum(len(record.log_w) for record in kept)
    assert found["overall"]["all"]["log_w_mean"] == pytest.approx(joined(kept, "log_w").mean(), abs=1e-5)
    assert {line["mini_batch"] for line in found["table"]} == {0, 1}


def test_the_constants_of_a_run_change_nothing(run):
    responses = responses_of(run)
    recorded, again = distributions(responses), what_if(responses, Kernel.of(responses.settings))
    assert again["overall"]["all"]["ess"] == pytest.approx(recorded["overall"]["all"]["ess"], abs=1e-5)


def test_a_correction_stays_a_factor_of_the_weight(tmp_path):
    record = random_step(1)
    record.correction[:] = 0.5
    record.weight[:] *= 0.5
    write_step(record_path(tmp_path / FOLDER_NAME, 1), record)
    responses = responses_of(tmp_path)
    assert distributions(responses)["agreement"] < 1e-5
    assert what_if(responses, Kernel())["overall"]["all"]["mean"] < 0.7


def test_unknown_numbers_are_counted_and_left_out(tmp_path):
    record = random_step(1)
    record.log_w[:3] = np.nan
    write_step(record_path(tmp_path / FOLDER_NAME, 1), record)
    found = distributions(responses_of(tmp_path))
    assert found["unknown"] == 3 and found["responses"] == 13
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("step_min", [None, 100])
def test_nothing_recorded(tmp_path, run, step_min):
    found = distributions(responses_of(tmp_path if step_min is None else run, step_min))
    assert found["responses"] == 0 and found["table"] == [] and found["agreement"] is None
    json.dumps(found | what_if(responses_of(tmp_path), Kernel(), 3), allow_nan=False)
