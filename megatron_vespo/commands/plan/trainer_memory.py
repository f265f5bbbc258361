"""Computes the GPU memory of a trainer rank, part by part, in bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_vespo.arguments.train_settings import TrainSettings
from megatron_vespo.commands.plan.layer_activations import kept_by_layer
from megatron_vespo.commands.plan.packs import pack_bytes, replayed_bytes
from megatron_vespo.models.stage import Stage
from megatron_vespo.rollout.server_arguments import other_layout
from megatron_vespo.system.hardware import GIB

# CUDA's context, NCCL's buffers, libraries' workspaces, fragmentation: an allowance, not measured
RESERVE = 4 * GIB
# What an offloaded engine keeps on the trainer's GPU: CUDA's context and kernels, NCCL's buffers, workspaces,
# and what the driver holds of CUDA graphs, not their tensors. An allowance, not measured
ENGINE_AT_REST = 3 * GIB


@dataclass(frozen=True)
class TrainerMemory:
    """Bytes at the peak of an optimizer step. Gradients are DDP's buffer; `host` is in CPU memory."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    log_probs: float
    packs: float  # in flight
    sync: float  # of a broadcast of weights, when there are no activations
    sync_buffers: float  # of weights on their way shard to shard; always there
    host: float
    engine: float = 0.0  # of an offloaded engine on the same GPU
    offload: bool = False  # weights and optimizer are in host memory while that engine generates

    @property
    def total(self) -> float:
        at_once = max(self.activations + self.log_probs + self.packs, self.sync)
        always = self.sync_buffers + self.engine + RESERVE
        return self.weights + self.gradients + self.optimizer + at_once + always

    @property
    def at_rest(self) -> float:
        """Bytes that stay on the GPU while an engine on it generates."""
        stays = 0.0 if self.offload else self.weights + self.optimizer
        return stays + self.sync_buffers + RESERVE

    @property
    def in_sync(self) -> float:
        """Bytes during a weight sync, when only the engine's weights are on the GPU."""
        sync = self.sync + self.sync_buffers
        return self.weights + (0.0 if self.offload else self.optimizer) + sync + RESERVE

    @property
    def comes_back(self) -> float:
        """Most bytes that return to the GPU, beside an engine's weights, for log-probs or a save."""
        forward = self.activations + self.log_probs + self.packs  # upper bound: a training step's
        if not self.offload:
            return forward
        return self.weights + max(forward, self.optimizer)


def trainer_memory(settings: TrainSettings, stage: Stage, index: int) -> TrainerMemory:
    """Memory of a rank of pipeline stage `index`."""
    gradient = (
        4 if settings.trainer.accumulate_allreduce_grads_in_fp32 else settings.trainer.params_dtype.itemsize
    )
    optimizer, host = optimizer_bytes(settings)
    shard = stage.parameters
    if settings.trainer.use_distributed_optimizer:
        shard = stage.dense / stage.dense_shards + stage.experts / stage.expert_shards
    return TrainerMemory(
        weights=stage.parameters * settings.trainer.params_dtype.itemsize,
        gradients=stage.parameters * gradient,
        optimizer=shard * optimizer,
        activations=activation_bytes(settings, stage.layers, index),
        log_probs=log_prob_bytes(settings)
        if index == settings.trainer.pipeline_model_parallel_size - 1
        else 0.0,
        packs=packs_in_flight_bytes(settings, stage.layers, index),
        sync=2 * settings.sync.weight_sync_bucket_mb * 2**20,  # a bucket, and its flattened copy
        sync_buffers=sync_buffer_bytes(settings, stage),
        host=shard * host,
        engine=ENGINE_AT_REST if settings.sync.colocate else 0.0,
        offload=settings.sync.colocate and settings.sync.colocate_offload,
    )


def sync_buffer_bytes(settings: TrainSettings, stage: Stage) -> float:
    """Two buffers of what a rank sends; for a colocated engine rank two more of what others send it.

    With --weight-sync-staging all that a rank sends is there at once: at most its weights.
    """
    if other_layout(settings.engines.sglang_flags, settings.engines.rollout_quantization) is not None:
        return 0.0
    if settings.sync.weight_sync_staging:
        return stage.parameters * settings.trainer.params_dtype.itemsize
    return (4 if settings.sync.colocate else 2) * settings.sync.weight_sync_bucket_mb * 2**20


def optimizer_bytes(settings: TrainSettings) -> tuple[float, float]:
    """(on the GPU, in CPU memory): bytes per parameter in the optimizer's shard.

    Adam has two moments and, for bf16, the fp32 weights. --use-precision-aware-optimizer stores each moment
    in its own type; Transformer Engine then keeps only the 2 bytes of fp32 weights that bf16 lacks. Offloaded
    parameters have fp32 moments in CPU memory, with copies of weight and gradient.
    """
    if not settings.trainer.bf16:
        return 8.0, 0.0
    if not settings.trainer.use_precision_aware_optimizer:
        copy_of_gradient = 0 if settings.trainer.accumulate_allreduce_grads_in_fp32 else 4
        return 12.0 + copy_of_gradient, 0.0
    moments = settings.trainer.exp_avg_dtype.itemsize + settings.trainer.exp_avg_sq_dtype.itemsize
    offloaded = settings.trainer.optimizer_offload_fraction if settings.trainer.optimizer_cpu_offload else 0.0
    weights = 2  # for fp32 main weights as for fp16 ones
    return (1 - offloaded) * (weights + moments), offloaded * (4 + 4 + 4 + 4)


