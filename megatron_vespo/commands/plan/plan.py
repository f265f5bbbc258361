"""A plan: everything computed for a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from megatron_vespo.arguments.train_settings import TrainSettings
from megatron_vespo.checkpoints.fp8_report import engine_bytes
from megatron_vespo.commands.plan.engine_memory import EngineMemory, engine_memory
from megatron_vespo.commands.plan.host_memory import HostMemory, host_memory
from megatron_vespo.commands.plan.speed import (
    Lengths,
    Speed,
    model_cost,
    preset,
    speed,
)
from megatron_vespo.commands.plan.trainer_memory import TrainerMemory, trainer_memory
from megatron_vespo.commands.plan.weight_sync import WeightSync, weight_sync
from megatron_vespo.models.family import family_of, shape_of
from megatron_vespo.models.hf_config import read_hf_config
from megatron_vespo.models.stage import Stage
from megatron_vespo.models.table import ModelShape
from megatron_vespo.rollout.server_arguments import flag_value
from megatron_vespo.system.hardware import Gpu

MAX_RUNNING = 256  # requests per engine without --sglang-max-running-requests


@dataclass(frozen=True)
class Cluster:
    nodes: int
    gpus_per_node: int
    gpu: Gpu

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Plan:
    settings: TrainSettings
    cluster: Cluster
    engine_size: int
    shape: ModelShape
    parameters: int  # of the whole model
    stages: list[Stage]
    trainer: list[TrainerMemory]  # by pipeline stage
    host: HostMemory
    engine: EngineMemory
    lengths: Lengths
    beside: float  # bytes of the trainer on an engine's GPU, while it generates

    @cached_property
    def sync(self) -> WeightSync:
        """Planned on first access: takes a second. ValueError if the cluster is too small."""
        config = read_hf_config(self.settings.engines.hf_checkpoint)
        return weight_sync(
            self.settings,
            self.stages,
            family_of(config),
            shape_of(config, self.settings.trainer.padded_vocab_size),
            self.cluster.gpu,
            self.cluster.nodes,
            self.cluster.gpus_per_node,
        )

    @cached_property
    def speed(self) -> Speed:
        """Simulated on first access: takes a second."""
        cost = model_cost(
            self.shape,
            self.parameters,
            self.settings.trainer.moe_router_topk,
            2 if self.settings.trainer.bf16 else 4,
        )
        running = max_running(self.settings, self.engine, self.lengths)
        seconds = self.sync.seconds + self.turn_seconds
        rates = preset(cost, self.cluster.gpu, self.engine_size, seconds, running)
        return speed(self.settings, rates, self.lengths)

    @property
    def offload(self) -> bool:
        """Whether the trainer's weights and optimizer are in CPU memory while engines generate."""
        return self.trainer[0].offload

    @property
    def trainer_moved(self) -> float:
        """Bytes that the fullest rank offloads before engines generate."""
        return max(memory.weights + memory.optimizer for memory in self.trainer) if self.offload else 0.0

    @property
    def turn_seconds(self) -> float:
        """Seconds to offload and to onload."""
        return 2 * self.trainer_moved / self.cluster.gpu.host_link

    @property
    def gpus_needed(self) -> int:
        ranks, engines = self.settings.trainer.trainer_ranks, self.settings.engines.rollout_engines
        of_engines = engines * self.engine_size * (not self.settings.sync.colocate)
        return ranks + of_engines + sum(self.teacher_sizes)

    @property
    def teacher_sizes(self) -> list[int]:
        """GPUs of each teacher engine."""
        distillation = self.settings.distillation
        return [distillation.engine_size(self.engine_size)] * distillation.num_engines

    def headroom(self, index: int) -> float:
        """Bytes left on a rank of stage `index`."""
        return self.cluster.gpu.memory - self.trainer[index].total

    @property
    def tightest(self) -> int:
        """The stage with the least headroom."""
        return min(range(len(self.stages)), key=self.headroom)

    @property
    def longest(self) -> int:
        """Most tokens of a request."""
        return self.settings.rollout.max_prompt_tokens + self.settings.rollout.max_completion_tokens

    @property
    def requests_per_engine(self) -> int:
        """Requests of one rollout batch per engine."""
        return -(
            -self.settings.rollout.rollout_batch_size
            * self.settings.rollout.group_size
            // self.settings.engines.rollout_engines
        )


def make_plan(
    settings: TrainSettings, stages: list[Stage], cluster: Cluster, engine_size: int, lengths: Lengths
) -> Plan:
    """`stages` are Megatron's. AssertionError if their parameters do not add up to the HF checkpoint's."""
    shape, parameters = model_of(settings)
    built = sum(stage.whole for stage in stages)
    padding = (
        settings.trainer.padded_vocab_size - settings.trainer.vocab_size
    ) * settings.trainer.hidden_size
    padding *= 1 if shape.tied_embeddings else 2
    assert built == parameters + padding, f"{built} parameters were built, the checkpoint has {parameters}"
    trainer = memory_of(settings, stages)
    beside = max(memory.at_rest for memory in trainer) if settings.sync.colocate else 0.0
    return Plan(
        settings=settings,
        cluster=cluster,
        engine_size=engine_size,
        shape=shape,
        parameters=parameters,
        stages=stages,
        trainer=trainer,
        host=host_memory(settings, stages, trainer, lengths.sample, cluster.gpus_per_node),
        engine=engine_memory(
            settings, shape, _engine_weights(settings, parameters), cluster.gpu, engine_size, beside
        ),
        lengths=lengths,
        beside=beside,
    )


def _engine_weights(settings: TrainSettings, parameters: int) -> float:
    """Bytes of all ranks of an engine."""
    if settings.engines.rollout_quantization is None:
        return parameters * settings.trainer.params_dtype.itemsize
    return engine_bytes(hf_tensors_of(settings))


def hf_tensors_of(settings: TrainSettings) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the HF checkpoint, from its config.json."""
    config = read_hf_config(settings.engines.hf_checkpoint)
    return family_of(config).hf_tensors(shape_of(config))


def memory_of(settings: TrainSettings, stages: list[Stage]) -> list[TrainerMemory]:
    return [trainer_memory(settings, stage, index) for index, stage in enumerate(stages)]


def model_of(settings: TrainSettings) -> tuple[ModelShape, int]:
    """The shape and the number of trained parameters of the HF checkpoint, from its config.json."""
    config = read_hf_config(settings.engines.hf_checkpoint)
    family, shape = family_of(config), shape_of(config)
    fixed = family.fixed_tensors(shape)
    trained = (size for name, size in family.hf_tensors(shape).items() if name not in fixed)
    return shape, sum(math.prod(dimensions) for dimensions in trained)


def max_running(settings: TrainSettings, engine: EngineMemory, lengths: Lengths) -> int:
    """Requests that an engine runs at once: its limit, or as many mean requests as its cache holds."""
    given = flag_value(settings.engines.sglang_flags, "--max-running-requests")
    limit = MAX_RUNNING if given is None else int(given)
    return max(min(limit, int(engine.tokens // lengths.sample)), 1)
