"""Checks --rollout-quantization against the model, the engines' ranks and the other flags."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from megatron_vespo.models.family import family_of, shape_of
from megatron_vespo.rollout.fp8_engines import FP8_FLAGS
from megatron_vespo.rollout.server_arguments import PREFIX, engine_size, expert_parallel_size, flag_value
from megatron_vespo.weight_sync.engine_layout import EngineLayout, check_blocks, check_supported

FLAG = "--rollout-quantization"


def check_quantization(args: Namespace, hf_config: dict[str, Any]) -> None:
    """ValueError for a combination that such engines cannot serve."""
    if args.rollout_quantization is None:
        return
    where = f"{FLAG} {args.rollout_quantization}"
    for flag in FP8_FLAGS:
        if flag in args.sglang_flags:
            raise ValueError(
                f"{PREFIX}{flag.removeprefix('--')}: {where} decides how engines load weights: leave one out"
            )
    if (flag_value(args.sglang_flags, "--dtype") or "bfloat16") not in ("bfloat16", "float16", "half"):
        raise ValueError(f"{where}: SGLang's FP8 layers compute in 16 bits: leave --sglang-dtype out")
    for flag in ("rollout_only", "train_from"):
        if getattr(args, flag):
            raise ValueError(
                f"--{flag.replace('_', '-')} has no weight sync, which {where} needs: leave it out"
            )
    if args.weight_sync_staging:
        raise ValueError(
            f"{where}: weights are broadcast when engines pause: leave --weight-sync-staging out"
        )
    layout = EngineLayout(engine_size(args.sglang_flags), expert_parallel_size(args.sglang_flags))
    try:
        shape = shape_of(hf_config)
        check_supported(layout, shape)
        check_blocks(family_of(hf_config).hf_tensors(shape), layout, shape)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
