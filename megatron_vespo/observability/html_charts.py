"""Draws a run's curves as inline SVG, whose colours follow the page's style and whose points have titles."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from megatron_vespo.observability.html_parts import safe

Points = list[tuple[float, float]]  # (step, value)

WIDTH, HEIGHT = 440, 220
LEFT, RIGHT, TOP, BOTTOM = 50, 8, 8, 24  # of the area with the curves
MAX_POINTS = 300  # of a curve
MAX_TITLES, MAX_BARS = 100, 60  # of a panel
NUM_TICKS = 5


@dataclass(frozen=True)
class Curve:
    label: str
    points: Points
    color: str  # a class of the style: c1 to c8
    dots: bool = False  # marks every point
    band: tuple[Points, Points] | None = None  # lower and upper bounds


@dataclass(frozen=True)
class Panel:
    """One chart. It has vertical lines at `marks`, (step, text), and at the steps of `resumes`."""

    title: str
    curves: list[Curve]
    log_scale: bool = False
    stacked: bool = False  # the curves are heights of bars that stand on each other
    number: Callable[[float], str] = field(default=lambda value: f"{value:.4g}".replace("e-0", "e-"))
    span: tuple[int, int] | None = None  # first and last step; None: those of the curves
    marks: Sequence[tuple[int, str]] = ()
    resumes: Sequence[int] = ()


def draw(panel: Panel) -> str:
    """The chart as HTML; "" if there is nothing to draw."""
    curves = [curve for curve in panel.curves if curve.points]
    if not curves:
        return ""
    chart = _Chart(panel, curves)
    keys = "".join(f'<span class="key {c.color}"><b></b>{safe(c.label)}</span>' for c in curves)
    noted = "".join(dict.fromkeys(f'<span class="key">┆ {safe(text)}</span>' for _, text in panel.marks))
    return (
        f"<figure><figcaption>{safe(panel.title)}<small>{keys}{noted}</small></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{safe(panel.title)}">'
        f"{chart.axes()}{chart.marks()}{chart.stack() if panel.stacked else chart.curves()}{chart.titles()}"
        "</svg></figure>"
    )


class _Chart:
    def __init__(self, panel: Panel, curves: list[Curve]):
        self._panel = panel
        self._curves = [_binned(curve, MAX_BARS) for curve in curves] if panel.stacked else curves
        steps = panel.span or [step for curve in curves for step, _ in curve.points]
        self._steps = min(steps), max(max(steps), min(steps) + 1)
        values = [value for curve in curves for value in _values(curve)]
        if panel.stacked:
            values = [0.0, *self._totals().values()]
        positive = [value for value in values if value > 0]
        self._log = panel.log_scale and bool(positive) and max(positive) > 10 * min(positive)
        self.ticks = log_ticks(min(positive), max(positive)) if self._log else ticks(min(values), max(values))
        self._low, self._high = self.ticks[0], self.ticks[-1]

    def _totals(self) -> dict[float, float]:
        totals: dict[float, float] = {}
        for curve in self._curves:
            for step, value in curve.points:
                totals[step] = totals.get(step, 0.0) + value
        return totals

    def x(self, step: float) -> float:
        low, high = self._steps
        return LEFT + (step - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self._low, self._high
        if self._log:
            value, low, high = math.log10(max(value, low)), math.log10(low), math.log10(high)
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def axes(self) -> str:
        parts = []
        for tick in self.ticks:
            y = f"{self.y(tick):.1f}"
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
            text = safe(self._panel.number(tick))
            parts.append(
                f'<text x="{LEFT - 5}" y="{y}" text-anchor="end" dominant-baseline="middle">{text}</text>'
            )
        for tick in step_ticks(*self._steps):
            x, low = f"{self.x(tick):.1f}", HEIGHT - BOTTOM
            parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{low}" y2="{low + 4}"/>')
            parts.append(f'<text x="{x}" y="{HEIGHT - 6}" text-anchor="middle">{tick:,}</text>')
        return "".join(parts)

    def marks(self) -> str:
        lines = [(step, "mark", text) for step, text in self._panel.marks]
        lines += [(step, "resume", "resumed") for step in self._panel.resumes]
        low, high = self._steps
        return "".join(
            f'<line class="{kind}" x1="{self.x(step):.1f}" x2="{self.x(step):.1f}" y1="{TOP}" '
            f'y2="{HEIGHT - BOTTOM}"><title>{safe(f"step {step}: {text}")}</title></line>'
            for step, kind, text in lines
            if low <= step <= high
        )

    def curves(self) -> str:
        parts = []
        for curve in self._curves:
            if curve.band:
                below, above = (thinned(points) for points in curve.band)
                outline = self._path([*above, *reversed(below)])
                parts.append(f'<path class="band {curve.color}" d="{outline}Z"/>')
            points = thinned(curve.points)
            parts.append(f'<path class="curve {curve.color}" d="{self._path(points)}"/>')
            if len(points) == 1 or (curve.dots and len(points) <= MAX_TITLES):
                parts += [
                    f'<circle class="point {curve.color}" cx="{self.x(step):.1f}" cy="{self.y(value):.1f}" '
                    'r="2.6"/>'
                    for step, value in points
                ]
        return "".join(parts)

    def stack(self) -> str:
        steps = sorted(self._totals())
        width = 0.8 * (WIDTH - LEFT - RIGHT) / max(len(steps), 2)
        parts, bottom = [], dict.fromkeys(steps, 0.0)
        for curve in self._curves:
            for step, value in curve.points:
                x = min(max(self.x(step) - width / 2, LEFT), WIDTH - RIGHT - width)
                top, base = self.y(bottom[step] + value), self.y(bottom[step])
                bottom[step] += value
                parts.append(
                    f'<rect class="bar {curve.color}" x="{x:.1f}" y="{top:.1f}" width="{width:.1f}" '
                    f'height="{base - top:.1f}"/>'
                )
        return "".join(parts)

    def titles(self) -> str:
        """Strips that say the values of a step where the pointer is."""
        steps = sorted({step for curve in self._curves for step, _ in curve.points})
        steps = steps[:: math.ceil(len(steps) / MAX_TITLES)]
        by_step: dict[float, list[str]] = {step: [] for step in steps}
        for curve in self._curves:
            for step, value in curve.points:
                if step in by_step:
                    by_step[step].append(f"{curve.label}: {self._panel.number(value)}")
        edges = [LEFT, *(self.x((a + b) / 2) for a, b in zip(steps, steps[1:], strict=False)), WIDTH - RIGHT]
        return "".join(
            f'<rect class="hit" x="{left:.1f}" y="{TOP}" width="{max(0.0, right - left):.1f}" '
            f'height="{HEIGHT - TOP - BOTTOM}"><title>{safe("\n".join([f"step {step:g}", *by_step[step]]))}'
            "</title></rect>"
            for step, left, right in zip(steps, edges, edges[1:], strict=False)
        )

    def _path(self, points: Points) -> str:
        return "M" + "L".join(f"{self.x(step):.1f} {self.y(value):.1f}" for step, value in points)


def _values(curve: Curve) -> list[float]:
    bounds = curve.band or ([], [])
    return [value for points in (curve.points, *bounds) for _, value in points]


def thinned(points: Points, limit: int = MAX_POINTS) -> Points:
    """At most about `limit` points: the lowest and the highest of every stretch, so that no peak is lost."""
    if len(points) <= limit:
        return points
    size = math.ceil(len(points) / (limit // 2))
    kept = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        kept += sorted({min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])})
    return kept


def _binned(curve: Curve, limit: int) -> Curve:
    """The curve with the mean of every stretch, at most `limit` points."""
    size = math.ceil(len(curve.points) / limit)
    parts = [curve.points[start : start + size] for start in range(0, len(curve.points), size)]
    means = [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]
    return Curve(curve.label, means, curve.color)


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from at most `low` to at least `high`."""
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        margin = abs(high) / 2 or 0.5
        low, high = low - margin, high + margin
    rough = (high - low) / (NUM_TICKS - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten from at most `low` to at least `high`, at most about NUM_TICKS + 1."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    stride = math.ceil((last - first) / NUM_TICKS)
    return [10.0**power for power in range(first, last + stride, stride)]


def step_ticks(low: float, high: float) -> list[int]:
    """Whole steps within the range."""
    return sorted({round(tick) for tick in ticks(low, high) if low <= round(tick) <= high})
