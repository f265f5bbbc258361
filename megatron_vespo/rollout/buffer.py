"""Holds the groups of asynchronous generation, and decides which step may train on them. No I/O.

A policy version is a number of optimizer steps: step t trains version t and makes version t + 1. A rollout
batch of `batch_size` groups is trained in `steps_per_rollout` optimizer steps, so every step trains on
G = batch_size / steps_per_rollout groups. A group's version u is that of its oldest token. If step t trains
on it, its total lag is

    t - u = (first step of its rollout batch - u) + (index of the step in the batch)
          = asynchronous lag                      + what a synchronous run has too

The total lag is bounded: t - u <= max_staleness. So u + max_staleness is the group's last step.

Every step has places for G groups. Filling them by the earliest last step is optimal: the j-th oldest group
goes to step next_step + j // G. If that is after its last step, it is too old for any place.

`room` is how many new groups may be dispatched. While engines serve version w, a new group is not older than
w, so its last step is w + max_staleness or later. All groups held must fit into the steps up to that one;
any more would certainly be wasted. A whole batch of fresh groups fits if
next_step - w + steps_per_rollout - 1 <= max_staleness when the training loop waits for the batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field

from megatron_vespo.types import Completion, Prompt

Group = list[Completion]
PartialCompletions = list[Completion | None]  # of a group; None: no token yet


@dataclass(frozen=True)
class InFlightGroup:
    """One attempt at generating the group of one prompt.

    Example, the second attempt for the run's 18th prompt, while the engines serve version 12:
        InFlightGroup(number=31, serial=17, prompt=..., attempts=2, version=12, partials=[None, None])
    """

    number: int  # of the attempt, among all attempts of this buffer, from 0
    serial: int  # place of the prompt among those that the run takes; the same in every attempt
    prompt: Prompt
    attempts: int  # for this prompt, this one included
    version: int  # lower bound of its tokens' versions: the version at the dispatch, or of an older partial
    partials: PartialCompletions = field(compare=False)  # as far as they have been generated


@dataclass(frozen=True)
class PendingGroup:
    """A prompt that is not trained on yet. In a finished group all `partials` are complete and scored."""

    serial: int
    prompt: Prompt
    attempts: int  # failed ones so far
    partials: PartialCompletions  # to continue from

    @property
    def is_finished(self) -> bool:
        return bool(self.partials) and all(
            completion and completion.reward is not None for completion in self.partials
        )


@dataclass
class Counts:
    """Groups since the start. Every prompt taken ends as exactly one of trained, left_out, stale_dropped and
    given_up."""

    taken: int = 0  # prompts
    dispatched: int = 0
    trained: int = 0
    left_out: int = 0  # finished, but without reward variance
    stale_dropped: int = 0  # finished, but too old for every step
    stale_requeued: int = 0  # the same, but the prompt is generated again
    expired: int = 0  # too old before they finished
    failed: int = 0  # because of a failed request
    given_up: int = 0  # prompts after their last attempt


def oldest_version(completions: Iterable[Completion]) -> int:
    return min(completion.policy_versions.oldest for completion in completions)


class RolloutBuffer:
    """Groups that wait, are in flight or have finished.

    Args:
        next_prompt: gives a new prompt.
        batch_size: groups per rollout batch.
        steps_per_rollout: optimizer steps per rollout batch; divides batch_size.
        max_staleness: bound of the total lag, in optimizer steps.
        requeue: whether prompts of finished groups that are too old are generated again, or dropped.
        max_attempts: how often the group of one prompt may be generated.
        policy_version: the version that the engines serve; also the first optimizer step of the next batch.
        serial: of the first new prompt.
        max_held: bound of the groups in flight and finished; None: only max_staleness bounds them.
        has_reward_variance: a finished group without it is left out, and another one fills the batch.
        max_left_out: how many groups may be left out before a batch is complete.
    """

    def __init__(
        self,
        next_prompt: Callable[[], Prompt],
        *,
        batch_size: int,
        steps_per_rollout: int,
        max_staleness: int,
        requeue: bool,
        max_attempts: int,
        policy_version: int = 0,
        serial: int = 0,
        max_held: int | None = None,
        has_reward_variance: Callable[[Group], bool] = lambda group: True,
        max_left_out: int = 0,
    ):
        assert batch_size % steps_per_rollout == 0, (batch_size, steps_per_rollout)
        self._next_prompt = next_prompt
        self._batch_size, self._steps_per_rollout = batch_size, steps_per_rollout
        self._step_size = batch_size // steps_per_rollout
        self._max_staleness = max_staleness
        self._requeue, self._max_attempts = requeue, max_attempts
        self._max_held, self._max_left_out = max_held, max_left_out
        self._has_reward_variance = has_reward_variance
        self.policy_version = policy_version  # served by the engines
        self.next_step = policy_version  # first step of the next batch
        self.counts = Counts()
        self._next_serial = serial
        self._left_out_of_batch = 0
        self._waiting: deque[PendingGroup] = deque()
        self._in_flight: dict[int, InFlightGroup] = {}
        self._finished: list[tuple[int, InFlightGroup, Group]] = []  # version first

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def num_finished(self) -> int:
        return len(self._finished)

    def room(self) -> int:
        """How many groups may be dispatched now."""
        num_steps = self.policy_version + self._max_staleness - self.next_step + 1
        places = num_steps * self._step_size
        if self._max_held is not None:
            places = min(places, self._max_held)
        return max(places - self.num_in_flight - self.num_finished, 0)

    def dispatch(self) -> InFlightGroup:
        """Puts a group in flight: of a prompt that waits for another attempt, otherwise of a new one."""
        assert self.room() > 0, "nothing may be dispatched"
        if self._waiting:
            pending = self._waiting.popleft()
        else:
            pending = PendingGroup(self._next_serial, self._next_prompt(), 0, [])
            self._next_serial += 1
            self.counts.taken += 1
        in_flight = self._next_attempt(pending)
        self._in_flight[in_flight.number] = in_flight
        return in_flight

    def finish(self, in_flight: InFlightGroup, group: Group) -> None:
        """The group is complete and scored."""
        del self._in_flight[in_flight.number]
        version = oldest_version(group)
        assert version >= in_flight.version, f"{in_flight} has a token of version {version}"
        if self._left_out_of_batch < self._max_left_out and not self._has_reward_variance(group):
            self._left_out_of_batch += 1
            self.counts.left_out += 1
        else:
            self._finished.append((version, in_flight, group))

    def fail(self, in_flight: InFlightGroup) -> bool:
        """A request of the group has failed; its partials are kept. False if the prompt is given up."""
        del self._in_flight[in_flight.number]
        self.counts.failed += 1
        return self._again(in_flight, in_flight.partials)

    def weights_synced(self, policy_version: int) -> None:
        """The engines serve `policy_version` from now on."""
        assert policy_version >= self.policy_version, f"{policy_version} after {self.policy_version}"
        self.policy_version = policy_version

    def expire(self) -> list[InFlightGroup]:
        """Removes groups in flight that are too old for the next batch; the caller cancels their requests.

        A group in flight has the version of its dispatch, not of its first token. So this may also remove a
        group that waited in an engine during a weight sync.
        """
        late = [g for g in self._in_flight.values() if g.version + self._max_staleness < self.next_step]
        for in_flight in late:
            del self._in_flight[in_flight.number]
            self.counts.expired += 1
            self._again(in_flight, [])
        return late

    def take(self) -> list[Group] | None:
        """A rollout batch, oldest groups first, in the order of its steps; None if too few have finished."""
        self._drop_stale()
        if len(self._finished) < self._batch_size:
            return None
        batch, self._finished = self._finished[: self._batch_size], self._finished[self._batch_size :]
        self.counts.trained += self._batch_size
        self.next_step += self._steps_per_rollout
        self._left_out_of_batch = 0
        return [group for _, _, group in batch]

    def pending(self) -> list[PendingGroup]:
        """Prompts taken but not yet trained on, left out, dropped or given up, in the order of attempts.

        A group in flight continues from here, so its attempt has not failed and is not counted.
        """
        held = [(g.number, PendingGroup(g.serial, g.prompt, g.attempts - 1, list(g.partials)))
                for g in self._in_flight.values()]  # fmt: skip
        held += [
            (g.number, PendingGroup(g.serial, g.prompt, g.attempts - 1, list(group)))
            for _, g, group in self._finished
        ]
        return [pending for _, pending in sorted(held, key=lambda entry: entry[0])] + list(self._waiting)

    def restore(self, all_pending: Iterable[PendingGroup]) -> None:
        """Takes over the pending groups of a checkpoint: finished ones stay finished, the others wait."""
        for pending in all_pending:
            self.counts.taken += 1
            if pending.is_finished:
                in_flight = self._next_attempt(pending)
                group = [completion for completion in pending.partials if completion is not None]
                self._finished.append((in_flight.version, in_flight, group))
            else:
                self._waiting.append(pending)

    def metrics(self) -> dict[str, float]:
        counts = {f"staleness/{name}_groups": float(value) for name, value in asdict(self.counts).items()}
        del counts["staleness/taken_groups"]
        return counts | {
            "staleness/in_flight_groups": float(self.num_in_flight),
            "staleness/finished_groups": float(self.num_finished),
        }

    def _next_attempt(self, pending: PendingGroup) -> InFlightGroup:
        begun = [partial for partial in pending.partials if partial is not None]
        version = min(self.policy_version, oldest_version(begun)) if begun else self.policy_version
        in_flight = InFlightGroup(
            self.counts.dispatched, pending.serial, pending.prompt, pending.attempts + 1, version,
            pending.partials,
        )  # fmt: skip
        self.counts.dispatched += 1
        return in_flight

    def _drop_stale(self) -> None:
        self._finished.sort(key=lambda entry: (entry[0], entry[1].number))
        kept: list[tuple[int, InFlightGroup, Group]] = []
        for entry in self._finished:
            if self.next_step + len(kept) // self._step_size - entry[0] <= self._max_staleness:
                kept.append(entry)
            elif not self._requeue:
                self.counts.stale_dropped += 1
            elif self._again(entry[1], []):
                self.counts.stale_requeued += 1
        self._finished = kept

    def _again(self, in_flight: InFlightGroup, partials: PartialCompletions) -> bool:
        if in_flight.attempts >= self._max_attempts:
            self.counts.given_up += 1
            return False
        self._waiting.append(PendingGroup(in_flight.serial, in_flight.prompt, in_flight.attempts, partials))
        return True