def activation_bytes(settings: TrainSettings, layers: int, index: int) -> float:
    """What the micro-batches in flight keep, plus the working memory of the current layer.

    A full micro-batch has --max-tokens-per-gpu tokens on each context-parallel rank.
    """
    kept = kept_by_layer(settings.trainer)
    everything = sum(tensor.bytes for tensor in kept)
    largest = max(tensor.bytes for tensor in kept)  # its gradient
    if settings.trainer.recompute_granularity == "full":
        inputs = settings.trainer.params_dtype.itemsize * settings.trainer.hidden_size
        inputs /= settings.trainer.tensor_model_parallel_size if _inputs_are_sliced(settings) else 1
        every, chunks = (
            settings.trainer.recompute_num_layers,
            settings.trainer.virtual_pipeline_model_parallel_size or 1,
        )
        assert every is not None, "--recompute-granularity full needs --recompute-num-layers"
        if settings.trainer.recompute_method == "uniform":
            stored, at_work = inputs * math.ceil(layers / chunks / every) * chunks, every
        else:
            recomputed = min(every * chunks, layers)
            stored, at_work = inputs * recomputed + everything * (layers - recomputed), 1
        working = everything * at_work + largest
    else:
        freed = _freed_modules(settings)
        remaining = sum(tensor.bytes for tensor in kept if not tensor.modules & freed)
        stored, working = remaining * layers, everything - remaining + largest
    return settings.trainer.max_tokens_per_gpu * (stored * in_flight(settings, index) + working)


def kept_by_experts(settings: TrainSettings, layers: int, index: int) -> float:
    """Activations that grow with a rank's share of the tokens. Not valid for full recomputation."""
    freed = _freed_modules(settings)
    kept = [
        tensor
        for tensor in kept_by_layer(settings.trainer)
        if "moe" in tensor.modules and not tensor.modules & freed
    ]
    return (
        settings.trainer.max_tokens_per_gpu
        * sum(tensor.bytes for tensor in kept)
        * layers
        * in_flight(settings, index)
    )


def _freed_modules(settings: TrainSettings) -> frozenset[str]:
    return (
        frozenset(settings.trainer.recompute_modules or ())
        if settings.trainer.recompute_granularity == "selective"
        else frozenset()
    )


def _inputs_are_sliced(settings: TrainSettings) -> bool:
    return settings.trainer.sequence_parallel or settings.trainer.distribute_saved_activations


def in_flight(settings: TrainSettings, index: int) -> float:
    """Micro-batches whose activations stage `index` holds at once, in units of all its layers.

    1F1B: the number of stages from here on. Interleaved: the virtual stages of Megatron's warm-up, plus the
    current one (get_pp_rank_microbatches in its schedules; arXiv 2104.04473, section 2.2).
    """
    stages, virtual = (
        settings.trainer.pipeline_model_parallel_size,
        settings.trainer.virtual_pipeline_model_parallel_size,
    )
    most = (
        settings.trainer.global_batch_size // settings.trainer.data_parallel_size
    )  # a pack has at least one sample
    if virtual is None:
        return min(stages - index, most)
    group = settings.trainer.microbatch_group_size_per_vp_stage or stages
    return min((stages - index - 1) * 2 + (virtual - 1) * group + 1, most * virtual) / virtual


def packs_in_flight_bytes(settings: TrainSettings, layers: int, index: int) -> float:
    """Each model chunk has its own copy; one more is in transfer. All others wait in host memory."""
    micro_batches, chunks = (
        in_flight(settings, index),
        settings.trainer.virtual_pipeline_model_parallel_size or 1,
    )
    copies = (micro_batches * chunks + 1) * pack_bytes(settings, layers)
    return settings.trainer.max_tokens_per_gpu * (copies + micro_batches * replayed_bytes(settings, layers))


def log_prob_bytes(settings: TrainSettings) -> float:
    """The output layer's memory for one micro-batch: see `algorithms.linear_log_probs`.

    Hidden states of all tokens and their gradient, also in fp32; a tile of fp32 logits, and of their gradient
    if that is bf16; six fp64 numbers per token; the weight's gradient.
    """
    size, tokens = settings.trainer.params_dtype.itemsize, settings.trainer.max_tokens_per_gpu
    rows = settings.trainer.padded_vocab_size / settings.trainer.tensor_model_parallel_size
    hidden = tokens * settings.trainer.hidden_size * (2 * size + 4)
    tile = settings.trainer.log_prob_chunk_size * rows * (4 if size == 4 else 4 + size)
    return hidden + tile + 6 * 8 * tokens + rows * settings.trainer.hidden_size * size
