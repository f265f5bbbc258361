"""The study's tables, in Markdown, from its runs. Accuracies are percent of the held-out prompts."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace

import design
from design import Variant
from judge import Record, collapsed, final_accuracy, harmed, works
from trial import Trial

# 97.5% quantiles of Student's t for 2 to 4 runs
T_QUANTILES = {2: 12.706, 3: 4.303, 4: 3.182}

Runs = dict[str, Record]  # by key


def tables(runs: Runs, real_stack: Runs) -> str:
    """All of them; what has not been run is a dash. `real_stack` are the runs of real_stack.py."""
    parts = [
        ("Tuned: fresh seeds and test prompts at each cell's best learning rate", _tuned(runs)),
        ("Shared: the learning rate that is best at N = 1", _shared(runs)),
        ("Window: learning rates that work (tuning runs, see judge.py)", _window(runs)),
        (f"More losses at N = {design.ONE_N}", _one_n(runs)),
        (f"Longer runs at N = {design.ONE_N}: {design.LONG_STEPS} steps", _long(runs)),
        (f"Engine mismatch at N = {design.MISMATCH_N}", _mismatch(runs)),
        (
            f"The same with SGLang and several ranks, at N = {design.REAL_STACK_N}",
            _real_stack(runs, real_stack),
        ),
    ]
    return "\n".join(f"### {title}\n\n{table}\n" for title, table in parts)


def summary(records: Sequence[Record]) -> str:
    """Mean and 95% interval of the final accuracies; collapsed and harmed runs are counted."""
    if not records:
        return "-"
    values = [100 * final_accuracy(record) for record in records]
    text = f"{statistics.mean(values):.1f}"
    if len(values) > 1:
        spread = T_QUANTILES[len(values)] * statistics.stdev(values) / len(values) ** 0.5
        text += f" ± {spread:.1f}"
    for what, count in (
        ("collapsed", sum(map(collapsed, records))),
        ("harmed", sum(map(harmed, records))),
    ):
        text += f", {count} {what}" if count else ""
    return text


def tuned_learning_rate(runs: Runs, variant: Variant, n: int) -> float | None:
    """None until all tuning runs of the cell are there."""
    keys = [trial.key for trial in design.tuning_trials(variant, n)]
    return design.best_learning_rate([runs[key] for key in keys]) if all(map(runs.get, keys)) else None


def real_stack_trials(runs: Runs) -> list[Trial]:
    """At the learning rates that the first table has; seed by seed, so that the first two compare losses."""
    rates = [(v, tuned_learning_rate(runs, v, design.REAL_STACK_N)) for v in design.REAL_STACK_METHODS]
    trials = [design.real_stack_trials(variant, lr) for variant, lr in rates if lr is not None]
    return [trial for of_one_seed in zip(*trials, strict=True) for trial in of_one_seed]


def test_runs(
    runs: Runs, variant: Variant, n: int, lr: float, num_steps: int = Trial.num_steps
) -> list[Record]:
    """Finished ones, whatever they were made for."""
    trials = [
        Trial(variant.method, n, lr, seed, "test", num_steps, variant.options) for seed in design.TEST_SEEDS
    ]
    return [runs[trial.key] for trial in trials if trial.key in runs]


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _tuned_cell(runs: Runs, variant: Variant, n: int) -> str:
    lr = tuned_learning_rate(runs, variant, n)
    if lr is None:
        return "-"
    return f"{summary(test_runs(runs, variant, n, lr))} ({_plain(lr)})"


def _plain(lr: float) -> str:
    return f"{lr:.0e}".replace("e-0", "e-")


def _header(first: str) -> list[str]:
    return [first, *(f"N = {n}" for n in design.STALENESS)]


def _tuned(runs: Runs) -> str:
    rows = [
        [variant.label, *(_tuned_cell(runs, variant, n) for n in design.STALENESS)]
        for variant in design.VARIANTS
    ]
    return _markdown(_header("loss"), rows)


def _shared(runs: Runs) -> str:
    lr = design.on_policy_learning_rate(runs)
    if lr is None:
        return "-\n"
    rows = [
        [variant.label, *(summary(test_runs(runs, variant, n, lr)) for n in design.STALENESS)]
        for variant in design.VARIANTS
    ]
    return f"Learning rate {lr:g}.\n\n" + _markdown(_header("loss"), rows)


def _window(runs: Runs) -> str:
    on_policy = [runs[t.key] for t in design.tuning_trials(design.VARIANTS[0], 1) if t.key in runs]
    best = max(map(final_accuracy, on_policy), default=0.0)

    def cell(variant: Variant, n: int) -> str:
        tuning = [runs[t.key] for t in design.tuning_trials(variant, n) if t.key in runs]
        if not tuning:
            return "-"
        working = [f"{record['lr']:g}" for record in tuning if works(record, best)]
        return f"{len(working)} of {len(tuning)}: {', '.join(working) or 'none'}"

    rows = [
        [variant.label, *(cell(variant, n) for n in design.STALENESS)]
        for variant in (*design.VARIANTS, *design.ONE_N_VARIANTS)
    ]
    return _markdown(_header("loss"), rows)


def _one_n(runs: Runs) -> str:
    shared = design.on_policy_learning_rate(runs)
    rows = [
        [
            variant.label,
            _tuned_cell(runs, variant, design.ONE_N),
            summary(test_runs(runs, variant, design.ONE_N, shared)) if shared else "-",
        ]
        for variant in (*design.VARIANTS, *design.ONE_N_VARIANTS)
    ]
    return _markdown(["loss", "tuned", "shared learning rate"], rows)


def _long(runs: Runs) -> str:
    rows = []
    for variant in design.VARIANTS:
        row = [variant.label]
        for lr in (tuned_learning_rate(runs, variant, design.ONE_N), design.on_policy_learning_rate(runs)):
            found = test_runs(runs, variant, design.ONE_N, lr, design.LONG_STEPS) if lr else []
            row.append(f"{summary(found)} ({_plain(lr)})" if found else "-")
        rows.append(row)
    return _markdown(["loss", "tuned", "shared learning rate"], rows)


def _mismatch(runs: Runs) -> str:
    rows = []
    for engine, cases in design.MISMATCH_OPTIONS.items():
        for label, options in cases.items():
            row = [engine, label]
            for variant in design.MISMATCH_METHODS:
                trials = design.mismatch_trials(
                    variant, tuned_learning_rate(runs, variant, design.MISMATCH_N)
                )
                chosen = [t for t in trials if t.engine == engine and t.options == options]
                row.append(summary([runs[t.key] for t in chosen if t.key in runs]))
            rows.append(row)
    return _markdown(["engine", "W against", *(v.label for v in design.MISMATCH_METHODS)], rows)


def _real_stack(runs: Runs, real_stack: Runs) -> str:
    """The in-process engine judges both; SGLang's own evaluations draw other samples of the same prompts."""
    rows = []
    labels = {variant.method: variant.label for variant in design.REAL_STACK_METHODS}
    for trial in real_stack_trials(runs):
        in_process, real = runs.get(replace(trial, engine="exact").key), real_stack.get(trial.key)
        values = (
            in_process and in_process["accuracy"][-1],
            real and real["exported_accuracy"],
            in_process and in_process["reward"][-1],
            real and real["reward"][-1],
            real and final_accuracy(real),
        )
        cells = [f"{100 * value:.1f}" if value is not None else "-" for value in values]
        rows.append([labels[trial.method], str(trial.seed), *cells])
    header = [
        "last accuracy, in process",
        "SGLang",
        "last reward, in process",
        "SGLang",
        "SGLang's own final",
    ]
    return _markdown(["loss", "seed", *header], rows)
