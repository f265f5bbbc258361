"""Checks a rollout batch's metrics by rules that say what is wrong and what to do about it.

A rule gets the batch's metrics and those of the batches before it, oldest first. A metric that is missing or
NaN raises no alarm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

Metrics = Mapping[str, float]

REPEAT_AFTER = 20  # batches between two reports of an alarm: rare enough to be read

# If half of a kind of sequences teaches nothing, the loss filters by length, which nobody asked it to do.
DEAD_SHARE, DEAD_SAMPLES = 0.5, 16  # with fewer samples, one dead sample moves the share by over 6%
# If a tenth of the samples does all the work, the gradient is that of a batch ten times smaller.
ESS = 0.1
# A main cause explains this share of var(log W), of the engine's gap (rounding) or of the dead (correction).
MAIN_CAUSE = 0.5
# "The start" is this many batches: one alone is noisy, more would average over what has been learned.
FIRST_BATCHES = 5
ENTROPY_COLLAPSE = 0.1  # of the start's entropy: sampling hardly varies any more
SOLVED_REWARD = 0.9  # with 0/1 rewards: such a policy may be certain, and most groups are equal
ENTROPY_EXPLOSION = (2.0, 0.5)  # times the start's entropy, and nats above it: low entropies double easily
# In healthy runs the norms of the last batches vary by a factor of two or three.
SPIKE, SPIKE_WINDOW, SPIKE_MIN_BATCHES = 5.0, 20, 10
# sigma sqrt(T) at which a fifth of VESPO's negatives would be dead, if log W were normal with mean -var/2:
# 0.03 per token at 2,048 tokens, 0.01 at 18,000.
LOG_W_SPREAD = 1.4
EQUAL_GROUPS = 0.9  # above it, less than a tenth of the generated groups teaches
TRUNCATED = 0.5  # above it, more rewards judge the length limit than the answer
# For means of five batches, half of the best mean is far outside the noise, even of small batches.
REWARD_BATCHES, REWARD_DROP = 5, 0.5
# Times the best mean of five batches, and nats per token above it: a small reverse KL doubles easily.
TEACHER_BATCHES, TEACHER_RISE = 5, (2.0, 0.1)

_GO_BACK = " (the same --load, and --ckpt-step N)"


AGAINST_ROUNDING = (
    "neither fewer --steps-per-rollout nor a lower --lr can change it; where the model has experts, "
    "--routing-replay R2 or R3 lowers it"
)


@dataclass(frozen=True)
class Alarm:
    """What one rule has found."""

    name: str  # also of the metric `alarm/<name>`
    message: str
    advice: str

    def __str__(self) -> str:
        return f"{self.message}: {self.advice}"


def check(metrics: Metrics, history: Sequence[Metrics]) -> list[Alarm]:
    """The alarms of a batch; `history` holds the batches before it."""
    found = (rule(metrics, history) for rule in RULES)
    return [alarm for alarm in found if alarm is not None]


def is_news(alarm: Alarm, history: Sequence[Metrics]) -> bool:
    """Whether to report the alarm: it is new, or was last reported at least REPEAT_AFTER batches ago.

    A batch's metrics contain `alarm/<name>` if the alarm was on. An alarm that comes and goes, with a metric
    near its bound, is reported no more often than one that stays.
    """
    said = -REPEAT_AFTER
    for index, metrics in enumerate(history):
        if f"alarm/{alarm.name}" in metrics and index - said >= REPEAT_AFTER:
            said = index
    return len(history) - said >= REPEAT_AFTER


def _get(metrics: Metrics, name: str) -> float:
    return metrics.get(name, math.nan)  # every comparison with NaN is false


def _known(history: Sequence[Metrics], name: str) -> list[float]:
    return [metrics[name] for metrics in history if math.isfinite(_get(metrics, name))]


def _cause(metrics: Metrics, dead: bool) -> tuple[str, str]:
    """The main cause of the spread of log W, and its remedy. A correction may have caused dead samples."""
    corrected = _get(metrics, "mismatch/dead_share")
    if dead and corrected > MAIN_CAUSE:
        # a correction multiplies the weight: log W need not contain the mismatch that it rejects
        return (
            f"--mismatch-correction alone kills {corrected:.0%} of the dead",
            "use --routing-replay R3, the same precision in engine and trainer, or wider --mismatch-bounds",
        )
    share, floor = _get(metrics, "ratio/mismatch_share"), metrics.get("ratio/floor_share", 0.0)
    against_mismatch = "use --ratio-denominator recomputed or --routing-replay R3"
    against_staleness = "use fewer --steps-per-rollout or a lower --lr"
    remedies = {"staleness": against_staleness, "mismatch": against_mismatch, "rounding": AGAINST_ROUNDING}
    known = not math.isnan(share)
    shares = {"staleness": 1 - share - floor, "mismatch": share, "rounding": floor}
    main = max(shares, key=lambda cause: shares[cause]) if known else "rounding"
    if known or floor > MAIN_CAUSE:
        return f"{main} explains {shares[main]:.0%} of var(log W)", remedies[main]
    return (
        "what spreads log W is not known",
        f"if `ratio/engine_gap_std` is large, {against_mismatch}; else {against_staleness}",
    )


def passes_differ(metrics: Metrics, history: Sequence[Metrics]) -> Alarm | None:
    """Two passes with the same weights and packs differ. Every later W contains this difference."""
    worst = _get(metrics, "check/unchanged_log_w_abs_max")
    if not worst > 0.0:
        return None
    return Alarm(
        "passes_differ",
        f"log W of the first mini-batch, whose policy has not moved, is up to {worst:.2g}, it must be 0",
        "two passes of the trainer are not the same computation, and all W have that in them: see python "
        "patches/apply.py check, and Transformer Engine with --moe-permute-fusion on GPUs",
    )


def dead_sequences(metrics: Metrics, history: Sequence[Metrics]) -> Alarm | None:
    """Too many dead sequences, in the worst kind by sign of the advantage and length."""
    prefix = "weight/dead_share/"
    shares = {}
    for name, share in metrics.items():
        kind = name.removeprefix(prefix)
        if name.startswith(prefix) and _get(metrics, f"weight/count/{kind}") >= DEAD_SAMPLES:
            shares[kind] = share
    worst = max(shares, key=lambda kind: shares[kind], default="")
    if not shares.get(worst, math.nan) > DEAD_SHARE:
        return None
    sign, bucket = worst.split("/")
    explained, advice = _cause(metrics, dead=True)
    message = f"{shares[worst]:.0%} of {sign} sequences of {bucket} tokens are dead; {explained}"
    return Alarm("dead_sequences", message, advice)


def ess_collapse(metrics: Metrics, history: Sequence[Metrics]) -> Alarm | None:
    if not _get(metrics, "weight/ess") < ESS:
        return None
    explained, advice = _cause(metrics, dead=_get(metrics, "weight/dead_share") > DEAD_SHARE)
    message = f"the effective sample size is {metrics['weight/ess']:.1%} of the samples; {explained}"
    parts = {name: value for name, value in metrics.items() if name.startswith("weight/ess/mini_batch_")}
    if parts:
        worst = min(parts, key=lambda name: parts[name])
        message += f"; {worst.rpartition('/')[2].replace('_', '-', 1).replace('_', ' ')} is the worst"
    return Alarm("ess_collapse", message, advice)


def entropy_collapse(metrics: Metrics, history: Sequence[Metrics]) -> Alarm | None:
    """Entropy far below the start's. Skips a policy that has solved its task: it has nothing to explore."""
    start, now = _at_start(history, "train/entropy"), _get(metrics, "train/entropy")
    if not now < ENTROPY_COLLAPSE * start or _get(metrics, "reward/mean") >= SOLVED_REWARD:
        return None
    return Alarm(
        "entropy_collapse",
        f"entropy is {now:.3g} nats per token, {now / start:.0%} of the run's first batches'",
        "the policy no longer explores: use a lower --lr, or go back to a checkpoint before it fell"
        + _GO_BACK,
    )


