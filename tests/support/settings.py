"""Settings of a few values, without the command line of a whole run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

CONCERNS = (
    "trainer",
    "data",
    "rollout",
    "responses",
    "rewards",
    "engines",
    "sync",
    "save",
    "run",
    "loss",
    "megatron",
)


class flat_settings:  # noqa: N801: used like a function
    """In the place of TrainSettings: every concern has all values, which are called as the flags are.

    Example: flat_settings(max_staleness=2).rollout.max_staleness == 2
    """

    def __init__(self, **values: Any):
        self.values = SimpleNamespace(**values)
        for name in CONCERNS:
            setattr(self, name, self.values)
        self.distillation = SimpleNamespace(
            teachers=(), num_engines=0, engine_size=lambda of_rollout: of_rollout, **values
        )
        self.code_rewards = SimpleNamespace(function=lambda: None)
        self.eval = SimpleNamespace(**{name.removeprefix("eval_"): value for name, value in values.items()})

    def as_run(self) -> flat_settings:
        return self

    def going_on_from(self, load: str | None, step: int | None) -> flat_settings:
        return flat_settings(**vars(self.values) | {"load": load, "ckpt_step": step})
