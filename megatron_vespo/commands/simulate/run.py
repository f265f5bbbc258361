"""Simulates the controller's loop in virtual time, with the controller's own names."""

from __future__ import annotations

import gc
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np

from megatron_vespo.commands.simulate.clock import Clock, Work
from megatron_vespo.commands.simulate.engine import Engine, Request
from megatron_vespo.commands.simulate.lengths import Lengths
from megatron_vespo.commands.simulate.pool import Pool
from megatron_vespo.commands.simulate.rates import Rates
from megatron_vespo.commands.simulate.result import Batch, Result
from megatron_vespo.commands.simulate.stream import Stream, stand_in
from megatron_vespo.rollout.buffer import Group, RolloutBuffer
from megatron_vespo.types import Prompt

BATCH_TIMEOUT_S = 7 * 86400.0  # of virtual time
MAX_REQUESTS_PER_ENGINE = 512  # as in Collector
TRAINING = ("log-probs", "train")  # phases in which the trainer computes


@dataclass(frozen=True)
class Settings:
    """Flags of `megatron-vespo train`, and rates of failures. `max_staleness` 0 is synchronous."""

    train_steps: int
    steps_per_rollout: int
    rollout_batch_size: int
    group_size: int
    num_engines: int
    max_staleness: int = 0
    sync_interval: int | None = None
    on_weight_update: str = "retract"  # or "in-place" or "abort"
    requeue: bool = True
    max_attempts: int = 3
    over_subscription: float | None = None  # rollout batches in flight or waiting, at most
    save_interval: int | None = None
    eval_prompts: int = 0
    eval_interval: int = 1
    failures_per_hour: float = 0.0  # of one engine
    recovery_seconds: float = 60.0
    lost_share: float = 0.0  # of the requests
    seed: int = 1

    @property
    def max_held(self) -> int | None:
        factor = self.over_subscription
        return None if factor is None else int(factor * self.rollout_batch_size)

    @property
    def bound(self) -> int:
        """Bound of the total lag. In a synchronous run the lag is the index of the mini-batch."""
        return self.max_staleness or self.steps_per_rollout - 1


def simulate(settings: Settings, rates: Rates, lengths: Lengths) -> Result:
    """One run; the same seed gives the same result."""
    collecting = gc.isenabled()
    gc.disable()  # it would take half of the time, and frees nothing among half a million requests
    try:
        return _Run(settings, rates, lengths).run()
    finally:
        if collecting:
            gc.enable()


