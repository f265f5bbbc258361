"""Which metrics and phases the display of a run shows, and how they are written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass
from math import isfinite

from megatron_vespo.observability.mean_rewards import are_shares


@dataclass(frozen=True)
class Row:
    """One displayed metric. Plain mode keeps the width in `format`; the live panel strips the padding."""

    metric: str
    label: str  # in the live panel
    format: str
    column: str = ""  # heading in plain mode; rows without one are on the live panel only
    spread: str = ""  # metric shown after "±"; in plain mode a column of its own, "std"
    number_format: str = ""  # of a share that turns out to be none: a mean reward

    @property
    def spread_format(self) -> str:
        return self.format.lstrip("+")

    def format_for(self, values: Iterable[float]) -> str:
        """The format of the row's values, of which `values` are the known ones."""
        return self.format if not self.number_format or are_shares(values) else self.number_format


ACCURACY = Row("eval/accuracy", "held-out accuracy", "8.1%", "held-out", number_format="8.3f")
ROWS = (
    Row("reward/mean", "reward", "7.3f", "reward"),
    ACCURACY,
    Row("response/length_mean", "response length", "7.1f", "length"),
    Row("response/truncated_share", "truncated", "6.1%"),
    Row("ratio/log_w_mean", "log W", "+8.4f", "logW", spread="ratio/log_w_std"),
    Row("weight/mean", "weight", "6.3f", "weight"),
    Row("weight/mean/positive", "weight, advantage > 0", "6.3f", "wght+"),
    Row("weight/mean/negative", "weight, advantage < 0", "6.3f", "wght-"),
    Row("weight/ess", "effective sample size", "6.3f", "ESS"),
    Row("weight/dead_share", "dead (weight near 0)", "6.1%", "dead"),
    Row("policy/lag_mean", "policy lag", "5.2f", "lag"),
    Row("train/grad_norm", "gradient norm", "7.3f"),
    Row("train/tokens_per_second", "tokens/s trained", "8,.0f", "trained/s"),
    Row("rollout/tokens_per_second", "tokens/s generated", "8,.0f", "sampled/s"),
    Row("check/max_logprob_difference", "max log-prob difference", "8.1e", "maxdiff"),
)
# A small terminal shows the first of these that fit; the accuracy has a line of its own.
IMPORTANCE = (
    "reward/mean",
    "ratio/log_w_mean",
    "weight/ess",
    "response/length_mean",
    "weight/dead_share",
    "train/grad_norm",
    "rollout/tokens_per_second",
    "train/tokens_per_second",
    "check/max_logprob_difference",
    "response/truncated_share",
    "weight/mean/negative",
    "weight/mean/positive",
    "weight/mean",
    "policy/lag_mean",
)
OF_TEACHERS = "teacher"  # a phase that most runs do not have: shown where it occurs
PHASE_COLUMNS = {  # phase of a step -> heading in plain mode; every other phase is start-up
    "generate": "gen",
    OF_TEACHERS: "teach",
    "reward": "rew",
    "log-probs": "logp",
    "train": "train",
    "sync": "sync",
    "save": "save",
    "evaluate": "eval",
}
PHASE_FORMAT = "5.1f"
BLOCKS = "▁▂▃▄▅▆▇█"


def shown_phases(history: Mapping[str, Sized]) -> list[str]:
    """The phases to show; `history` has the values of each metric so far."""
    return [name for name in PHASE_COLUMNS if name != OF_TEACHERS or history.get(f"time/{name}")]


def sparkline(values: list[float]) -> str:
    """One block per value, scaled to the range of the finite ones; a gap for NaN and infinities."""
    finite = [value for value in values if isfinite(value)]
    if not finite:
        return " " * len(values)
    low, span = min(finite), max(finite) - min(finite)
    scale = (len(BLOCKS) - 1) / span if span else 0.0
    return "".join(BLOCKS[round((value - low) * scale)] if isfinite(value) else " " for value in values)


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: 3723.0 -> "1:02:03"."""
    minutes, second = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"


def plain_cell(heading: str, format_spec: str, value: float | None) -> tuple[str, str]:
    """The heading, and the value (or "-") padded to the wider of heading and format."""
    width = max(len(heading), len(format(0.0, format_spec)))
    return heading, f"{'-' if value is None else format(value, format_spec):>{width}}"
