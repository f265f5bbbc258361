"""Rates of a simulated run: seconds of calls, tokens per second of engines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from megatron_vespo.system.hardware import GPUS, Gpu


@dataclass(frozen=True)
class Cost:
    """Seconds of a call: fixed + each * its tokens (or other units); the first call takes `first` more."""

    fixed: float = 0.0
    each: float = 0.0
    first: float = 0.0

    def seconds(self, number: float) -> float:
        return self.fixed + self.each * number


@dataclass(frozen=True)
class EngineRates:
    """One engine with r running requests makes one token of each in `decode.seconds(r)`.

    Prefill takes prompts, and what a request had made before it was interrupted, at `prefill` tokens per
    second; nothing is decoded meanwhile. Requests beyond `max_running` wait inside the engine.
    """

    decode: Cost
    prefill: float
    max_running: int = 512

    def tokens_per_second(self, running: int) -> float:
        return running / self.decode.seconds(running)


@dataclass(frozen=True)
class SharedCores:
    """A machine without GPUs: trainer and engines share its cores.

    If they want more cores than there are, each gets the same share of what it wants. The costs were measured
    with each side alone, so a speed is relative to the cores that the side got then.
    """

    cores: float
    trainer: float  # busy cores of all trainer ranks, if there are enough
    engine: float  # of one engine

    def speeds(self, trainer_works: bool, engines_working: int) -> tuple[float, float]:
        """Speeds of trainer and engines; 1 if the other side rests."""
        engines = self.engine * engines_working
        share = self._share((self.trainer if trainer_works else 0.0) + engines)
        return share / self._share(self.trainer), share / self._share(engines)

    def _share(self, wanted: float) -> float:
        return min(1.0, self.cores / wanted) if wanted else 1.0


@dataclass(frozen=True)
class Rates:
    """Costs of the controller's calls, by the names of its phases."""

    engine: EngineRates
    log_probs: Cost = Cost()  # of a rollout batch: prompt and response tokens
    train: Cost = Cost()  # of an optimizer step: prompt and response tokens
    sync: Cost = Cost()
    save: Cost = Cost()
    reward: Cost = Cost()  # of a rollout batch: completions
    other: Cost = Cost()  # of a rollout batch: the time between the phases
    shared: SharedCores | None = None


@dataclass(frozen=True)
class Preset:
    """Rates of a hardware and a model, for any number of GPUs. Tokens per second are per GPU."""

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
    """The sizes that a model's speed depends on."""

    parameters: float
    active: float  # parameters used per token
    cache_bytes: float  # keys and values per token

    @property
    def weight_bytes(self) -> float:
        return 2 * self.parameters


# share of a GPU's peak: untuned Megatron reaches 133 of 989.4 TFLOP/s (tuned: 299)
TRAINING_EFFICIENCY = 133 / 989.4
MEMORY_EFFICIENCY = 0.5
CACHED_TOKENS = 2048  # mean per request while it runs
QWEN3_30B_A3B = ModelCost(30.53e9, 3.3e9, 48 * 4 * 128 * 2 * 2)  # layers x heads x width x (K, V) x bytes


def derived(gpu: Gpu, model: ModelCost, gpus_per_engine: int) -> Preset:
    """Rates of a model in bf16 on a kind of GPU: derived, not measured.

    Training takes 6 FLOP per active parameter and token at TRAINING_EFFICIENCY, the log-prob pass a third of
    it. A decode step reads all weights once, and for each request the keys and values of CACHED_TOKENS, at
    MEMORY_EFFICIENCY. Prefill takes 2 FLOP per parameter and token at the efficiency of training. Published
    weight syncs of 30 B parameters between separate GPUs take 0.7 to 7 s; 2.5 is used. A checkpoint has 14
    bytes per parameter, at 20 GB/s.
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
