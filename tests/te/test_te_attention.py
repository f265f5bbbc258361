"""Packs as Transformer Engine's attention wants them, and 16 bits through the path that a GPU runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

PROGRAM = Path(__file__).parent / "programs" / "packed_attention.py"
LAYERS = 4
ROUNDING = 0.01  # mean of log-probs in bf16; a token whose experts are close may go to another one


@pytest.fixture(scope="module")
def te(on_task):
    return on_task(True, PROGRAM, "tp1")[0]


def test_packs_reach_attention_as_te_wants_them(te):
    assert te["format"] == "thd"
    assert te["mask_type"] == "padding_causal"
    assert te["no_mask"]
    assert te["cu_seqlens_dtype"] == "torch.int32"
    cu_seqlens = te["cu_seqlens"]
    assert cu_seqlens[0] == 0 and cu_seqlens[-1] == te["num_tokens"] and len(cu_seqlens) == 5 + 1
    # a tensor would make TE wait for the GPU in every layer
    assert te["max_seqlen_type"] == "int" and te["max_seqlen"] >= np.diff(cu_seqlens).max()
    # other lengths with padding would keep flash and cuDNN's attention from being chosen
    assert te["the_padded_ones_are_the_same_object"]


def test_16_bits_take_cudnns_attention(te):
    """TE's own choice among its attentions, told that the machine is a Hopper."""
    assert list(te["calls"]) == [LAYERS, LAYERS]
    assert te["cudnn_dtype"] == "torch.bfloat16"
    assert te["cudnn_layout_is_thd"] and te["cudnn_mask_is_padding_causal"]
    np.testing.assert_array_equal(te["cudnn_cu_seqlens"], te["cu_seqlens"])


def test_bf16_is_the_local_layers_but_for_rounding(on_task, te):
    [local] = on_task(False, PROGRAM, "tp1")
    difference = np.abs(te["log_probs"] - local["log_probs"])
    print(f"log-probs {difference.mean():.1e} in the mean, {difference.max():.1e} at most")
    assert difference.mean() < ROUNDING
    assert float(te["grad_norm"]) == pytest.approx(float(local["grad_norm"]), rel=0.02)
    assert float(te["loss"]) == pytest.approx(float(local["loss"]), rel=0.02)
