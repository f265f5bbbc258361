"""How long things take: seconds of calls, tokens a second of engines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from megatron_vespo.system.hardware import GPUS, Gpu


@dataclass(frozen=True)
class Cost:
    """Seconds of a call: fixed + each * its tokens, or whatever it works on; `first` more the first time."""

    fixed: float = 0.0
    each: float = 0.0
    first: float = 0.0

    def seconds(self, number: float) -> float:
        return self.fixed + self.each * number


@dataclass(frozen=True)
class EngineRates:
    """One engine with r running requests makes a token of each in `decode.seconds(r)`.

    Prompts, and what a request had made before it was interrupted, go in at `prefill` tokens a second, and
    nothing is decoded meanwhile. Requests beyond `max_running` wait inside the engine.
    """

    decode: Cost
    prefill: float
    max_running: int = 512

    def tokens_per_second(self, running: int) -> float:
        return running / self.decode.seconds(running)


@dataclass(frozen=True)
class SharedCores:
    """A machine without GPUs: trainer and engines take their cores from the same few.

    When more are wanted than there are, everyone gets the same share of what it wants. The costs are those
    of each side alone, so what it got then is what its speed is relative to.
    """

    cores: float
    trainer: float  # busy cores of all trainer ranks, were there enough
    engine: float  # of one engine

    def speeds(self, trainer_works: bool, engines_working: int) -> tuple[float, float]:
        """Of trainer and engines, 1 where the other side rests."""
        engines = self.engine * engines_working
        share = self._share((self.trainer if trainer_works else 0.0) + engines)
        return share / self._share(self.trainer), share / self._share(engines)

    def _share(self, wanted: float) -> float:
        return min(1.0, self.cores / wanted) if wanted else 1.0


@dataclass(frozen=True)
class Rates:
    """What the calls of the controller cost, by the names of its phases."""

    engine: EngineRates
    log_probs: Cost = Cost()  # of a rollout batch: prompt and response tokens
    train: Cost = Cost()  # of an optimizer step: the same
    sync: Cost = Cost()
    save: Cost = Cost()
    reward: Cost = Cost()  # of a rollout batch: completions
    other: Cost = Cost()  # of a rollout batch: whatever lies between the phases
    shared: SharedCores | None = None


@dataclass(frozen=True)
class Preset:
    """Rates of a kind of hardware and a model, for any number of GPUs. Tokens a second are of one GPU."""

    train: float
    log_probs: float
    decode: Cost  # of an engine
    prefill: float  # of an engine
    sync: float
    save: float
    gpus_per_engine: int
    max_running: int
    source: str = field(default="", compare=False)

    def rates(self, trainer_gpus: int) -> Rates:
        return Rates(
            engine=EngineRates(self.decode, self.prefill, self.max_running),
            log_probs=Cost(each=1 / (self.log_probs * trainer_gpus)),
            train=Cost(each=1 / (self.train * trainer_gpus)),
            sync=Cost(self.sync),
            save=Cost(self.save),
        )


@dataclass(frozen=True)
class ModelCost:
    """What a model's speed depends on."""

    parameters: float
    active: float  # that a token meets
    cache_bytes: float  # keys and values of a token

    @property
    def weight_bytes(self) -> float:
        return 2 * self.parameters


# of the most that a GPU can: 133 of 989.4 TFLOP/s are what Megatron reaches untuned (tuned: 299)
TRAINING_EFFICIENCY = 133 / 989.4
MEMORY_EFFICIENCY = 0.5
CACHED_TOKENS = 2048  # of a request, while it runs, in the mean
QWEN3_30B_A3B = ModelCost(30.53e9, 3.3e9, 48 * 4 * 128 * 2 * 2)  # layers x heads x width x (K, V) x bytes


def derived(gpu: Gpu, model: ModelCost, gpus_per_engine: int) -> Preset:
    """A model in bf16 on a kind of GPU: derived, not measured.

    Training is 6 FLOP an active parameter and token at TRAINING_EFFICIENCY, a third of it for the log-prob
    pass. A decode step reads all weights once, and of each request the keys and values of CACHED_TOKENS, at
    MEMORY_EFFICIENCY. Prefill is 2 FLOP a parameter and token at the efficiency of training. Published weight
    syncs of 30 B parameters between GPUs of their own take 0.7 to 7 s: 2.5. A checkpoint is 14 bytes a
    parameter at 20 GB/s.
    """
    flops, bandwidth = (
        TRAINING_EFFICIENCY * gpu.flops,
        MEMORY_EFFICIENCY * gpus_per_engine * gpu.memory_bandwidth,
    )
    train = flops / (6 * model.active)
    return Preset(
        train=train,
        log_probs=3 * train,
        decode=Cost(model.weight_bytes / bandwidth, CACHED_TOKENS * model.cache_bytes / bandwidth),
        prefill=gpus_per_engine * flops / (2 * model.active),
        sync=2.5,
        save=model.parameters * 14 / 20e9,
        gpus_per_engine=gpus_per_engine,
        max_running=256,
    )


def _h100() -> Preset:
    source = "Qwen3-30B-A3B on H100: 133 TFLOP/s a GPU, half the memory bandwidth"
    return replace(derived(GPUS["h100"], QWEN3_30B_A3B, 2), source=source)


PRESETS: dict[str, Callable[[], Preset]] = {"h100": _h100}
