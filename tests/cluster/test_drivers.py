"""What runs on GPUs is decided by the nodes of --ray-address, not by the driver's own machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.support.fake_nodes import FakeNodes
from tests.support.train_flags import CONFIG

RUN_S = 170


@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="a driver without CUDA, nodes that have none")
def test_a_driver_without_cuda_places_ranks_on_gpus(fake_nodes: FakeNodes, tmp_path):
    """As far as these nodes go: the rank has a GPU, by Ray, and its torch finds none."""
    fake_nodes.add(2)
    [gpus] = fake_nodes.gpus.values()
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    program = [sys.executable, "-m", "tests.cluster.programs.plain_driver", "check", "layout"]
    flags = ["--hf-checkpoint", tmp_path, "--reference", "tp2", "--candidate", "tp1", "--samples", "4",
             "--transformer-impl", "local"]  # fmt: skip
    done = subprocess.run(
        [*program, *flags, "--ray-address", fake_nodes.address],
        capture_output=True, text=True, timeout=RUN_S, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    line = done.stderr.splitlines()[-1]
    print(line)
    assert any(f"sees 0 GPUs with CUDA_VISIBLE_DEVICES='{gpu}', must see 1" in line for gpu in gpus)
    assert "torch finds no CUDA device there" in line
