"""SGLang 0.5.23's block-FP8 layers on a CPU without AMX, for which it has no kernels.

Parameters, their names, their loading and their checksums are SGLang's own. What is replaced is the
multiplication: the same arithmetic in torch. An activation is quantised per token and 128 columns, as SGLang
does on GPUs; products are summed in fp32, in another order than a GPU's.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from megatron_vespo_cpu.replace import replace
from megatron_vespo_cpu.swiglu_experts import local_experts_forward

GROUP = 128  # columns of an activation that share a scale
_SMALLEST = 1e-10  # SGLang's: of the largest activation of a group


def install() -> None:
    from sglang.srt.layers.quantization import fp8

    replace(fp8, "dispatch_w8a8_block_fp8_linear", lambda **_: block_fp8_linear)
    replace(fp8.Fp8LinearMethod, "process_weights_after_loading_block_quant", _keep)
    replace(fp8.Fp8MoEMethod, "process_weights_after_loading_block_quant", _keep)
    replace(fp8.Fp8MoEMethod, "apply", _apply_experts)


def block_fp8_linear(
    input: Tensor,
    weight: Tensor,
    block_size: list[int],
    weight_scale: Tensor,
    input_scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """input [..., K] in bf16 times weight [N, K] in e4m3, with a scale per block; [..., N] in bf16."""
    if input_scale is not None:
        raise NotImplementedError("activations that are quantised already")
    rows, columns = block_size
    scales = weight_scale.repeat_interleave(rows, 0)[: weight.shape[0]]
    scales = scales.repeat_interleave(columns, 1)[:, : weight.shape[1]]
    output = (quantised_activations(input) @ (weight.float() * scales).T).to(input.dtype)
    return output if bias is None else output + bias


def quantised_activations(x: Tensor) -> Tensor:
    """x [..., K] as a GPU's kernel has it: rounded to e4m3 times one fp32 scale per token and 128 columns."""
    limit = torch.finfo(torch.float8_e4m3fn).max
    groups = x.float().unflatten(-1, (-1, GROUP))
    scales = groups.abs().amax(-1, keepdim=True).clamp_min(_SMALLEST) / limit
    return ((groups / scales).clamp(-limit, limit).to(torch.float8_e4m3fn).float() * scales).flatten(-2)


def _keep(method: Any, layer: Any) -> None:
    """Weights stay as they were loaded."""


def _apply_experts(method: Any, layer: Any, dispatch_output: Any) -> Any:
    from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput

    config = method.moe_runner_config
    plain = config.gemm1_alpha is None and not config.apply_router_weight_on_input
    if config.activation != "silu" or not plain or not method.block_quant:
        raise NotImplementedError("FP8 experts on CPU are plain SwiGLU experts in blocks")
    topk_weights, topk_ids, _ = dispatch_output.topk_output
    w13 = list(zip(layer.w13_weight, layer.w13_weight_scale_inv, strict=True))
    w2 = list(zip(layer.w2_weight, layer.w2_weight_scale_inv, strict=True))
    linear = functools.partial(_expert_linear, method.weight_block_size)
    x = dispatch_output.hidden_states
    return StandardCombineInput(local_experts_forward(x, topk_weights, topk_ids, w13, w2, linear))


def _expert_linear(block_size: list[int], x: Tensor, expert: tuple[Tensor, Tensor]) -> Tensor:
    return block_fp8_linear(x, expert[0], block_size, expert[1])