def entropy_explosion(metrics: Metrics, history: Sequence[Metrics]) -> Alarm | None:
    start, now = _at_start(history, "train/entropy"), _get(metrics, "train/entropy")
    factor, margin = ENTROPY_EXPLOSION
    if not now > max(factor * start, start + margin):
        return None
    return Alarm(
        "entropy_explosion",
        f"entropy is {now:.3g} nats per token, {now / start:.1f} times the run's first batches'",
        "the policy forgets how to write: use a lower --lr or fewer --steps-per-rollout, from a checkpoint "
        f"before it rose{_GO_BACK}",
    )


def _at_start(history: Sequence[Metrics], name: str) -> float:
    first = _known(history, name)[:FIRST_BATCHES]
    return fmean(first) if len(first) == FIRST_BATCHES else math.nan


def gradient_spike(metrics: Metrics, history: Sequence[Metrics]) -> Alarm | None:
    """Norm far above the median of the last batches. Names the model part whose square has grown most."""
    usual, now = _median(history, "train/grad_norm_max"), _get(metrics, "train/grad_norm_max")
    if not now > SPIKE * usual > 0.0:
        return None
    growth = {
        name.removeprefix("gradient/"): value**2 - _median(history, name, missing=0.0) ** 2
        for name, value in metrics.items()
        if name.startswith("gradient/")
    }
    thirds = {name: value for name, value in growth.items() if name.endswith("_third")}
    parts = {name: value for name, value in growth.items() if name not in thirds}
    where = [max(found, key=lambda name: found[name]) for found in (parts, thirds) if found]
    place = f", most of it in {where[0]}" if where else ""
    place += f" and the {where[1].replace('_', ' ')} of the layers" if len(where) > 1 else ""
    return Alarm(
        "gradient_spike",
        f"a gradient norm of {now:.3g} is {now / usual:.1f} times the usual {usual:.3g}{place}",
        "use a lower --clip-grad or --lr" + _SPIKE_ADVICE.get(where[0] if where else "", ""),
    )


