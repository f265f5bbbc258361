"""Simulates generation in the background. The real buffer decides what to dispatch, cancel and train on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from megatron_vespo.commands.simulate.engine import Request
from megatron_vespo.commands.simulate.lengths import Lengths
from megatron_vespo.commands.simulate.pool import Pool
from megatron_vespo.rollout.buffer import Group, InFlightGroup, RolloutBuffer
from megatron_vespo.types import Completion, VersionSpans


@dataclass(slots=True)
class _Draws:
    """The requests of one group in flight."""

    stream: Stream
    in_flight: InFlightGroup
    requests: list[Request] = field(default_factory=list)
    num_done: int = 0

    def done(self, request: Request) -> None:
        self.num_done += 1
        self.stream.done(self, request)

    def lost(self, request: Request) -> None:
        self.stream.fail(self)


class Stream:
    """AsyncCollector in virtual time: keeps as many groups in flight as the buffer has room for.

    `lost_share` of the requests fail when they end. Completions have the versions of their first and last
    token only, and the number of their tokens, not the tokens.
    """

    def __init__(
        self,
        pool: Pool,
        buffer: RolloutBuffer,
        lengths: Lengths,
        random: np.random.Generator,
        *,
        batch_size: int,
        step_size: int,
        max_staleness: int,
        num_completions: int,
        lost_share: float,
    ):
        self.buffer = buffer
        self._pool, self._lengths, self._random = pool, lengths, random
        self._batch_size, self._step_size, self._max_staleness = batch_size, step_size, max_staleness
        self._num_completions, self._lost_share = num_completions, lost_share
        self._draws: dict[int, _Draws] = {}
        self._doomed: set[Request] = set()
        self._on_change: Callable[[], None] | None = None
        self._expired_at = buffer.next_step
        self._versions: Counter[int] | None = Counter()  # of finished groups; None: unknown

    def fill(self) -> None:
        """Cancels groups that have become too old, then dispatches as many as there is room for."""
        if self.buffer.next_step != self._expired_at:  # groups become too old in no other way
            self._expired_at = self.buffer.next_step
            for in_flight in self.buffer.expire():
                self._cancel(self._draws.pop(in_flight.number))
        for _ in range(self.buffer.room()):
            self._dispatch(self.buffer.dispatch())

    def take(self) -> list[Group] | None:
        before = self.buffer.num_finished
        batch = self.buffer.take()
        taken = 0 if batch is None else len(batch)
        if self._versions is not None:
            if before - taken != self.buffer.num_finished:
                self._versions = None  # some were too old
            else:
                self._versions -= Counter(_oldest(group) for group in batch or ())
        if self.buffer.num_finished == 0:
            self._versions = Counter()
        return batch

    def when_changed(self, action: Callable[[], None]) -> None:
        """Calls `action` once, as soon as `take` may have a new effect."""
        self._on_change = action

    def _may_take(self) -> bool:
        """False if `take` would neither find a batch nor drop a group; it is slow, as it sorts all groups."""
        num = self.buffer.num_finished
        if num >= self._batch_size or self._versions is None:
            return True
        place = 0  # the oldest groups go into the first steps
        for version in sorted(self._versions):
            place += self._versions[version]
            if self.buffer.next_step + (place - 1) // self._step_size - version > self._max_staleness:
                return True
        return False

    def _dispatch(self, in_flight: InFlightGroup) -> None:
        prompt = in_flight.prompt
        lengths = self._lengths.responses(self._random, prompt.metadata["common"], self._num_completions)
        draws = self._draws[in_flight.number] = _Draws(self, in_flight)
        draws.requests = [Request(draws, len(prompt.token_ids), tokens) for tokens in lengths]
        if self._lost_share:
            lost_now = self._random.random(len(lengths)) < self._lost_share
            self._doomed |= {r for r, doomed in zip(draws.requests, lost_now, strict=True) if doomed}
        for request in draws.requests:
            self._pool.submit(request)

    def done(self, draws: _Draws, request: Request) -> None:
        if request in self._doomed:
            self.fail(draws)
        elif draws.num_done == len(draws.requests):
            del self._draws[draws.in_flight.number]
            group = [_completion(draws.in_flight, request) for request in draws.requests]
            if self._versions is not None:
                self._versions[_oldest(group)] += 1
            draws.requests = []  # no cycle: see simulate
            self.buffer.finish(draws.in_flight, group)
            self._changed()

    def fail(self, draws: _Draws) -> None:
        del self._draws[draws.in_flight.number]
        self._cancel(draws)
        self.buffer.fail(draws.in_flight)
        self._changed()

    def _cancel(self, draws: _Draws) -> None:
        for request in draws.requests:
            self._doomed.discard(request)
            self._pool.cancel(request)
        draws.requests = []

    def _changed(self) -> None:
        self.fill()
        if self._on_change is not None and self._may_take():
            action, self._on_change = self._on_change, None
            action()


def _completion(in_flight: InFlightGroup, request: Request) -> Completion:
    assert request.first_version is not None, "its tokens are made"
    versions = VersionSpans.of([request.first_version, request.last_version])
    tokens = stand_in(request.tokens)
    return Completion(in_flight.prompt, tokens, np.empty(0, np.float32), versions, None, "stop", 1.0)


def stand_in(length: int) -> np.ndarray:
    """Return token ids of this length that take no memory."""
    return np.broadcast_to(np.int32(0), length)


def _oldest(group: Group) -> int:
    return min(completion.policy_versions.versions[0] for completion in group)
