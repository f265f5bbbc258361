"""Flags that were renamed."""

from __future__ import annotations

from collections.abc import Sequence, Set

RENAMED = {
    "--heldout-data": "--eval-data",
    "--heldout-prompt-key": "--eval-prompt-key",
    "--heldout-answer-key": "--eval-answer-key",
    "--heldout-answer-pattern": "--eval-answer-pattern",
    "--heldout-interval": "--eval-interval",
    "--heldout-prompts": "--eval-prompts",
    "--heldout-completions": "--eval-completions",
    "--heldout-pass-reward": "--eval-pass-reward",
    "--heldout-temperature": "--eval-temperature",
    "--mini-batches": "--steps-per-rollout",
    "--num-completions": "--group-size",
    "--max-dispatches": "--max-attempts (of a group) or --max-request-retries (of a request)",
}


def renamed(argv: Sequence[str], known: Set[str]) -> str | None:
    """A line about the first renamed flag of `argv`; None if there is none."""
    for word in argv:
        flag = word.partition("=")[0]
        if flag in RENAMED and flag not in known and known & set(RENAMED[flag].split()):
            return f"{flag} is called {RENAMED[flag]} now"
    return None
