"""The Triton kernels without a GPU: interpreted, and compiled for one."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from triton import compile, knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_vespo.algorithms import log_prob_kernels as kernels

INTERPRETED_TESTS = Path(__file__).parents[2] / "support/interpreted_log_prob_kernels.py"
TIMEOUT_S = 240


@pytest.mark.long
def test_kernels_in_the_interpreter():
    """In a pytest of its own: the interpreter has to be chosen before anything imports Triton."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(INTERPRETED_TESTS)],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


TARGET = GPUTarget("cuda", 90, 32)
# of 65,536 a multiprocessor has: with so many, it runs 2,048 threads at once
REGISTERS_OF_FULL_OCCUPANCY = 32


def compiled(kernel, dtype: str, constants: dict[str, object]):
    """As it is launched: pointers and the width of a tile, multiples of 128, are known to divide by 16."""
    types = {"gradient_ptr": f"*{dtype}", "labels_ptr": "*i64", "num_tokens": "i32", "width": "i32"}
    types |= {"statistics_ptr": "*fp64"} | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "*fp32") for name in kernel.arg_names}
    aligned = [i for i, (name, kind) in enumerate(signature.items()) if kind[0] == "*" or name == "width"]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": kernels.NUM_WARPS, "enable_fp_fusion": kernels.FUSION}
    return compile(source, target=TARGET, options=options)


def resources(ptx: str, folder: Path) -> tuple[int, int]:
    """Registers a thread and bytes spilled, as NVIDIA's assembler says."""
    (folder / "kernel.ptx").write_text(ptx)
    command = [knobs.nvidia.ptxas.path, "-v", "-arch=sm_90a", "-o", os.devnull, str(folder / "kernel.ptx")]
    said = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True).stderr
    spilled = sum(int(number) for number in re.findall(r"(\d+) bytes spill", said))
    return int(re.search(r"Used (\d+) registers", said)[1]), spilled


@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [("statistics", "fp32"), *itertools.product(["gradient", "gradient with entropy"], ["bf16", "fp32"])],
)
def test_kernels_compile_for_hopper(kernel, dtype, tmp_path, monkeypatch):
    """Triton brings NVIDIA's assembler: no GPU is needed to find what the interpreter lets through."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    if kernel == "statistics":
        built = compiled(kernels._statistics_kernel, dtype, {"BLOCK": kernels.BLOCK})
    else:
        entropy = kernel.endswith("entropy")
        constants = {"BLOCK": kernels.BLOCK, "HAS_ENTROPY_GRADIENT": entropy}
        constants |= {} if entropy else {"entropy_ptr": None, "grad_entropy_ptr": None}
        built = compiled(kernels._gradient_kernel, dtype, constants)
    registers, spilled = resources(built.asm["ptx"], tmp_path)
    print(f"{kernel}, {dtype}: {registers} registers, {spilled} bytes spilled")
    assert spilled == 0 and registers <= REGISTERS_OF_FULL_OCCUPANCY
    wide = r"v4\.b32|v2\.b64|v8\.b16"
    assert "fma.rn.f32" not in built.asm["ptx"], "z is not rounded before it is subtracted"
    # 16 bytes at once
    assert re.search(rf"ld\.global[.\w]*\.({wide})", built.asm["ptx"])
    assert kernel == "statistics" or re.search(rf"st\.global[.\w]*\.({wide})", built.asm["ptx"])


def test_few_lanes_are_idle():
    """Of the tiles of Qwen3-30B-A3B's vocabulary at tensor parallelism 2: 4,992 columns."""
    assert 4992 / (-(-4992 // kernels.BLOCK) * kernels.BLOCK) > 0.8
