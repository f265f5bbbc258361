"""The judgement of a run, written down before any run of the study was made.

A run is COLLAPSED if one of these holds:
    * it ended early, because a gradient was not finite;
    * its final accuracy is below half of the best it had, the start included;
    * its entropy in the last interval is above five times that of the first, and above 1 nat a token.
A run is HARMED if it is not collapsed, but ends below the accuracy that it started with.
The final accuracy is the mean of the last two evaluations, so that one lucky evaluation decides nothing.

A learning rate WORKS for a method at some N if the tuning run with it neither collapsed nor was harmed, and
its final accuracy is at least three quarters of that of the best tuning run at N = 1.
"""

from __future__ import annotations

from typing import Any

Record = dict[str, Any]

COLLAPSE_SHARE = 0.5  # of the run's best accuracy
ENTROPY_FACTOR, ENTROPY_NATS = 5.0, 1.0
WORKING_SHARE = 0.75  # of the best accuracy at N = 1


def final_accuracy(record: Record) -> float:
    """Share of right answers, 0 to 1."""
    last = record["accuracy"][-2:]
    return sum(last) / len(last)


def collapsed(record: Record) -> bool:
    entropy = record.get("entropy", [0.0])
    exploded = entropy[-1] > ENTROPY_FACTOR * entropy[0] and entropy[-1] > ENTROPY_NATS
    lost = final_accuracy(record) < COLLAPSE_SHARE * max(record["accuracy"])
    return record["error"] is not None or lost or exploded


def harmed(record: Record) -> bool:
    return not collapsed(record) and final_accuracy(record) < record["accuracy"][0]


def works(record: Record, best_on_policy: float) -> bool:
    good = final_accuracy(record) >= WORKING_SHARE * best_on_policy
    return good and not collapsed(record) and not harmed(record)