_SPIKE_ADVICE = {"router": ", and --routing-replay, as the router is where it comes from"}


def _median(history: Sequence[Metrics], name: str, missing: float = math.nan) -> float:
    recent = _known(history[-SPIKE_WINDOW:], name)
    return median(recent) if len(recent) >= SPIKE_MIN_BATCHES else missing


def engine_mismatch(metrics: Metrics, history: Sequence[Metrics]) -> Alarm | None:
    """Large spread of log W by the log-normal model: log W of T tokens spreads by sigma sqrt(T)."""
    sigma, length = _get(metrics, "ratio/engine_token_sigma"), _get(metrics, "response/length_p90")
    spread = sigma * math.sqrt(length) if length > 0 else math.nan
    if not spread > LOG_W_SPREAD:
        return None
    if _get(metrics, "ratio/mismatch_std") > 0.0:
        advice = "it is in W: use --ratio-denominator recomputed or --routing-replay R3"
    else:
        advice = "it is not in W, but the samples are another policy's: use --routing-replay R3"
    rounding = _get(metrics, "ratio/floor_token_sigma") ** 2 / 2 / sigma**2  # of one pass, not two
    if rounding > MAIN_CAUSE:
        advice = f"the trainer's own rounding explains {min(rounding, 1.0):.0%} of it: {AGAINST_ROUNDING}"
    age = _get(metrics, "staleness/asynchronous_mean")
    if age > 0.0:
        advice = f"samples are {age:.1f} steps old, which is in it unless --old-policy snapshot; {advice}"
    return Alarm(
        "engine_mismatch",
        f"engine and trainer differ by sigma {sigma:.2g} a token, which spreads log(pi_old / mu) of "
        f"responses of {length:,.0f} tokens by {spread:.1f}",
        f"{advice}, and the same precision in engine and trainer",
    )


