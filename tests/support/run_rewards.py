"""A reward for whole runs, found by its name from the repository's folder."""

import time
from pathlib import Path


def ended_and_wanted(response: str, answer: str, metadata: dict) -> float:
    """Responses that do not end are never asked about: a random model's ends are by chance."""
    return float(answer == "wanted")


def first_letters(response: str, answer: str, metadata: dict) -> float:
    """Something to learn from for a random model: rewards that differ within a group."""
    return sum(map(ord, response[:3])) % 7 / 7


def behind_a_gate(response: str, answer: str, metadata: dict) -> float:
    """Comes when there is no file at `answer`; about one response in two is good."""
    while Path(answer).exists():
        time.sleep(0.1)
    return float(len(response) % 2)


def all_letters(response: str, answer: str, metadata: dict) -> float:
    """The same, of everything that was said."""
    return sum(map(ord, response)) % 7 / 7
