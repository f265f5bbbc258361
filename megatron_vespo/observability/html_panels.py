"""Chooses what report.html draws: the same panels as curves.png."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_vespo.observability.display_rows import PHASE_COLUMNS
from megatron_vespo.observability.html_charts import Curve, Panel, Points
from megatron_vespo.observability.mean_rewards import are_shares

LARGEST = 1e300  # larger numbers would overflow on the way to the picture
PHASE_COLORS = dict(zip(PHASE_COLUMNS, ("c1", "c7", "c5", "c6", "c2", "c3", "c8", "c4"), strict=True))


@dataclass(frozen=True)
class Spec:
    title: str
    curves: tuple[tuple[str, str, str], ...]  # metric, label, colour
    alarms: tuple[str, ...]
    log_scale: bool = False


ACCURACY = Spec(
    "Accuracy",
    (("eval/accuracy", "held-out", "c1"), ("reward/mean", "training", "c2")),
    ("reward_collapse", "equal_groups"),
)
SPECS = (
    Spec(
        "Sequence log W",
        (
            ("ratio/log_w_mean", "mean ± std", "c1"),
            ("ratio/staleness_std", "staleness, std", "c2"),
            ("ratio/mismatch_std", "mismatch, std", "c4"),
        ),
        ("passes_differ",),
    ),
    Spec(
        "Weight of a sequence",
        (
            ("weight/mean/positive", "advantage > 0", "c3"),
            ("weight/mean/negative", "advantage < 0", "c4"),
            ("weight/ess", "effective sample size", "c8"),
            ("weight/dead_share", "dead", "c5"),
        ),
        ("dead_sequences", "ess_collapse"),
    ),
    Spec(
        "Response length (tokens)",
        (("response/length_mean", "mean", "c1"), ("response/length_p90", "90th percentile", "c6")),
        ("truncated_responses",),
    ),
    Spec(
        "Entropy (nats per token)",
        (
            ("train/entropy", "entropy", "c1"),
            ("distillation/reverse_kl", "reverse KL to the teacher", "c2"),
        ),
        ("entropy_collapse", "entropy_explosion", "distillation_diverges"),
    ),
    Spec(
        "Gradient norm",
        (
            ("train/grad_norm_max", "largest", "c8"),
            ("train/grad_norm", "mean", "c1"),
            ("gradient/router", "router", "c4"),
        ),
        ("gradient_spike",),
        log_scale=True,
    ),
    Spec(
        "Largest log-prob difference, engine and trainer",
        (("check/max_logprob_difference", "largest", "c1"),),
        ("engine_mismatch",),
        log_scale=True,
    ),
)


def panels(metrics: list[dict], marks: Sequence[tuple[int, str]], resumes: Sequence[int]) -> list[Panel]:
    """`marks` are (step, alarm name) where an alarm came on. `resumes` are steps of resumed checkpoints."""
    accuracy = _panel(ACCURACY, metrics, marks)
    values = [value for curve in accuracy.curves for _, value in curve.points]
    if are_shares(values):
        accuracy = replace(accuracy, number=lambda value: f"{100 * value:.3g}%")
    else:
        accuracy = replace(accuracy, title="Mean reward")
    found = [accuracy, *(_panel(spec, metrics, marks) for spec in SPECS), _phases(metrics)]
    steps = [record["step"] for record in metrics]
    span = (min(steps), max(steps)) if steps else None
    return [replace(panel, resumes=resumes, span=span) for panel in found]


def _panel(spec: Spec, metrics: list[dict], marks: Sequence[tuple[int, str]]) -> Panel:
    curves = [Curve(label, series(metrics, name), color) for name, label, color in spec.curves]
    if spec.log_scale:  # an exact match, 0, has no place there
        curves = [replace(c, points=[point for point in c.points if point[1] > 0]) for c in curves]
    elif spec is ACCURACY:
        curves[0] = replace(_with_band(curves[0], *_interval(metrics)), dots=True)
    elif spec.curves[0][0] == "ratio/log_w_mean":
        curves[0] = _with_band(curves[0], *_spread(metrics))
    known = [(step, name.replace("_", " ")) for step, name in marks if name in spec.alarms]
    return Panel(spec.title, curves, log_scale=spec.log_scale, marks=known)


def series(metrics: list[dict], name: str) -> Points:
    """(step, value) of the records that have a number there, the last one of a step, in order."""
    points = {}
    for record in metrics:
        value = record.get(name, math.nan)
        if math.isfinite(value) and abs(value) < LARGEST:
            points[record["step"]] = float(value)
    return sorted(points.items())


def names_of(records: list[dict]) -> set[str]:
    """Names of all metrics that a record has."""
    return set().union(*records)


def phase_names(metrics: list[dict]) -> list[str]:
    present = {name.removeprefix("time/") for name in names_of(metrics) if name.startswith("time/")}
    return [*(name for name in PHASE_COLUMNS if name in present), *sorted(present - PHASE_COLUMNS.keys())]


def _phases(metrics: list[dict]) -> Panel:
    names = phase_names(metrics)
    steps = sorted({record["step"] for record in metrics if any(f"time/{name}" in record for name in names)})
    curves = []
    for name in names:
        known = dict(series(metrics, f"time/{name}"))
        curves.append(
            Curve(name, [(step, known.get(step, 0.0)) for step in steps], PHASE_COLORS.get(name, "c8"))
        )
    return Panel("Seconds per rollout batch", curves, stacked=True)


def _with_band(curve: Curve, low: Points, high: Points) -> Curve:
    return replace(curve, band=(low, high)) if low and high else curve


def _interval(metrics: list[dict]) -> tuple[Points, Points]:
    return series(metrics, "eval/interval_low"), series(metrics, "eval/interval_high")


def _spread(metrics: list[dict]) -> tuple[Points, Points]:
    mean, std = series(metrics, "ratio/log_w_mean"), dict(series(metrics, "ratio/log_w_std"))
    both = [(step, value, std[step]) for step, value in mean if step in std]
    return [(step, m - s) for step, m, s in both], [(step, m + s) for step, m, s in both]
