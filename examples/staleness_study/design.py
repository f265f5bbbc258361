"""Which runs the study is made of. Later ones depend on what earlier ones found, and on nothing else.

tuning      every variant and N with every learning rate, judged on the tuning prompts
test        fresh seeds at each variant's best learning rate, judged on the test prompts
shared      fresh seeds at the learning rate that is best at N = 1, where it is not the variant's own
long        three times the optimizer steps at N = 64, so that speed is not sold as stability; at either rate
mismatch    engines unlike the trainer, crossed with the denominator of W and with corrections

and real stack, which real_stack.py runs: cells of the first table with SGLang and several trainer ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from judge import Record, collapsed, final_accuracy
from trial import Trial

LEARNING_RATES = (1e-4, 2e-4, 4e-4, 8e-4)
TUNING_SEED = 0
TEST_SEEDS = (101, 102, 103, 104)
SHARED_SEEDS = TEST_SEEDS
LONG_STEPS, LONG_SEEDS = 768, TEST_SEEDS[:2]
MISMATCH_SEEDS = TEST_SEEDS[:3]
STALENESS = (1, 4, 16, 64)  # N
ONE_N = 64  # where the variants of `ONE_N_VARIANTS` are run
MISMATCH_N = 16


@dataclass(frozen=True)
class Variant:
    """A row of the table: a policy loss and its options."""

    label: str
    method: str
    options: tuple[str, ...] = ()


# 50 times GSPO's published range: 65 tokens may then differ by as much in log W as 3,250 tokens there
SCALED_RANGE = ("--clip-range", "0.015", "0.02")

VARIANTS = (
    Variant("VESPO", "vespo"),
    Variant("sequence IS", "sequence-is"),
    Variant("GRPO", "grpo"),
    Variant("SAPO", "sapo"),
    Variant("GSPO", "gspo"),
    Variant("GSPO, length-scaled", "gspo", SCALED_RANGE),
)
ONE_N_VARIANTS = (
    Variant("REINFORCE", "reinforce"),
    Variant("CISPO", "cispo"),
    Variant("TOPR", "topr"),
    Variant("BAPO", "bapo"),
    Variant("VESPO / T", "vespo-mean"),
    Variant("VESPO / sqrt T", "vespo-sqrt"),
)
# with W = 1 all losses have one gradient (a test shows it); the second one is there to see just that
ON_POLICY_VARIANTS = (VARIANTS[0], VARIANTS[2])

RECOMPUTED, ROLLOUT = ("--ratio-denominator", "recomputed"), ("--ratio-denominator", "rollout")
MISMATCH_METHODS = (VARIANTS[0], VARIANTS[2])
MISMATCH_OPTIONS = {
    "fp8": {"recomputed": RECOMPUTED, "rollout": ROLLOUT},
    "router-noise": {
        "recomputed": RECOMPUTED,
        "recomputed + TIS": (*RECOMPUTED, "--mismatch-correction", "tis"),
        "recomputed + R2": (*RECOMPUTED, "--routing-replay", "R2"),
        "recomputed + R3": (*RECOMPUTED, "--routing-replay", "R3"),
        "rollout": ROLLOUT,
        "rollout + R3": (*ROLLOUT, "--routing-replay", "R3"),
    },
}
REAL_STACK_N, REAL_STACK_SEEDS = 16, TEST_SEEDS[:2]
REAL_STACK_METHODS = (VARIANTS[0], VARIANTS[2])


def cells() -> list[tuple[Variant, int]]:
    """Every (variant, N) of the main table, what separates most first."""
    main = [(variant, n) for n in reversed(STALENESS) if n > 1 for variant in VARIANTS]
    on_policy = [(variant, 1) for variant in ON_POLICY_VARIANTS]
    return [*on_policy, *main, *((variant, ONE_N) for variant in ONE_N_VARIANTS)]


def trials(records: Iterable[Record]) -> list[Trial]:
    """All runs that `records` of finished ones allow to name, in the order they should be made."""
    done = {record["key"]: record for record in records}
    first, later = [], []
    for variant, n in cells():
        tuning = tuning_trials(variant, n)
        first += tuning
        if all(trial.key in done for trial in tuning):
            lr = best_learning_rate([done[trial.key] for trial in tuning])
            first += [Trial(variant.method, n, lr, s, "test", options=variant.options) for s in TEST_SEEDS]
            if n == ONE_N and variant in VARIANTS:
                # its own rate may win the short race alone
                later += [
                    Trial(variant.method, n, rate, s, "test", LONG_STEPS, variant.options)
                    for rate in sorted({lr, on_policy_learning_rate(done) or lr})
                    for s in LONG_SEEDS
                ]
            if n == MISMATCH_N and variant in MISMATCH_METHODS:
                later = mismatch_trials(variant, lr) + later
    return first + _shared(done) + later


def tuning_trials(variant: Variant, n: int) -> list[Trial]:
    return [
        Trial(variant.method, n, lr, TUNING_SEED, "tuning", options=variant.options) for lr in LEARNING_RATES
    ]


def best_learning_rate(tuning: list[Record]) -> float:
    """Of the runs that did not collapse, if there are any, the one with the highest final accuracy."""
    standing = [record for record in tuning if not collapsed(record)] or tuning
    return max(standing, key=final_accuracy)["lr"]


def on_policy_learning_rate(done: dict[str, Record]) -> float | None:
    """The best one at N = 1, once it is known."""
    tuning = [trial.key for trial in tuning_trials(ON_POLICY_VARIANTS[0], 1)]
    return best_learning_rate([done[key] for key in tuning]) if all(key in done for key in tuning) else None


def _shared(done: dict[str, Record]) -> list[Trial]:
    lr = on_policy_learning_rate(done)
    if lr is None:
        return []
    return [
        Trial(variant.method, n, lr, seed, "test", options=variant.options)
        for variant, n in cells()
        if n > 1
        for seed in SHARED_SEEDS
    ]


def mismatch_trials(variant: Variant, lr: float) -> list[Trial]:
    """Every engine and way of dealing with it."""
    return [
        Trial(
            variant.method, MISMATCH_N, lr, seed, "test", options=(*variant.options, *options), engine=engine
        )
        for engine, cases in MISMATCH_OPTIONS.items()
        for options in cases.values()
        for seed in MISMATCH_SEEDS
    ]


def real_stack_trials(variant: Variant, lr: float) -> list[Trial]:
    return [
        Trial(variant.method, REAL_STACK_N, lr, seed, "test", options=variant.options, engine="sglang")
        for seed in REAL_STACK_SEEDS
    ]