class _Run:
    def __init__(self, settings: Settings, rates: Rates, lengths: Lengths):
        self._settings, self._rates, self._lengths = settings, rates, lengths
        self._clock = Clock()
        self._random, self._failures = np.random.default_rng(settings.seed).spawn(2)
        self._pool = Pool(
            self._clock, rates.engine, settings.num_engines, settings.num_engines * MAX_REQUESTS_PER_ENGINE,
            self._share_cores if rates.shared else None,
        )  # fmt: skip
        self._numbers = count()
        self._buffer = RolloutBuffer(
            self._next_prompt,
            batch_size=settings.rollout_batch_size, steps_per_rollout=settings.steps_per_rollout,
            max_staleness=settings.bound, requeue=settings.requeue, max_attempts=settings.max_attempts,
            max_held=settings.max_held,
        )  # fmt: skip
        self._stream = Stream(
            self._pool, self._buffer, lengths, self._random,
            batch_size=settings.rollout_batch_size,
            step_size=settings.rollout_batch_size // settings.steps_per_rollout,
            max_staleness=settings.bound, num_completions=settings.group_size,
            lost_share=settings.lost_share,
        )  # fmt: skip
        self._work = Work(self._clock)
        self._streaming = self._training = self._ended = self._timed_out = False
        self._step = self._served = self._left_to_evaluate = 0
        self._calls: set[str] = set()  # phases seen so far: the first one of each costs more
        self._phases: list[tuple[str, float, float]] = []
        self._batches: list[Batch] = []
        self._loop = self._train()

    def run(self) -> Result:
        if self._settings.failures_per_hour > 0:
            for engine in self._pool.engines:
                self._plan_failure(engine)
        self._clock.at(0.0, self._go_on)
        self._clock.run(lambda: self._ended or self._timed_out)
        if self._timed_out:
            raise RuntimeError(
                f"no rollout batch within a simulated week, after {len(self._batches)}: groups fail or get "
                "too old faster than they finish"
            )
        for engine in self._pool.engines:
            engine.pause()  # ends the current work
        return Result(
            batches=self._batches,
            phases=self._phases,
            engines_busy=[engine.busy for engine in self._pool.engines],
            tokens_generated=sum(engine.tokens_made for engine in self._pool.engines),
            seconds=self._clock.now,
            steps_per_rollout=self._settings.steps_per_rollout,
            bound=self._settings.bound,
            counts=self._buffer.counts,
            pending=[pending.prompt.prompt_id for pending in self._buffer.pending()],
        )

    # The following methods are generators: they yield where time passes.

    def _train(self) -> Iterator[None]:
        settings = self._settings
        yield from self._sync()
        yield from self._evaluate()
        if settings.max_staleness:
            self._streaming = True
            self._stream.fill()
        while self._step < settings.train_steps:
            groups = yield from self._take()
            if not settings.max_staleness:  # otherwise scored in the background, as groups finish
                yield from self._phase("reward", len(groups) * settings.group_size)
            yield from self._update(groups)
            if (self._step // settings.steps_per_rollout) % settings.eval_interval == 0 or self._is_last():
                yield from self._evaluate()
            before = self._step - settings.steps_per_rollout
            interval = settings.save_interval
            if interval and (self._step // interval > before // interval or self._is_last()):
                yield from self._phase("save")
            yield from self._phase("other")
            self._batches[-1].end = self._clock.now
        self._ended = True

    def _is_last(self) -> bool:
        return self._step >= self._settings.train_steps

    def _take(self) -> Generator[None, None, list[Group]]:
        """The next rollout batch. Engines already generate for it, or begin now."""
        started = self._clock.now
        self._stream.fill()
        number = len(self._batches)
        self._clock.at(started + BATCH_TIMEOUT_S, lambda: self._check_timeout(number))
        while (groups := self._stream.take()) is None:
            self._stream.fill()  # dropped stale groups have left room
            self._stream.when_changed(lambda: self._clock.at(self._clock.now, self._go_on))
            yield
        self._stream.fill()
        self._phases.append(("generate", started, self._clock.now))
        settings = self._settings
        self._batches.append(Batch.of(groups, self._step, settings.steps_per_rollout, settings.bound))
        return groups

    def _update(self, groups: list[Group]) -> Iterator[None]:
        settings = self._settings
        size = len(groups) // settings.steps_per_rollout
        tokens = [
            sum(len(c.token_ids) + len(c.prompt.token_ids) for group in groups[i : i + size] for c in group)
            for i in range(0, len(groups), size)
        ]
        yield from self._phase("log-probs", sum(tokens))
        for number in tokens:
            yield from self._phase("train", number)
            self._step += 1
            interval = settings.sync_interval or settings.steps_per_rollout
            if self._step - self._served >= interval or self._is_last():
                yield from self._sync()

    def _sync(self) -> Iterator[None]:
        """A weight sync: engines pause, then their requests continue with the new weights."""
        self._pool.pause()
        aborted = self._pool.interrupt() if self._settings.on_weight_update == "abort" else []
        yield from self._phase("sync")
        self._served = self._step
        self._pool.resume(self._step, recompute=self._settings.on_weight_update == "retract")
        for request in aborted:
            self._pool.submit(request)
        self._buffer.weights_synced(self._step)
        if self._streaming:
            self._stream.fill()

    def _evaluate(self) -> Iterator[None]:
        """Generates one completion of every held-out prompt."""
        started, number = self._clock.now, self._settings.eval_prompts
        if not number:
            return
        self._left_to_evaluate = number
        for _ in range(number):
            prompt = self._next_prompt()
            tokens = self._lengths.responses(self._random, prompt.metadata["common"], 1)[0]
            self._pool.submit(Request(self, len(prompt.token_ids), tokens))
        yield
        self._phases.append(("evaluate", started, self._clock.now))

    def _phase(self, name: str, number: float = 0.0) -> Iterator[None]:
        cost = getattr(self._rates, name.replace("-", "_"))
        seconds = cost.seconds(number) + (0.0 if name in self._calls else cost.first)
        self._calls.add(name)
        if seconds == 0.0:
            return
        started = self._clock.now
        if name in TRAINING:
            self._set_training(True)
            self._work.start(seconds, self._go_on)
        else:
            self._clock.at(started + seconds, self._go_on)
        yield
        self._set_training(False)
        self._phases.append((name, started, self._clock.now))

    # Everything but the trainer.

    def done(self, request: Request) -> None:
        """Called for a held-out prompt's request."""
        self._left_to_evaluate -= 1
        if not self._left_to_evaluate:
            self._clock.at(self._clock.now, self._go_on)

    def lost(self, request: Request) -> None:
        self._pool.submit(request)

    def _next_prompt(self) -> Prompt:
        tokens, common = self._lengths.prompt(self._random)
        return Prompt(next(self._numbers), stand_in(tokens), "", "", {"common": common})

    def _go_on(self) -> None:
        next(self._loop, None)

    def _check_timeout(self, number: int) -> None:
        self._timed_out = self._timed_out or len(self._batches) == number and not self._ended

    def _set_training(self, training: bool) -> None:
        self._training = training
        if self._rates.shared:
            self._share_cores()

    def _share_cores(self) -> None:
        working = sum(engine.works for engine in self._pool.engines)
        trainer, engines = self._rates.shared.speeds(self._training, working)  # pyright: ignore[reportOptionalMemberAccess]
        self._work.set_speed(trainer)
        for engine in self._pool.engines:
            engine.set_speed(engines)

    def _plan_failure(self, engine: Engine) -> None:
        hours = self._failures.exponential(1 / self._settings.failures_per_hour)

        def die() -> None:
            self._pool.set_up(engine, False)
            self._clock.at(self._clock.now + self._settings.recovery_seconds, come_back)

        def come_back() -> None:
            self._pool.set_up(engine, True)
            self._plan_failure(engine)

        self._clock.at(self._clock.now + hours * 3600, die)
