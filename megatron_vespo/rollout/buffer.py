"""The groups of asynchronous generation, in flight and finished, and which step may train on them. No I/O.

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
generating more would be in vain for certain. A whole batch of fresh groups fits if
next_step - w + steps_per_rollout - 1 <= max_staleness when the batch is waited for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field

from megatron_vespo.types import Completion, Prompt

Group = list[Completion]


@dataclass(frozen=True)
class Ticket:
    """One dispatch of one prompt.

    Example, the second dispatch of the prompt that was taken as the 18th of the run, while the engines serve
    version 12:
        Ticket(number=31, serial=17, prompt=..., dispatches=2, version=12, drafts=[None, None])
    """

    number: int  # of all dispatches, from 0
    serial: int  # place of this prompt in the order in which prompts are taken: whatever becomes of it
    prompt: Prompt
    dispatches: int  # of this prompt, this one included
    version: int  # served at the dispatch, or of an older draft: no token of it can be older
    drafts: list[Completion | None] = field(compare=False)  # what has been made of it by now


@dataclass(frozen=True)
class Pending:
    """A prompt that is not done with; for a finished group `drafts` is that group, with its rewards."""

    serial: int
    prompt: Prompt
    dispatches: int  # in vain so far
    drafts: list[Completion | None]  # to go on from

    @property
    def is_finished(self) -> bool:
        return bool(self.drafts) and all(draft and draft.reward is not None for draft in self.drafts)


@dataclass
class Counts:
    """Groups since the start. A prompt taken ends in exactly one of trained, left_out, stale_dropped and
    given_up."""

    taken: int = 0  # prompts
    dispatched: int = 0
    trained: int = 0
    left_out: int = 0  # finished, but they teach nothing
    stale_dropped: int = 0  # finished, but too old for every step
    stale_requeued: int = 0  # the same, and their prompts are generated once more
    expired: int = 0  # too old before they had finished
    failed: int = 0  # of a failed request
    given_up: int = 0  # prompts that were dispatched as often as allowed


def oldest_version(completions: Iterable[Completion]) -> int:
    return min(int(completion.policy_versions.min()) for completion in completions)


class RolloutBuffer:
    """Groups waiting, in flight and finished. `next_prompt` gives a new prompt, `requeue` says whether those
    of finished groups that are too old are generated again, `max_dispatches` how often one prompt may be,
    `serial` is that of the first new prompt.

    At most `max_held` groups are in flight or finished at a time. A finished group for which `teaches` is
    false is left out, `max_left_out` of them before a batch is complete, and further ones fill it then.
    """

    def __init__(
        self,
        next_prompt: Callable[[], Prompt],
        *,
        batch_size: int,
        steps_per_rollout: int,
        max_staleness: int,
        requeue: bool,
        max_dispatches: int,
        version: int = 0,
        serial: int = 0,
        max_held: int | None = None,
        teaches: Callable[[Group], bool] = lambda group: True,
        max_left_out: int = 0,
    ):
        assert batch_size % steps_per_rollout == 0, (batch_size, steps_per_rollout)
        self._next_prompt = next_prompt
        self._batch_size, self._mini_batches = batch_size, steps_per_rollout
        self._step_size = batch_size // steps_per_rollout
        self._max_staleness = max_staleness
        self._requeue, self._max_dispatches = requeue, max_dispatches
        self._max_held, self._teaches, self._max_left_out = max_held, teaches, max_left_out
        self.policy_version = version  # of the engines
        self.next_step = version  # the first that the next batch trains
        self.counts = Counts()
        self._next_serial = serial
        self._left_out_of_batch = 0
        self._waiting: deque[Pending] = deque()
        self._in_flight: dict[int, Ticket] = {}
        self._finished: list[tuple[int, Ticket, Group]] = []  # version first

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

    def dispatch(self) -> Ticket:
        """The next prompt is in flight from now on: one to be generated again before a new one."""
        assert self.room() > 0, "nothing may be dispatched"
        if self._waiting:
            pending = self._waiting.popleft()
        else:
            pending = Pending(self._next_serial, self._next_prompt(), 0, [])
            self._next_serial += 1
            self.counts.taken += 1
        ticket = self._ticket(pending)
        self._in_flight[ticket.number] = ticket
        return ticket

    def finish(self, ticket: Ticket, group: Group) -> None:
        del self._in_flight[ticket.number]
        version = oldest_version(group)
        assert version >= ticket.version, f"{ticket} has a token of version {version}"
        if self._left_out_of_batch < self._max_left_out and not self._teaches(group):
            self._left_out_of_batch += 1
            self.counts.left_out += 1
        else:
            self._finished.append((version, ticket, group))

    def fail(self, ticket: Ticket) -> bool:
        """A request of the group failed, what it has come to is kept; False if its prompt is given up."""
        del self._in_flight[ticket.number]
        self.counts.failed += 1
        return self._again(ticket, ticket.drafts)

    def serve(self, version: int) -> None:
        """The engines serve another policy."""
        assert version >= self.policy_version, f"version {version} after {self.policy_version}"
        self.policy_version = version

    def expire(self) -> list[Ticket]:
        """Takes out what is in flight and too old for the next batch; its requests are to be cancelled.

        A ticket knows when it was dispatched, not when its first token was made: this may take out a group
        that waited in an engine over a weight sync.
        """
        late = [t for t in self._in_flight.values() if t.version + self._max_staleness < self.next_step]
        for ticket in late:
            del self._in_flight[ticket.number]
            self.counts.expired += 1
            self._again(ticket, [])
        return late

    def take(self) -> list[Group] | None:
        """A rollout batch, oldest groups first, as its mini-batches follow; None if too few have finished."""
        self._drop_stale()
        if len(self._finished) < self._batch_size:
            return None
        batch, self._finished = self._finished[: self._batch_size], self._finished[self._batch_size :]
        self.counts.trained += self._batch_size
        self.next_step += self._mini_batches
        self._left_out_of_batch = 0
        return [group for _, _, group in batch]

    def pending(self) -> list[Pending]:
        """Everything taken and not trained on, left out, dropped or given up, in the order of dispatches.

        What is in flight was not dispatched in vain if it goes on from here, and is not counted.
        """
        held = [(t.number, Pending(t.serial, t.prompt, t.dispatches - 1, list(t.drafts)))
                for t in self._in_flight.values()]  # fmt: skip
        held += [
            (t.number, Pending(t.serial, t.prompt, t.dispatches - 1, list(group)))
            for _, t, group in self._finished
        ]
        return [pending for _, pending in sorted(held, key=lambda entry: entry[0])] + list(self._waiting)

    def restore(self, all_pending: Iterable[Pending]) -> None:
        """What was pending when a checkpoint was written: finished groups are, the others are generated."""
        for pending in all_pending:
            self.counts.taken += 1
            if pending.is_finished:
                ticket = self._ticket(pending)
                self._finished.append((ticket.version, ticket, pending.drafts))
            else:
                self._waiting.append(pending)

    def metrics(self) -> dict[str, float]:
        counts = {f"staleness/{name}_groups": float(value) for name, value in asdict(self.counts).items()}
        del counts["staleness/taken_groups"]
        return counts | {
            "staleness/in_flight_groups": float(self.num_in_flight),
            "staleness/finished_groups": float(self.num_finished),
        }

    def _ticket(self, pending: Pending) -> Ticket:
        begun = [draft for draft in pending.drafts if draft is not None]
        version = min(self.policy_version, oldest_version(begun)) if begun else self.policy_version
        ticket = Ticket(
            self.counts.dispatched, pending.serial, pending.prompt, pending.dispatches + 1, version,
            pending.drafts,
        )  # fmt: skip
        self.counts.dispatched += 1
        return ticket

    def _drop_stale(self) -> None:
        self._finished.sort(key=lambda entry: (entry[0], entry[1].number))
        kept: list[tuple[int, Ticket, Group]] = []
        for entry in self._finished:
            if self.next_step + len(kept) // self._step_size - entry[0] <= self._max_staleness:
                kept.append(entry)
            elif not self._requeue:
                self.counts.stale_dropped += 1
            elif self._again(entry[1], []):
                self.counts.stale_requeued += 1
        self._finished = kept

    def _again(self, ticket: Ticket, drafts: list[Completion | None]) -> bool:
        if ticket.dispatches >= self._max_dispatches:
            self.counts.given_up += 1
            return False
        self._waiting.append(Pending(ticket.serial, ticket.prompt, ticket.dispatches, drafts))
        return True