def equal_groups(metrics: Metrics, history: Sequence[Metrics]) -> Alarm | None:
    share, reward = _get(metrics, "rollout/zero_advantage_share"), _get(metrics, "reward/mean")
    if not share > EQUAL_GROUPS or "distillation/reverse_kl" in metrics:  # a teacher teaches them
        return None
    if reward >= SOLVED_REWARD:
        advice = f"they are solved, the mean reward is {reward:.2f}: take harder prompts or end the run"
    elif "rollout/generated_prompts" in metrics:  # --dynamic-sampling replaces such groups
        advice = f"the mean reward is {reward:.2f}: take easier prompts or more --group-size"
    else:
        advice = f"the mean reward is {reward:.2f}: use --dynamic-sampling or more --group-size"
    reason = "all rewards are equal"
    if "pairs/paired_share" in metrics:  # equal-length-pairs asks for more
        reason, advice = "no two responses are a pair", f"{advice}, or a larger --pair-length-gap"
    return Alarm("equal_groups", f"in {share:.0%} of the groups {reason}, they teach nothing", advice)


def truncated_responses(metrics: Metrics, history: Sequence[Metrics]) -> Alarm | None:
    share = _get(metrics, "response/truncated_share")
    if not share > TRUNCATED:
        return None
    return Alarm(
        "truncated_responses",
        f"{share:.0%} of the responses reach --max-completion-tokens",
        "raise it, or make responses end: a truncated one is judged by where it was cut",
    )


def reward_collapse(metrics: Metrics, history: Sequence[Metrics]) -> Alarm | None:
    """The mean reward of the last batches is far below the best such mean so far."""
    rewards = _known([*history, metrics], "reward/mean")
    means = [fmean(rewards[i - REWARD_BATCHES : i]) for i in range(REWARD_BATCHES, len(rewards) + 1)]
    if len(means) < 2 or not math.isfinite(_get(metrics, "reward/mean")):
        return None
    best, now = max(means), means[-1]
    if not best - now > REWARD_DROP * abs(best):
        return None
    return Alarm(
        "reward_collapse",
        f"the mean reward of {REWARD_BATCHES} batches fell to {now:.3g}, the best was {best:.3g}",
        f"go back to a checkpoint before it fell{_GO_BACK}, with a lower --lr or fewer --steps-per-rollout",
    )


def distillation_diverges(metrics: Metrics, history: Sequence[Metrics]) -> Alarm | None:
    """The reverse KL to the teacher is far above its lowest so far: the policy leaves the teacher."""
    name = "distillation/reverse_kl"
    values = _known([*history, metrics], name)
    means = [fmean(values[i - TEACHER_BATCHES : i]) for i in range(TEACHER_BATCHES, len(values) + 1)]
    if len(means) < 2 or not math.isfinite(_get(metrics, name)):
        return None
    best, now, (factor, margin) = min(means), means[-1], TEACHER_RISE
    if not now > max(factor * best, best + margin):
        return None
    return Alarm(
        "distillation_diverges",
        f"the mean reverse KL to the teacher of {TEACHER_BATCHES} batches rose to {now:.3g} nats per token, "
        f"the lowest was {best:.3g}",
        "the policy leaves its teacher: use a lower --lr, fewer --steps-per-rollout or --distillation-clip; "
        f"if rewards lead it away, a lower --reward-coefficient, from a checkpoint before it rose{_GO_BACK}",
    )


RULES = (
    passes_differ,
    dead_sequences,
    ess_collapse,
    entropy_collapse,
    entropy_explosion,
    gradient_spike,
    engine_mismatch,
    equal_groups,
    truncated_responses,
    reward_collapse,
    distillation_diverges,
)
