"""compare.py where Apex's kernel for gradient accumulation fusion is importable, but must not be called."""

from __future__ import annotations

import sys
from types import ModuleType

import compare
from megatron.core.tensor_parallel import layers

if __name__ == "__main__":
    # a module without functions: to call one would fail
    sys.modules["fused_weight_gradient_mlp_cuda"] = ModuleType("fused_weight_gradient_mlp_cuda")
    layers.fused_weight_gradient_mlp_cuda = sys.modules["fused_weight_gradient_mlp_cuda"]
    layers._grad_accum_fusion_available = True
    compare.main()
