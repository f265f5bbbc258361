"""The measured floor of log W: noise of the model's precision, the same on all ranks, at any layout."""

from __future__ import annotations

import numpy as np
import pytest

LAYOUTS = {
    "one rank": (1, ""),
    "tp2": (2, "--tensor-model-parallel-size 2 --expert-tensor-parallel-size 1"),
    "pp2 vpp2": (2, "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"),
    "cp2 ep2, R2": (2, "--context-parallel-size 2 --expert-model-parallel-size 2 --routing-replay R2"),
    "dp2, snapshots": (2, "--old-policy snapshot"),
    "dp2, ewma, overlap": (2, "--old-policy ewma --overlap-grad-reduce --overlap-param-gather"),
}
# log W of up to 30 tokens of a small random model
NOISE = {"fp32": (1e-9, 1e-4), "bf16": (1e-4, 1.0)}


@pytest.mark.parametrize("precision", NOISE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_floor_is_noise_of_the_precision(on_task, layout, precision):
    num_ranks, flags = LAYOUTS[layout]
    more = ["--bf16"] if precision == "bf16" else []
    results = on_task("log_w_floor.py", num_ranks, *flags.split(), *more)
    low, high = NOISE[precision]
    for result in results:
        assert result["floor"].shape == (7,)
        assert low < np.sqrt(np.mean(result["floor"] ** 2)) < high
        np.testing.assert_array_equal(result["floor"], results[0]["floor"])
        np.testing.assert_array_equal(result["again"], result["floor"])
        assert result["unchanged"]
        if "ewma" not in layout and "snapshot" not in layout:
            assert (result["log_w"] == 0).all()
