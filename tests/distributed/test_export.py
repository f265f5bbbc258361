"""The policy as an HF folder: bit-exact when weights were only loaded, the same model when trained."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.random_task import transformers_log_probs
from tests.support.tensors import read_tensors

LAYOUTS = ["one rank", "tp2 pp2 ep2"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_export_of_loaded_weights_is_bit_exact(task, training_run, outputs, layout):
    training_run(layout)
    source, exported = read_tensors(task.model), read_tensors(outputs / layout / "before")
    assert exported.keys() == source.keys()
    for name, tensor in source.items():
        assert exported[name].dtype == tensor.dtype and torch.equal(exported[name], tensor), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_sees_its_stage_once(task, training_run, layout):
    by_stage = {}
    for result in training_run(layout):
        names = result["names"].tolist()
        assert len(names) == len(set(names))
        assert by_stage.setdefault(int(result["stage"]), names) == names  # same order on all ranks of a stage
    everything = sorted(name for names in by_stage.values() for name in names)
    assert everything == sorted(read_tensors(task.model))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_transformers_reads_the_trained_policy(task, training_run, outputs, layout):
    expected = training_run(layout)[0]["log_probs_after"]
    exported = outputs / layout / "after"
    difference = np.abs(transformers_log_probs(exported, task.samples_file) - expected).max()
    print(f"{layout}: exported log-probs {difference:.1e}")
    assert difference < 1e-5
    assert np.abs(expected - task.log_probs).max() > 0.1  # it did train
    assert (exported / "config.json").read_bytes() == (task.model / "config.json").read_bytes()
