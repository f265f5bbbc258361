"""Histograms of log W and of the weight, and ESS by sign, length and mini-batch, of the recorded responses.

`what_if` does the same with other constants of phi and fewer mini-batches per rollout batch. What it can
answer: phi of the recorded log W under other (c1, c2), and of the first N mini-batches of every rollout
batch alone. A run with N mini-batches per rollout batch would have trained on exactly these with the same pi,
pi_old and mu. What it would have generated after them, the record cannot say; nor how other constants would
have changed pi from the second optimizer step on.
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np

from megatron_vespo.algorithms.diagnostics import (
    bucket_name,
    dead_share,
    effective_sample_share,
    length_buckets,
)
from megatron_vespo.commands.view.kernel import Kernel, thresholds

BINS = 60
WIDEST = (-20.0, 20.0)  # of the histogram of log W; phi is 0 above it, and next to 0 below
SIGNS = (("positive", 1), ("negative", -1))
_COLUMNS = "step, mini_batch, sign, length, advantage, log_w, weight, correction"
_ROW = np.dtype(
    [
        ("step", np.int32), ("mini_batch", np.int32), ("sign", np.int8), ("length", np.int32),
        ("advantage", np.float32), ("log_w", np.float32), ("weight", np.float32), ("correction", np.float32),
    ]
)  # fmt: skip


@dataclass(frozen=True)
class Responses:
    """Columns of the chosen responses, each [n]; numbers that are unknown are NaN."""

    rows: np.ndarray
    settings: dict[str, Any]  # of the loss, as the last chosen step recorded them

    @classmethod
    def of(cls, connection: sqlite3.Connection, step_min: int | None, step_max: int | None) -> Responses:
        """Read the responses of the optimizer steps `step_min` to `step_max`; None is no bound."""
        bounds = (-1 if step_min is None else step_min, 2**40 if step_max is None else step_max)
        found = connection.execute(f"SELECT {_COLUMNS} FROM responses WHERE step BETWEEN ? AND ?", bounds)
        # row after row into an array: tuples of Python would take ten times the memory
        rows = np.fromiter(_with_nan(found), _ROW)
        settings = connection.execute(
            "SELECT settings FROM files WHERE settings NOT NULL AND step BETWEEN ? AND ?"
            " ORDER BY step DESC LIMIT 1",
            bounds,
        ).fetchone()
        return cls(rows, json.loads(settings[0]) if settings else {})

    def first_mini_batches(self, number: int) -> Responses:
        """Return those of the first `number` mini-batches of their rollout batches."""
        return Responses(self.rows[self.rows["mini_batch"] < number], self.settings)


def _with_nan(rows: sqlite3.Cursor) -> Iterator[tuple]:
    for row in rows:
        yield tuple(math.nan if value is None else value for value in row) if None in row else row


def distributions(responses: Responses) -> dict[str, Any]:
    """Return the distributions of the weights that the run used."""
    kernel = Kernel.of(responses.settings)
    return _described(responses, responses.rows["weight"], kernel) | {
        "settings": responses.settings,
        "mini_batches": int(responses.rows["mini_batch"].max()) + 1 if len(responses.rows) else 0,
        "agreement": _agreement(responses, kernel),
    }


def what_if(responses: Responses, kernel: Kernel, mini_batches: int | None = None) -> dict[str, Any]:
    """Return the distributions as they would be with `kernel`, of the first `mini_batches` if given.

    The weight is phi(W) times the recorded weight of --mismatch-correction. Of a response whose tokens have
    their own advantages the record of a response has the mean alone, and phi goes by the mean's sign.
    """
    chosen = responses if mini_batches is None else responses.first_mini_batches(mini_batches)
    return _described(chosen, weights_under(chosen, kernel), kernel) | {
        # phi at the centres of the histogram of all of `responses`, to be drawn over it
        "phi_over": _log_w_histogram(responses.rows[np.isfinite(responses.rows["log_w"])], kernel)["phi"]
    }


def weights_under(responses: Responses, kernel: Kernel) -> np.ndarray:
    """Return phi(W) times the correction, float32 [n]."""
    rows = responses.rows
    phi = kernel.phi(kernel.scaled(rows["log_w"], np.maximum(rows["length"], 1)), rows["advantage"])
    return phi * np.nan_to_num(rows["correction"], nan=1.0)


def _agreement(responses: Responses, kernel: Kernel) -> float | None:
    """Largest difference between recorded and recomputed weights; None if a response has no one phi."""
    per_token = responses.settings.get("has_advantages_per_token", False)
    if per_token or not kernel.loss.startswith("vespo") or not len(responses.rows):
        return None
    difference = np.abs(weights_under(responses, kernel) - responses.rows["weight"])
    return _number(np.nanmax(difference)) if np.isfinite(difference).any() else None


def _described(responses: Responses, weights: np.ndarray, kernel: Kernel) -> dict[str, Any]:
    rows = responses.rows
    known = np.isfinite(rows["log_w"]) & np.isfinite(weights)
    rows, weights = rows[known], weights[known]
    return {
        "responses": len(rows),
        "unknown": int((~known).sum()),
        "log_w": _log_w_histogram(rows, kernel),
        "weight": _weight_histogram(rows, weights),
        "overall": _overall(rows, weights),
        "table": _table(rows, weights),
        "kernel": {
            name: {"c1": c1, "c2": c2} | asdict(thresholds(c1, c2))
            for name, (c1, c2) in (("positive", kernel.positive), ("negative", kernel.negative))
        },
    }


def _log_w_histogram(rows: np.ndarray, kernel: Kernel) -> dict[str, Any]:
    """Return counts by sign, with what lies outside of the edges, and phi at the centres."""
    if not len(rows):
        return {"edges": [], "counts": {}, "outside": {}, "phi": {}}
    low, high = np.clip(np.quantile(rows["log_w"], [0.002, 0.998]), *WIDEST)
    margin = max(0.05 * float(high - low), 1e-3)
    edges = np.linspace(low - margin, high + margin, BINS + 1)
    centres = (edges[:-1] + edges[1:]) / 2
    counts, outside, phi = {}, {}, {}
    for name, sign in SIGNS:
        log_w = rows["log_w"][rows["sign"] == sign]
        counts[name] = np.histogram(log_w, edges)[0].tolist()
        outside[name] = [int((log_w < edges[0]).sum()), int((log_w > edges[-1]).sum())]
        phi[name] = _numbers(kernel.phi(centres, np.full(BINS, float(sign))))
    return {"edges": _numbers(edges), "counts": counts, "outside": outside, "phi": phi}


def _weight_histogram(rows: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    if not len(rows):
        return {"edges": [], "counts": {}, "outside": {}}
    # phi has a peak of about 1.2; a weight without one may be as large as it likes
    high = max(float(np.quantile(weights, 0.998)), 1.25)
    edges = np.linspace(0.0, high, BINS + 1)
    by_sign = {name: weights[rows["sign"] == sign] for name, sign in SIGNS}
    return {
        "edges": _numbers(edges),
        "counts": {name: np.histogram(values, edges)[0].tolist() for name, values in by_sign.items()},
        "outside": {name: [0, int((values > edges[-1]).sum())] for name, values in by_sign.items()},
    }


def _overall(rows: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    parts = {"all": np.ones(len(rows), bool)} | {name: rows["sign"] == sign for name, sign in SIGNS}
    return {name: _of_part(rows[chosen], weights[chosen]) for name, chosen in parts.items()}


def _table(rows: np.ndarray, weights: np.ndarray) -> list[dict[str, Any]]:
    """Return a line for every sign, length bin and mini-batch that has responses."""
    buckets = length_buckets(rows["length"])
    lines = []
    places = product(np.unique(buckets).tolist(), np.unique(rows["mini_batch"]).tolist())
    for (name, sign), (bucket, mini_batch) in product(SIGNS, places):
        chosen = (rows["sign"] == sign) & (buckets == bucket) & (rows["mini_batch"] == mini_batch)
        if chosen.any():
            place = {"sign": name, "length": bucket_name(bucket), "bucket": bucket, "mini_batch": mini_batch}
            lines.append(place | _of_part(rows[chosen], weights[chosen]))
    return lines


def _of_part(rows: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    """Return number, mean weight, ESS as a share, dead share, and mean and spread of log W."""
    if not len(rows):
        return {"count": 0, "mean": None, "ess": None, "dead": None, "log_w_mean": None, "log_w_std": None}
    log_w = rows["log_w"].astype(np.float64)
    return {
        "count": len(rows),
        "mean": _number(weights.mean(dtype=np.float64)),
        "ess": _number(effective_sample_share(weights)),
        "dead": _number(dead_share(weights)),
        "log_w_mean": _number(log_w.mean()),
        "log_w_std": _number(log_w.std()),
    }


def _number(value: float | np.floating) -> float | None:
    return float(f"{float(value):.8g}") if math.isfinite(value) else None


def _numbers(values: np.ndarray) -> list[float | None]:
    return [_number(value) for value in values.tolist()]
