"""What asynchronous generation has in flight and has finished, and which step may train on it. No I/O.

A policy version is a number of optimizer steps: step t trains version t and makes version t + 1. A rollout
batch of `batch_size` groups is cut into `mini_batches` optimizer steps, G = batch_size / mini_batches groups
each. A group's version u is that of the oldest token in it. Trained on at step t its total lag is

    t - u = (first step of its rollout batch - u) + index of its mini-batch
          = asynchronous lag                      + what a synchronous run has too

and the bound is on this total: t - u <= max_staleness, so the group's last step is u + max_staleness.

Every step has places for G groups. Earliest last step first fills them best: the j-th oldest group lies in
step next_step + j // G, and one that lies after its last step there is too old wherever it is put. While
engines serve version w nothing dispatched can be older than w, and all of it has to fit the steps up to
w + max_staleness: so many places, less what is held already, is the `room` for new groups. Beyond it
something would be certain to be generated in vain. A whole batch of fresh groups fits if next_step - w +
mini_batches - 1 <= max_staleness when the batch is waited for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

from megatron_vespo.types import Completion, Prompt

Group = list[Completion]


@dataclass(frozen=True)
class Ticket:
    """One dispatch of one prompt.

    Example, the second dispatch of a prompt, while the engines serve version 12:
        Ticket(number=31, prompt=..., dispatches=2, version=12)
    """

    number: int  # of all dispatches, from 0
    prompt: Prompt
    dispatches: int  # of this prompt, this one included
    version: int  # served at the dispatch: no token of it can be older


@dataclass
class Counts:
    """Groups since the start. A prompt taken ends in exactly one of trained, stale_dropped and given_up."""

    taken: int = 0  # prompts
    dispatched: int = 0
    trained: int = 0
    stale_dropped: int = 0  # finished, but too old for every step
    stale_requeued: int = 0  # the same, and their prompts are generated once more
    expired: int = 0  # too old before they had finished
    failed: int = 0  # of a failed request
    given_up: int = 0  # prompts that were dispatched as often as allowed


def oldest_version(group: Group) -> int:
    return min(int(completion.policy_versions.min()) for completion in group)


class RolloutBuffer:
    """Groups waiting, in flight and finished. `next_prompt` gives a new prompt, `requeue` says whether those
    of finished groups that are too old are generated again, `max_dispatches` how often one prompt may be.
    """

    def __init__(
        self,
        next_prompt: Callable[[], Prompt],
        *,
        batch_size: int,
        mini_batches: int,
        max_staleness: int,
        requeue: bool,
        max_dispatches: int,
        version: int = 0,
    ):
        assert batch_size % mini_batches == 0, (batch_size, mini_batches)
        self._next_prompt = next_prompt
        self._batch_size, self._mini_batches = batch_size, mini_batches
        self._step_size = batch_size // mini_batches
        self._max_staleness = max_staleness
        self._requeue, self._max_dispatches = requeue, max_dispatches
        self.served = version  # by the engines
        self.next_step = version  # the first that the next batch trains
        self.counts = Counts()
        self._waiting: deque[tuple[Prompt, int]] = deque()  # to be dispatched again, and how often they were
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
        num_steps = self.served + self._max_staleness - self.next_step + 1
        return max(num_steps * self._step_size - self.num_in_flight - self.num_finished, 0)

    def dispatch(self) -> Ticket:
        """The next prompt is in flight from now on: one to be generated again before a new one."""
        assert self.room() > 0, "nothing may be dispatched"
        if self._waiting:
            prompt, dispatches = self._waiting.popleft()
        else:
            prompt, dispatches = self._next_prompt(), 0
            self.counts.taken += 1
        ticket = Ticket(self.counts.dispatched, prompt, dispatches + 1, self.served)
        self.counts.dispatched += 1
        self._in_flight[ticket.number] = ticket
        return ticket

    def finish(self, ticket: Ticket, group: Group) -> None:
        del self._in_flight[ticket.number]
        version = oldest_version(group)
        assert version >= ticket.version, f"{ticket} has a token of version {version}"
        self._finished.append((version, ticket, group))

    def fail(self, ticket: Ticket) -> bool:
        """A request of the group failed; False if its prompt is given up."""
        del self._in_flight[ticket.number]
        self.counts.failed += 1
        return self._again(ticket)

    def serve(self, version: int) -> None:
        """The engines serve another policy."""
        assert version >= self.served, f"version {version} after {self.served}"
        self.served = version

    def expire(self) -> list[Ticket]:
        """Takes out what is in flight and too old for the next batch; its requests are to be cancelled.

        A ticket knows when it was dispatched, not when its first token was made: this may take out a group
        that waited in an engine over a weight sync.
        """
        late = [t for t in self._in_flight.values() if t.version + self._max_staleness < self.next_step]
        for ticket in late:
            del self._in_flight[ticket.number]
            self.counts.expired += 1
            self._again(ticket)
        return late

    def take(self) -> list[Group] | None:
        """A rollout batch, oldest groups first, as its mini-batches follow; None if too few have finished."""
        self._drop_stale()
        if len(self._finished) < self._batch_size:
            return None
        batch, self._finished = self._finished[: self._batch_size], self._finished[self._batch_size :]
        self.counts.trained += self._batch_size
        self.next_step += self._mini_batches
        return [group for _, _, group in batch]

    def pending(self) -> list[Prompt]:
        """Prompts taken and not trained on, dropped or given up, in the order they were taken from here."""
        held = sorted([*self._in_flight.values(), *(t for _, t, _ in self._finished)], key=lambda t: t.number)
        return [ticket.prompt for ticket in held] + [prompt for prompt, _ in self._waiting]

    def restore(self, prompts: list[Prompt]) -> None:
        """Generates what was pending when a checkpoint was written."""
        self._waiting.extend((prompt, 0) for prompt in prompts)
        self.counts.taken += len(prompts)

    def metrics(self) -> dict[str, float]:
        counts = {f"staleness/{name}_groups": float(value) for name, value in asdict(self.counts).items()}
        del counts["staleness/taken_groups"]
        return counts | {
            "staleness/in_flight_groups": float(self.num_in_flight),
            "staleness/finished_groups": float(self.num_finished),
        }

    def _drop_stale(self) -> None:
        self._finished.sort(key=lambda entry: (entry[0], entry[1].number))
        kept: list[tuple[int, Ticket, Group]] = []
        for entry in self._finished:
            if self.next_step + len(kept) // self._step_size - entry[0] <= self._max_staleness:
                kept.append(entry)
            elif not self._requeue:
                self.counts.stale_dropped += 1
            elif self._again(entry[1]):
                self.counts.stale_requeued += 1
        self._finished = kept

    def _again(self, ticket: Ticket) -> bool:
        if ticket.dispatches >= self._max_dispatches:
            self.counts.given_up += 1
            return False
        self._waiting.append((ticket.prompt, ticket.dispatches))
        return True

    def tickets(self) -> Iterator[Ticket]:
        """In flight."""
        return iter(self._in_flight.values())
