"""`megatron-vespo plan` against what real ranks hold."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.launch import PROGRAMS, TIMEOUT_S, launch
from tests.support.named_layouts import LAYOUTS


@pytest.mark.parametrize(
    "layout, more",
    [("tp2 pp2 ep2", "--bf16"), ("etp2", ""), ("ep2", "--bf16"), ("pp2 vpp2", "--bf16")],
)
def test_bytes_are_those_of_real_ranks(on_task, task, tmp_path, layout, more):
    num_ranks, flags = LAYOUTS[layout]
    flags = [*flags.split(), *more.split()]
    ranks = on_task("measured_memory.py", num_ranks, *flags)
    arguments = ["--hf-checkpoint", str(task.model), "--trainer-ranks", str(num_ranks), *flags]
    planned = launch(PROGRAMS / "planned_memory.py", 1, arguments, TIMEOUT_S, tmp_path)[0]
    for name in ("weights", "gradients"):
        assert [int(rank[name]) for rank in ranks] == [planned[name][int(rank["stage"])] for rank in ranks]
    # shards of a stage are of one size but for the ends of buckets
    for stage, each in enumerate(planned["optimizer"]):
        of_stage = [int(rank["optimizer"]) for rank in ranks if rank["stage"] == stage]
        np.testing.assert_allclose(sum(of_stage), each * len(of_stage), rtol=1e-12)
