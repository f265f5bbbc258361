"""Lets the processes of a step exchange values: JSON lines between each and rank 0, standard library only.

A process that does not connect or answer in time is left out and named; the others continue.
"""

from __future__ import annotations

import json
import socket
import time
from typing import Any

CANDIDATE_PORTS = 8  # rank 0 takes the first free one, the others try them in turn
FIRST_PORT = 29000  # below the engines' and the ephemeral ports
RETRY_S = 0.5
PINGS = 5
ANSWER_MARGIN_S = 30.0  # the others wait this much longer than rank 0


class MeetingError(RuntimeError):
    """Rank 0 cannot be reached or has ended."""


class Meeting:
    """One process's side; base class of Host and Guest. `absent`: ranks that never connected or have left."""

    rank, size = 0, 1

    def __init__(self) -> None:
        self.absent: set[int] = set()

    def exchange(self, value: Any, timeout_s: float) -> dict[int, Any]:
        """Rank -> its value, for all present ranks. All ranks call it in the same order."""
        return {0: value}

    def clock_offsets(self, timeout_s: float) -> dict[int, float]:
        """Rank -> seconds that its clock is ahead of rank 0's. All ranks call it."""
        return {0: 0.0}

    def close(self) -> None:
        pass


class Host(Meeting):
    """Rank 0."""

    def __init__(self, size: int, word: str, timeout_s: float):
        """`word` distinguishes this step's processes from strangers."""
        super().__init__()
        self.size = size
        self._lines: dict[int, _Lines] = {}
        with _listener(word) as listener:
            deadline = time.monotonic() + timeout_s
            while len(self._lines) < size - 1 and (left := deadline - time.monotonic()) > 0:
                listener.settimeout(left)
                try:
                    connection, _ = listener.accept()
                except TimeoutError:
                    break
                lines = _Lines(connection)
                hello = lines.read(min(left, 5.0))
                if isinstance(hello, dict) and hello.get("word") == word and 0 < hello["rank"] < size:
                    self._lines[hello["rank"]] = lines
                else:
                    lines.close()
        self.absent = set(range(1, size)) - self._lines.keys()
        self.exchange(None, timeout_s)  # tells the others that they are accepted

    def exchange(self, value: Any, timeout_s: float) -> dict[int, Any]:
        values, deadline = {0: value}, time.monotonic() + timeout_s
        for rank, lines in sorted(self._lines.items()):
            answer = lines.read(max(0.1, deadline - time.monotonic()))
            if answer is None:
                self._lose(rank)
            else:
                values[rank] = answer["value"]
        for rank in list(self._lines):
            if not self._lines[rank].write({"values": values, "absent": sorted(self.absent)}):
                self._lose(rank)
        return values

    def clock_offsets(self, timeout_s: float) -> dict[int, float]:
        """Uses the fastest of a few round trips: the error is at most half of its time."""
        offsets = {0: 0.0}
        for rank, lines in sorted(self._lines.items()):
            best = float("inf")
            for _ in range(PINGS):
                asked = time.time()
                lines.write({"now": True})
                answer = lines.read(timeout_s)
                answered = time.time()
                if answer is None:
                    self._lose(rank)
                    break
                if answered - asked < best:
                    best = answered - asked
                    offsets[rank] = answer["now"] - (asked + answered) / 2
        for rank in list(self._lines):
            if not self._lines[rank].write({"offsets": offsets, "absent": sorted(self.absent)}):
                self._lose(rank)
        return offsets

    def _lose(self, rank: int) -> None:
        self.absent.add(rank)
        self._lines.pop(rank).close()

    def close(self) -> None:
        for lines in self._lines.values():
            lines.close()


class Guest(Meeting):
    """Any other rank."""

    def __init__(self, rank: int, size: int, word: str, host: str, timeout_s: float):
        super().__init__()
        self.rank, self.size = rank, size
        deadline, problem = time.monotonic() + timeout_s, "nothing listens there"
        while time.monotonic() < deadline:
            for port in _ports(word):
                try:
                    self._lines = _Lines(socket.create_connection((host, port), timeout=5.0))
                except OSError as error:
                    problem = str(error)
                    continue
                self._lines.write({"word": word, "rank": rank})
                try:
                    self.exchange(None, max(1.0, deadline - time.monotonic()))
                    return
                except MeetingError:
                    self._lines.close()  # a stranger, or the previous step
            time.sleep(RETRY_S)
        raise MeetingError(f"cannot reach rank 0 at {host}, ports {_ports(word)[0]} and up: {problem}")

    def exchange(self, value: Any, timeout_s: float) -> dict[int, Any]:
        self._lines.write({"value": value})
        answer = self._answer(timeout_s + ANSWER_MARGIN_S)
        return {int(rank): value for rank, value in answer["values"].items()}

    def clock_offsets(self, timeout_s: float) -> dict[int, float]:
        while "offsets" not in (answer := self._answer(timeout_s * PINGS * self.size)):
            self._lines.write({"now": time.time()})
        return {int(rank): offset for rank, offset in answer["offsets"].items()}

    def _answer(self, timeout_s: float) -> dict:
        answer = self._lines.read(timeout_s)
        if not isinstance(answer, dict):
            raise MeetingError("rank 0 does not answer any more")
        self.absent = set(answer.get("absent", ()))
        return answer

    def close(self) -> None:
        self._lines.close()


class _Lines:
    """A connection that carries JSON, one line each way."""

    def __init__(self, connection: socket.socket):
        self._connection = connection
        self._reader = connection.makefile("rb")

    def read(self, timeout_s: float) -> Any:
        """None if the other end has closed, is too late or does not send JSON."""
        self._connection.settimeout(timeout_s)
        try:
            line = self._reader.readline()
            return json.loads(line) if line else None
        except (OSError, ValueError):
            return None

    def write(self, value: Any) -> bool:
        try:
            self._connection.sendall(json.dumps(value).encode() + b"\n")
        except OSError:
            return False
        return True

    def close(self) -> None:
        self._reader.close()
        self._connection.close()


def _ports(word: str) -> range:
    """The same ports for all processes of a step, different ones for other steps on the node."""
    first = FIRST_PORT + sum(map(ord, word)) % 50 * CANDIDATE_PORTS
    return range(first, first + CANDIDATE_PORTS)


def _listener(word: str) -> socket.socket:
    """Listens on all interfaces: the others find out which of them they can reach."""
    for port in _ports(word):
        try:
            return socket.create_server(("", port))
        except OSError:
            continue
    raise MeetingError(f"no free port in {_ports(word)[0]}..{_ports(word)[-1]} for the others to come to")
