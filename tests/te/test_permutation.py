"""What stands in for the kernels of the token permutation is what TE's own Triton kernels compute."""

from __future__ import annotations

from pathlib import Path

import numpy as np

PROGRAM = Path(__file__).parent / "programs" / "permutation_kernels.py"


def test_torch_permutes_as_tes_kernels_do(launch):
    [result] = launch(True, PROGRAM, 1, [])
    ours = [name for name in result if name.startswith("torch ")]
    assert len(ours) == 9
    for name in ours:
        theirs = result[name.replace("torch", "triton", 1)]
        np.testing.assert_allclose(result[name], theirs, rtol=0, atol=2e-6, err_msg=name)
