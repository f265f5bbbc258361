"""How long things take: seconds of calls, tokens a second of engines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


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


def _h100() -> Preset:
    """Qwen3-30B-A3B in bf16 on H100: 3.3 B parameters active, 61 GB, engines of two GPUs.

    Training at 133 TFLOP/s a GPU, what Megatron reaches untuned (tuned: 299), 6 FLOP a parameter and token,
    a third of it for the log-prob pass. A decode step reads all weights once, and of each request the keys
    and values of 2,048 tokens (48 layers x 4 heads x 128 x 2 tensors x 2 bytes a token), at half of
    2 x 3.35 TB/s: derived, not measured. Prefill: 2 FLOP a parameter and token at 2 x 133 TFLOP/s. Published
    weight syncs between GPUs of their own take 0.7 to 7 s: 2.5. A checkpoint: 30.5 B x 14 bytes at 20 GB/s.
    """
    flops, active, bandwidth = 133e12, 3.3e9, 0.5 * 2 * 3.35e12
    train = flops / (6 * active)
    return Preset(
        train=train,
        log_probs=3 * train,
        decode=Cost(61.06e9 / bandwidth, 2048 * 48 * 4 * 128 * 2 * 2 / bandwidth),
        prefill=2 * flops / (2 * active),
        sync=2.5,
        save=30.5e9 * 14 / 20e9,
        gpus_per_engine=2,
        max_running=256,
        source="Qwen3-30B-A3B on H100: 133 TFLOP/s a GPU, half the memory bandwidth",
    )


PRESETS: dict[str, Callable[[], Preset]] = {"h100": _h100}
