"""phi(W) of the VESPO losses in numpy: the viewer runs on machines without torch.

The same formula and bounds as `megatron_vespo.algorithms.vespo.GammaKernel`, which training uses; a test
compares both. n responses:

    log phi = c1 log W + c2 (1 - W),   c1 and c2 by the sign of the advantage; A = 0 counts as positive
    peak: phi = (c1 / c2)^c1 exp(c2 - c1) at W = c1 / c2
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_vespo.algorithms.diagnostics import DEAD_WEIGHT

# those of algorithms/vespo.py
MAX_LOG_W = 20.0
MAX_LOG_PHI = 80.0
MIN_LOG_W = -1.0e4

Pair = tuple[float, float]
BISECTIONS = 100  # halves 10,000 to below the precision of float64


@dataclass(frozen=True)
class Kernel:
    """Constants (c1, c2) of phi by the sign of the advantage, and how the loss scales log W by the length."""

    positive: Pair = (2.0, 3.0)
    negative: Pair = (3.0, 2.0)
    loss: str = "vespo"  # "vespo-mean" divides log W by the length, "vespo-sqrt" by its square root

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Kernel:
        """From the settings of a record; the paper's constants where it has none."""
        return cls(
            _pair(settings.get("vespo_positive"), cls.positive),
            _pair(settings.get("vespo_negative"), cls.negative),
            str(settings.get("policy_loss", cls.loss)),
        )

    def scaled(self, log_w: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """What the loss puts into phi for log W of responses of `lengths` tokens, float32 [n]."""
        log_w = np.asarray(log_w, np.float32)
        if self.loss == "vespo-mean":
            return log_w / np.asarray(lengths, np.float32)
        if self.loss == "vespo-sqrt":
            return log_w / np.sqrt(np.asarray(lengths, np.float32))
        return log_w

    def phi(self, log_w: np.ndarray, advantages: np.ndarray) -> np.ndarray:
        """phi(W), float32 [n]. NaN stays NaN."""
        log_w = np.clip(np.asarray(log_w, np.float32), np.float32(MIN_LOG_W), np.float32(MAX_LOG_W))
        positive = np.asarray(advantages) >= 0
        c1 = np.where(positive, self.positive[0], self.negative[0]).astype(np.float32)
        c2 = np.where(positive, self.positive[1], self.negative[1]).astype(np.float32)
        log_phi = c1 * log_w + c2 * (np.float32(1.0) - np.exp(log_w))
        return np.exp(np.minimum(log_phi, np.float32(MAX_LOG_PHI)))

    def constants(self, advantage: float) -> Pair:
        """(c1, c2) for an advantage."""
        return self.positive if advantage >= 0 else self.negative


def _pair(value: Any, default: Pair) -> Pair:
    return default if value is None else (float(value[0]), float(value[1]))


@dataclass(frozen=True)
class Thresholds:
    """Where phi stands out, as log W; None where there is no such point (c1 = 0 or c2 = 0)."""

    peak: float | None
    phi_peak: float | None
    half: tuple[float | None, float | None]  # phi is half of its peak: below and above the peak
    dead: tuple[float | None, float | None]  # phi is DEAD_WEIGHT: below and above the peak


def thresholds(c1: float, c2: float) -> Thresholds:
    """Return the landmarks of log phi = c1 x + c2 (1 - e^x), which is concave in x = log W."""
    if c1 <= 0.0 or c2 <= 0.0:
        return Thresholds(None, None, (None, None), _dead_without_peak(c1, c2))
    peak = math.log(c1 / c2)
    log_phi_peak = c1 * peak + c2 - c1
    return Thresholds(
        peak,
        math.exp(min(log_phi_peak, MAX_LOG_PHI)),
        _crossings(c1, c2, peak, log_phi_peak - math.log(2.0)),
        _crossings(c1, c2, peak, math.log(DEAD_WEIGHT)),
    )


def _dead_without_peak(c1: float, c2: float) -> tuple[float | None, float | None]:
    """phi is monotonic: it grows with c2 = 0, falls with c1 = 0, and is constant with both 0."""
    log_dead = math.log(DEAD_WEIGHT)
    if c1 > 0.0:
        return log_dead / c1, None
    return (None, math.log(1.0 - log_dead / c2)) if c2 > 0.0 else (None, None)


def _crossings(c1: float, c2: float, peak: float, level: float) -> tuple[float | None, float | None]:
    def log_phi(x: float) -> float:
        return c1 * x + c2 * (1.0 - math.exp(x))

    def crossing(outside: float) -> float | None:
        inside = peak
        if log_phi(inside) < level or log_phi(outside) > level:
            return None
        for _ in range(BISECTIONS):
            middle = (inside + outside) / 2.0
            inside, outside = (middle, outside) if log_phi(middle) >= level else (inside, middle)
        return inside

    return crossing(MIN_LOG_W), crossing(max(MAX_LOG_W, peak))
