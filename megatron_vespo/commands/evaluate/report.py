"""Reports an evaluation: metrics per prompt set, a table, and a line of progress.

Shapes: P prompts, K completions per prompt.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Any, TextIO, cast

import numpy as np

from megatron_vespo.algorithms.accuracy import mean_interval, passes_at_k, repeat_error, shown_ks
from megatron_vespo.observability.display_rows import clock
from megatron_vespo.observability.mean_rewards import mean_reward

PLAIN_INTERVAL_S = 30.0  # seconds between lines of progress if the output is no terminal
TERMINAL_INTERVAL_S = 0.5
CLEAR_LINE = "\r\x1b[K"


def prompt_set_summary(records: list[dict[str, Any]], pass_reward: float) -> dict[str, Any]:
    """Metrics of one set's finished prompts, all with K completions.

    A record has lists of length K: "rewards", "lengths" (tokens), "finish_reasons", "statuses" of the
    rewards; and "policy_versions", the lowest and the highest. A completion is correct, for pass@k, if its
    reward is at least `pass_reward`. Truncated responses, and rewards that timed out or failed, count as 0.
    """
    rewards_PK = np.array([record["rewards"] for record in records], dtype=np.float64)
    lengths_PK = np.array([record["lengths"] for record in records], dtype=np.float64)
    num_completions = rewards_PK.shape[1]
    ends = [end for record in records for end in record["finish_reasons"]]
    statuses = [status for record in records for status in record["statuses"]]
    versions = [version for record in records for version in record["policy_versions"]]
    low, high = mean_interval(rewards_PK.mean(axis=1), num_completions)
    summary = {
        "prompts": len(records),
        "completions": num_completions,
        "avg": float(rewards_PK.mean()),
        "avg_interval": [low, high],
        "repeat_error": repeat_error(rewards_PK) if num_completions > 1 else None,
        "pass": {},
        "pass_interval": {},
        "length_mean": float(lengths_PK.mean()),
        "length_max": int(lengths_PK.max()),
        "truncated_share": ends.count("length") / len(ends),
        "truncated": ends.count("length"),
        "reward_errors": statuses.count("error"),
        "reward_timeouts": statuses.count("timeout"),
        "drawn_anew": sum(record["drawn_anew"] for record in records),
        "policy_versions": [min(versions), max(versions)],
    }
    for k in range(1, num_completions + 1):
        values_P = passes_at_k(rewards_PK, pass_reward, k)
        summary["pass"][str(k)] = float(values_P.mean())
        summary["pass_interval"][str(k)] = list(mean_interval(values_P, num_completions))
    return summary


def format_table(sets: dict[str, dict[str, Any]]) -> str:
    """One line per prompt set."""
    num_completions = max(found["completions"] for found in sets.values())
    ks = shown_ks(num_completions)
    heading = ["set", "prompts", f"avg@{num_completions}", "95% interval", *(f"pass@{k}" for k in ks)]
    heading += ["tokens", "truncated", "errors", "time-outs"]
    rows = [heading]
    averages = [value for found in sets.values() for value in (found["avg"], *found["avg_interval"])]
    for name, found in sets.items():
        low, high = found["avg_interval"]
        rows.append(
            [
                name,
                str(found["prompts"]),
                mean_reward(found["avg"], averages),
                f"{mean_reward(low, averages)} to {mean_reward(high, averages)}",
                *(_share(found["pass"][str(k)]) for k in ks),
                f"{found['length_mean']:,.0f}",
                _share(found["truncated_share"]),
                str(found["reward_errors"]),
                str(found["reward_timeouts"]),
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(heading))]
    lines = []
    for row in rows:
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row, widths, strict=True)),
        ]
        del cells[1]  # the name again
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def reservations(sets: dict[str, dict[str, Any]]) -> list[str]:
    """Lines about what limits the meaning of the numbers."""
    lines = []
    for name, found in sets.items():
        total = found["prompts"] * found["completions"]
        if found["truncated"]:
            lines.append(
                f"{name}: {found['truncated']} of {total} responses reached --max-completion-tokens and "
                "count as 0"
            )
        if failed := found["reward_errors"] + found["reward_timeouts"]:
            lines.append(f"{name}: {failed} of {total} rewards timed out or failed and count as 0")
        if found["drawn_anew"]:
            lines.append(
                f"{name}: {found['drawn_anew']} responses had log-probs that are no numbers, drawn anew"
            )
        low, high = found["policy_versions"]
        if low != high:
            lines.append(f"{name}: the engine's weights changed meanwhile, from version {low} to {high}")
    return lines


def _share(value: float) -> str:
    return f"{value:.1%}"


@dataclass
class Progress:
    """Shows `done` of `total` prompts: on a terminal one changing line, elsewhere a line now and then."""

    total: int
    done: int = 0
    stream: TextIO = cast(TextIO, None)  # None: stderr
    now: Callable[[], float] = monotonic

    def __post_init__(self) -> None:
        self.stream = sys.stderr if self.stream is None else self.stream
        self._terminal = self.stream.isatty()
        self._first = self.done
        self._reward_sum = self._num_rewards = 0.0
        self.start()

    def start(self) -> None:
        """Starts the clock."""
        self._started = self._reported = self.now()

    def finished(self, rewards: list[float]) -> None:
        """Counts one more prompt, with its rewards."""
        self.done += 1
        self._reward_sum += sum(rewards)
        self._num_rewards += len(rewards)
        interval = TERMINAL_INTERVAL_S if self._terminal else PLAIN_INTERVAL_S
        if self.done == self.total or self.now() - self._reported >= interval:
            self._reported = self.now()
            line = self._line()
            self._write(CLEAR_LINE + line if self._terminal else line + "\n")

    def message(self, text: str) -> None:
        """Prints `text` on its own lines. Any thread may call it."""
        self._write((CLEAR_LINE if self._terminal else "") + text + "\n")

    def close(self) -> None:
        if self._terminal and self.done > self._first:
            self._write("\n")

    def _line(self) -> str:
        passed = self.now() - self._started
        left = passed / (self.done - self._first) * (self.total - self.done)
        return (
            f"{self.done}/{self.total} prompts, mean reward {self._reward_sum / self._num_rewards:.3f}, "
            f"{clock(passed)} passed, about {clock(left)} left"
        )

    def _write(self, text: str) -> None:
        self.stream.write(text)  # in one piece: another thread may also write
        self.stream.flush()
