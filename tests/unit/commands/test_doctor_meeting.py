"""Processes that meet: all come, some do not, one goes, strangers knock."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from megatron_vespo.commands.doctor import meeting
from megatron_vespo.commands.doctor.meeting import Guest, Host, Meeting, MeetingError

LOCAL = "127.0.0.1"


@pytest.fixture
def word(request) -> str:
    """Other ports for every test."""
    return f"test {hash(request.node.name) % 1000}"


def all_of(word: str, size: int, play, timeout_s: float = 20.0) -> list:
    """`play(meeting)` of every rank, each in a thread."""

    def rank(number: int):
        if number == 0:
            own = Host(size, word, timeout_s)
        else:
            own = Guest(number, size, word, LOCAL, timeout_s)
        try:
            return play(own)
        finally:
            own.close()

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(rank, range(size)))


def test_all_get_what_all_have(word):
    def play(own):
        first = own.exchange(f"of {own.rank}", 10.0)
        second = own.exchange({"rank": own.rank}, 10.0)
        return first, second, own.absent

    for answer in all_of(word, 3, play):
        assert answer == (
            {0: "of 0", 1: "of 1", 2: "of 2"}, {rank: {"rank": rank} for rank in range(3)}, set(),
        )  # fmt: skip


def test_clocks(word, monkeypatch):
    """Rank 1's clock is 100 s ahead."""

    class Clock:
        monotonic, sleep = staticmethod(time.monotonic), staticmethod(time.sleep)

        @staticmethod
        def time() -> float:
            return time.time() + (100.0 if threading.current_thread().name == "ahead" else 0.0)

    monkeypatch.setattr(meeting, "time", Clock)

    def play(own):
        if own.rank == 1:
            threading.current_thread().name = "ahead"
        return own.clock_offsets(10.0)

    for offsets in all_of(word, 3, play):
        assert offsets == {0: 0.0, 1: pytest.approx(100.0, abs=0.5), 2: pytest.approx(0.0, abs=0.5)}


@pytest.mark.long
def test_who_does_not_come_is_named(word):
    with ThreadPoolExecutor(1) as threads:
        host = threads.submit(Host, 3, word, 2.0)
        guest = Guest(2, 3, word, LOCAL, 20.0)
        host = host.result()
        assert host.absent == guest.absent == {1}
        answer = threads.submit(host.exchange, "a", 5.0)
        assert guest.exchange("b", 5.0) == answer.result() == {0: "a", 2: "b"}
        guest.close()
        assert host.exchange("c", 5.0) == {0: "c"} and host.absent == {1, 2}
        host.close()


def test_strangers_are_not_let_in(word):
    with ThreadPoolExecutor(1) as threads:
        host = threads.submit(Host, 2, word, 20.0)
        time.sleep(0.2)
        for hello in (
            b"GET / HTTP/1.1\r\n\r\n",
            json.dumps({"word": "other", "rank": 1}).encode() + b"\n",
            b"",
        ):
            with socket.create_connection((LOCAL, meeting._ports(word)[0])) as stranger:
                stranger.sendall(hello)
        guest = Guest(1, 2, word, LOCAL, 20.0)
        assert host.result().absent == set()
        guest.close()
        host.result().close()


def test_a_rank_0_that_goes(word):
    with ThreadPoolExecutor(1) as threads:
        host = threads.submit(Host, 2, word, 20.0)
        guest = Guest(1, 2, word, LOCAL, 20.0)
        host.result().close()
        with pytest.raises(MeetingError, match="rank 0 does not answer"):
            guest.exchange("a", 5.0)


def test_a_rank_0_that_is_not_there(word):
    with pytest.raises(MeetingError, match="cannot reach rank 0 at 127.0.0.1, ports .*refused"):
        Guest(1, 2, word, LOCAL, 0.6)


def test_alone():
    alone = Meeting()
    assert alone.exchange("a", 1.0) == {0: "a"} and alone.clock_offsets(1.0) == {0: 0.0}
