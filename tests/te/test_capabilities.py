"""What a run says of its parts, with Transformer Engine, without it, and with a broken one."""

from __future__ import annotations

from pathlib import Path

import numpy as np

PROGRAM = Path(__file__).parent / "programs" / "compare.py"


def parts(result) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in result["capabilities"])


def test_with_transformer_engine(on_task):
    [result] = on_task(True, PROGRAM, "tp1", "--moe-permute-fusion")
    assert result["adam"] == "transformer_engine.pytorch.optimizers.fused_adam"
    assert parts(result) == {
        "layers": "Transformer Engine 2.20.2",
        "attention": "Transformer Engine, unfused (its flash attention and cuDNN's take 16 bits)",
        "norms": "Transformer Engine",
        "experts": "grouped GEMM, permutation of tokens fused",
        "weight gradients": "added to the sum by their GEMM, but for the output layer's",
        "optimizer": "transformer_engine FusedAdam (it is installed)",
        "log-probs": "torch (no CUDA device)",
    }


def test_local_layers_where_transformer_engine_is_there(on_task):
    """They train as they do without it, and nothing of it is claimed but Adam."""
    [without], [result] = (on_task(te, PROGRAM, "tp1", "--transformer-impl", "local") for te in (False, True))
    np.testing.assert_allclose(result["log_probs"], without["log_probs"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(result["norms"], without["norms"], rtol=1e-6)
    said = parts(result)
    assert said["layers"] == "Megatron's local spec (asked for by --transformer-impl)"
    assert said["experts"] == "one GEMM each (asked for by --transformer-impl)"
    assert said["optimizer"].startswith("transformer_engine FusedAdam")


def test_without_transformer_engine(on_task):
    [result] = on_task(False, PROGRAM, "tp1")
    said = parts(result)
    assert said["layers"].startswith("Megatron's local spec (") and "Transformer Engine" in said["layers"]
    assert said["optimizer"].startswith("torch AdamW")
