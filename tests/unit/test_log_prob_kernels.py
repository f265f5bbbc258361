"""The Triton kernels without a GPU: interpreted, and compiled for one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_vespo.algorithms import log_prob_kernels as kernels

INTERPRETED_TESTS = Path(__file__).with_name("interpreted_log_prob_kernels.py")
TIMEOUT_S = 240


def test_kernels_in_the_interpreter():
    """In a pytest of its own: the interpreter has to be chosen before anything imports Triton."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(INTERPRETED_TESTS)],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_kernels_compile_for_hopper(dtype, entropy_gradient, tmp_path, monkeypatch):
    """Triton brings NVIDIA's assembler: no GPU is needed to find what the interpreter lets through."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def binary(kernel, constants: dict[str, object]) -> bytes:
        types = {"logits_ptr": f"*{dtype}", "labels_ptr": "*i64", "num_tokens": "i32", "width": "i32"}
        types |= {"statistics_ptr": "*fp64"} | dict.fromkeys(constants, "constexpr")
        signature = {name: types.get(name, "*fp32") for name in kernel.arg_names}
        source = ASTSource(kernel, signature, constants)
        return compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}).asm["cubin"]

    no_entropy = {} if entropy_gradient else {"entropy_ptr": None, "grad_entropy_ptr": None}
    constants = {"BLOCK": kernels.GRADIENT_BLOCK, "HAS_ENTROPY_GRADIENT": entropy_gradient, **no_entropy}
    assert binary(kernels._gradient_kernel, constants)
    assert binary(kernels._statistics_kernel, {"BLOCK": kernels.STATISTICS_BLOCK})
