"""Computes the GPU memory of an engine: weights, and the KV cache that fits beside them."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vespo.arguments.train_settings import TrainSettings
from megatron_vespo.models.table import ModelShape
from megatron_vespo.rollout.server_arguments import MEMORY_FRACTION, flag_value
from megatron_vespo.system.hardware import GIB, Gpu

# without --sglang-mem-fraction-static: about what SGLang uses on GPUs of 80 GB and more
DEFAULT_STATIC_FRACTION = 0.83
CONTEXT = 1 * GIB  # used by CUDA and NCCL before SGLang measures free memory: an allowance


@dataclass(frozen=True)
class EngineMemory:
    """Bytes on one GPU of an engine; tokens are of the whole engine."""

    size: int  # GPUs
    fraction: float  # static share: weights and KV cache
    assumed: bool  # whether the fraction is the default, because none was given
    weights: float
    cache: float  # KV cache; negative if the weights alone are too large
    rest: float  # for activations, CUDA graphs and the buckets of a weight sync
    bucket: float
    sync: float  # of `rest`, during a weight sync
    token_bytes: float  # KV cache per token, on one GPU

    @property
    def tokens(self) -> int:
        return max(int(self.cache // self.token_bytes), 0)


def engine_memory(
    settings: TrainSettings, shape: ModelShape, model: float, gpu: Gpu, size: int, trainer: float = 0.0
) -> EngineMemory:
    """As SGLang profiles it: fraction x the memory free before it loads, minus the weights.

    `model` are the bytes of the weights of all ranks. Tensor parallelism splits them, and the KV cache down
    to one head per rank. `trainer` are the bytes of a trainer rank on the same GPU, which starts later.
    """
    item = 2 if settings.trainer.bf16 or settings.engines.rollout_quantization else 4
    bucket = settings.sync.weight_sync_bucket_mb * 2**20
    given = flag_value(settings.engines.sglang_flags, MEMORY_FRACTION)
    fraction = DEFAULT_STATIC_FRACTION if given is None else float(given)
    free, weights = gpu.memory - CONTEXT, model / size
    cache_type = flag_value(settings.engines.sglang_flags, "--kv-cache-dtype") or "auto"
    heads = max(shape.num_query_groups / size, 1)
    cache_item = 1 if cache_type.startswith("fp8") else item
    return EngineMemory(
        size=size,
        fraction=fraction,
        assumed=given is None,
        weights=weights,
        cache=fraction * free - weights,
        rest=(1 - fraction) * free - trainer,
        bucket=bucket,
        sync=weights if settings.sync.weight_sync_staging else 2 * bucket,
        token_bytes=shape.num_layers * heads * shape.head_dim * 2 * cache_item,
    )
