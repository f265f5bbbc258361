"""Signals to this very process, in every state of a run."""

import os
import signal
import subprocess
import sys
import time

import pytest

from megatron_vespo.system.preemption import (
    EXIT_RESUME,
    EXIT_UNSAVED,
    SIGNALS,
    EndedBySignal,
    Preempted,
    Preemption,
    shielded,
)


@pytest.fixture(autouse=True)
def handlers():
    """Those of the test run come back."""
    numbers = (*SIGNALS, signal.SIGALRM)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture()
def preemption() -> Preemption:
    preemption = Preemption(deadline_s=60.0)
    preemption.listen()
    return preemption


def send(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0)  # a handler runs between two instructions


@pytest.mark.parametrize("number", SIGNALS)
def test_outside_of_training_the_run_ends_at_once(preemption, number):
    with pytest.raises(Preempted, match=f"ended by {signal.Signals(number).name}") as ended:
        send(number)
    assert ended.value.exit_code == EXIT_RESUME == 75


def test_guarded_work_goes_on_until_the_next_stop(preemption):
    done = []
    with preemption.guarded():
        preemption.stop_here()
        send()
        done.append("the batch")
        with pytest.raises(Preempted):
            preemption.stop_here()
        with pytest.raises(Preempted), preemption.interruptible():
            done.append("generation")
    assert done == ["the batch"]


def test_what_can_be_given_up_is(preemption):
    done = []
    with preemption.guarded():
        with pytest.raises(Preempted), preemption.interruptible():
            send()
            done.append("generation")
        assert done == []


def test_after_an_interruptible_part_work_is_guarded_again(preemption):
    with preemption.guarded():
        with preemption.interruptible():
            pass
        send()
        assert preemption.signal == "SIGTERM"


def test_a_second_signal_ends_at_once(preemption):
    with preemption.guarded():
        send()
        with pytest.raises(EndedBySignal, match="ended by SIGTERM and then SIGUSR1") as ended:
            send(signal.SIGUSR1)
    assert not isinstance(ended.value, Preempted)
    assert ended.value.exit_code == EXIT_UNSAVED == 76
    send()  # what ends now is not disturbed


def test_the_same_signal_within_a_moment_is_one(preemption, monkeypatch):
    with preemption.guarded():
        send(signal.SIGUSR1)
        send(signal.SIGUSR1)
        with pytest.raises(Preempted, match="^ended by SIGUSR1$"):
            preemption.stop_here()
        monkeypatch.setattr("megatron_vespo.system.preemption.SAME_SIGNAL_S", 0.0)
        with pytest.raises(EndedBySignal, match="ended by SIGUSR1 and then SIGUSR1"):
            send(signal.SIGUSR1)


def test_timeout_signals_twice():
    """The command that schedulers and scripts put around a program, which signals it and its group."""
    program = (
        "import time; from megatron_vespo.system.preemption import *; p = Preemption(9); p.listen()\n"
        "with p.guarded():\n"
        "    print(1, flush=True); end = time.monotonic() + 1.5\n"
        "    while time.monotonic() < end: time.sleep(0.1)\n"
        "    try: p.stop_here()\n"
        "    except Preempted as stop: print(stop)"
    )
    command = ["timeout", "-s", "USR1", "-k", "20", "5", sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "1\n"
        process.send_signal(signal.SIGUSR1)  # it hands it on, at once and to all of its group
        assert process.communicate(timeout=20)[0] == "ended by SIGUSR1\n"


def test_the_deadline_ends_guarded_work():
    preemption = Preemption(deadline_s=0.05)
    preemption.listen()
    with preemption.guarded():
        send()
        with pytest.raises(EndedBySignal, match="not saved within --preemption-deadline 0.05") as ended:
            time.sleep(5)
    assert ended.value.exit_code == EXIT_UNSAVED


def test_who_has_concluded_hears_no_signal_and_has_a_little_time(preemption):
    preemption.conclude(EXIT_RESUME)
    send()
    assert preemption.signal is None
    assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 30.0


def test_an_end_that_does_not_come_is_made():
    program = (
        "import time; from megatron_vespo.system import preemption as p; p.LAST_GRACE_S = 0.1\n"
        "try:\n    p.Preemption(9).conclude(75); time.sleep(5)\nfinally:\n    time.sleep(5)"
    )
    started = time.monotonic()
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 75
    assert time.monotonic() - started < 4


def test_children_started_under_the_shield_hear_nothing_whatever_they_handle():
    program = (
        "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(3)); print(1, flush=True); "
        "time.sleep(1)"
    )
    with shielded():
        child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    other = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    for process in (child, other):
        assert process.stdout.readline()
        process.terminate()
    assert (child.wait(20), other.wait(20)) == (0, 3)
