"""Compares what parallel layouts computed, and prints the differences as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from rich.console import Console
from rich.table import Table

# a gradient norm below this share of the whole gradient's norm is compared as if it were this large
SMALL_NORM = 1e-3
NO_TERMINAL_WIDTH = 180


@dataclass(frozen=True)
class StepMeasurement:
    """Measurements of one optimizer step on a layout."""

    log_w: np.ndarray  # float32 [num_samples]
    loss: float  # per token
    loss_terms: float  # the same with |phi A log pi| per token: the size of terms that cancel in the loss
    grad_norm: float  # of the whole gradient, before clipping
    parameter_norms: dict[str, float]  # the same, of each parameter's gradient


@dataclass(frozen=True)
class LayoutMeasurement:
    """Measurements of a layout on given weights and samples; the same on all its ranks."""

    steps: list[StepMeasurement]
    experts: list[np.ndarray]  # of every sample before step 1, integers [num_tokens, L, K] ascending in K


@dataclass(frozen=True)
class Differences:
    """Differences of a layout from the reference, the largest of all steps; also the type of the bounds."""

    log_w: float  # largest |difference| of a sequence's log W
    loss: float  # relative to the size of the reference's terms, which may cancel in the loss itself
    grad_norm: float  # relative to the reference's
    parameter_norm: float  # relative to the reference's, or to SMALL_NORM x the whole norm if larger
    experts: float  # share of (token, layer) pairs with other experts

    def above(self, bounds: Differences) -> list[str]:
        """Names of the measures outside `bounds`; NaN is outside."""
        return [f.name for f in fields(self) if not getattr(self, f.name) <= getattr(bounds, f.name)]


@dataclass(frozen=True)
class Row:
    """One layout of the table. The reference, or a layout that broke, has no differences."""

    layout: str
    num_ranks: int
    seconds: float
    differences: Differences | None = None
    worst_parameter: str = ""
    verdict: str = ""


def compare(reference: LayoutMeasurement, candidate: LayoutMeasurement) -> tuple[Differences, str]:
    """The differences, and the name of the parameter whose gradient norm differs most."""
    steps = list(zip(reference.steps, candidate.steps, strict=True))
    parameters = [item for ours, theirs in steps for item in _parameter_differences(ours, theirs).items()]
    worst_parameter, parameter_norm = max(parameters, key=lambda item: (math.isnan(item[1]), item[1]))
    pairs = zip(reference.experts, candidate.experts, strict=True)
    other_experts = np.concatenate([(ours != theirs).any(-1).ravel() for ours, theirs in pairs])
    # numpy's max propagates NaN; Python's may not
    differences = Differences(
        log_w=float(np.max([np.abs(theirs.log_w - ours.log_w) for ours, theirs in steps])),
        loss=float(np.max([_relative(theirs.loss, ours.loss, ours.loss_terms) for ours, theirs in steps])),
        grad_norm=float(
            np.max([_relative(theirs.grad_norm, ours.grad_norm, ours.grad_norm) for ours, theirs in steps])
        ),
        parameter_norm=parameter_norm,
        experts=float(other_experts.mean()),
    )
    return differences, worst_parameter


def _relative(value: float, reference: float, scale: float) -> float:
    """|value - reference| / scale; 0 if they are equal, also at a scale of 0."""
    if value == reference:
        return 0.0
    return abs(value - reference) / scale if scale else math.inf


def _parameter_differences(ours: StepMeasurement, theirs: StepMeasurement) -> dict[str, float]:
    names = ours.parameter_norms.keys()
    assert names == theirs.parameter_norms.keys(), names ^ theirs.parameter_norms.keys()
    return {
        name: _relative(theirs.parameter_norms[name], norm, max(norm, SMALL_NORM * ours.grad_norm))
        for name, norm in ours.parameter_norms.items()
    }


HEADINGS = (
    "layout", "ranks", "log W", "loss", "grad norm", "worst parameter", "its norm", "other experts", "s",
    "verdict",
)  # fmt: skip


def cells(row: Row) -> list[str]:
    """One cell per heading."""
    if row.differences is None:
        middle = [""] * 6
    else:
        d = row.differences
        numbers = [f"{value:.1e}" for value in (d.log_w, d.loss, d.grad_norm, d.parameter_norm)]
        middle = [*numbers[:3], row.worst_parameter, numbers[3], f"{d.experts:.3%}"]
    return [row.layout, str(row.num_ranks), *middle, f"{row.seconds:.0f}", row.verdict]


def caption(bounds: Differences, num_steps: int, num_samples: int) -> str:
    """Explains the columns and their bounds."""
    return (
        f"{num_samples} samples, {num_steps} optimizer step{'s' * (num_steps > 1)}; the worst of all steps, "
        f"against the first row. log W: largest difference of a sequence, bound {bounds.log_w:.1e}. "
        f"loss: relative to the size of its terms, as those of both signs cancel, bound {bounds.loss:.1e}. "
        f"grad norm: relative, bound {bounds.grad_norm:.1e}. worst parameter: whose gradient norm differs "
        f"most, relative to it or to {SMALL_NORM:g} of the whole norm where that is more, bound "
        f"{bounds.parameter_norm:.1e}. other experts: share of (token, layer) pairs, bound "
        f"{bounds.experts:.1e}."
    )


def print_table(rows: Sequence[Row], text: str) -> None:
    """Prints the table with `text` below it; if the output is no terminal, wide enough for all columns."""
    table = Table(caption=text, caption_justify="left")
    for number, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if number in (0, 5, 9) else "right", overflow="fold")
    for row in rows:
        table.add_row(*cells(row))
    console = Console()
    console.print(table) if console.is_terminal else Console(width=NO_TERMINAL_WIDTH).print(table)


def markdown(rows: Sequence[Row], text: str) -> str:
    """The same as a markdown table under its caption."""
    lines = [text, "", _line(HEADINGS), _line(["---"] * len(HEADINGS))]
    return "\n".join([*lines, *(_line(cells(row)) for row in rows), ""])


def _line(parts: Sequence[str]) -> str:
    return f"| {' | '.join(parts)} |"
