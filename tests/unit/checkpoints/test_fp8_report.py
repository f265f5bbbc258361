"""What is said to be FP8, and how many bytes that is, against what a quantised stream has."""

from __future__ import annotations

import pytest
import torch

from megatron_vespo.checkpoints.block_fp8 import quantised
from megatron_vespo.checkpoints.fp8_report import engine_bytes, fp8_lines, sent_bytes
from megatron_vespo.models.family import family_of, shape_of
from tests.support.published_config import QWEN3_30B_A3B
from tests.support.tiny_checkpoints import MOE, QWEN3, tiny_config


@pytest.mark.parametrize("kind", [MOE, QWEN3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bytes_are_those_of_the_stream(kind, dtype):
    config = tiny_config(kind, hidden_size=160, head_dim=64)
    shapes = family_of(config).hf_tensors(shape_of(config))
    tensors = {name: torch.ones(shape, dtype=dtype) for name, shape in shapes.items()}
    stream = dict(quantised(tensors.items()))
    assert sent_bytes(shapes, dtype.itemsize) == sum(tensor.nbytes for tensor in stream.values())
    scales = sum(tensor.numel() for name, tensor in stream.items() if name.endswith("_scale_inv"))
    # an engine has fp32 scales, and everything else in bf16
    rest = sum(tensor.numel() for name, tensor in stream.items() if not name.endswith("_proj.weight"))
    linear = sum(tensor.numel() for name, tensor in tensors.items() if name.endswith("_proj.weight"))
    assert engine_bytes(shapes) == linear + 2 * (rest - scales) + 4 * scales


def test_qwen3_30b_a3b_sends_little_more_than_half():
    shapes = family_of(QWEN3_30B_A3B).hf_tensors(shape_of(QWEN3_30B_A3B))
    linear = 48 * (128 * 3 * 2048 * 768 + 2 * 2048 * 4096 + 2 * 2048 * 512)
    all_of_it = 30_532_122_624
    assert sent_bytes(shapes, 2) == linear + 2 * linear // 128**2 + 2 * (all_of_it - linear)
    share = sent_bytes(shapes, 2) / (2 * all_of_it)
    print(f"{share:.4f} of the bytes in bf16")
    assert share == pytest.approx(0.5105, abs=1e-4)


def test_every_kind_of_tensor_is_in_one_line():
    config = tiny_config(MOE, num_hidden_layers=3)
    shapes = family_of(config).hf_tensors(shape_of(config))
    lines = list(fp8_lines(shapes))
    assert lines[0].startswith("engine weights: block FP8, ") and len(lines) == 3
    fp8, bf16 = lines[1].split("; ")
    assert fp8.startswith("  layers 0-2, each: ") and bf16.endswith(")")
    in_fp8 = "mlp.experts.*.down_proj, mlp.experts.*.gate_proj, mlp.experts.*.up_proj, self_attn.k_proj"
    assert in_fp8 in fp8 and "mlp.gate, " in bf16 and "input_layernorm" in bf16 and "_proj" not in bf16
    assert "lm_head" in lines[2] and "embed_tokens" in lines[2] and "FP8" not in lines[2]


def test_layers_that_differ_have_lines_of_their_own():
    sizes = {0: 8, 1: 8, 2: 9}
    shapes = {f"model.layers.{number}.mlp.up_proj.weight": (128, size) for number, size in sizes.items()}
    lines = list(fp8_lines(shapes | {"lm_head.weight": (3, 4)}))
    heads = [line.split(":")[0] for line in lines[1:]]
    assert heads == ["  layers 0-1, each", "  layer 2", "  outside of layers"]
    assert lines[2].count("FP8") == 1
