"""Says in words what a run is doing, how its engines are, and what is worth a look."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_vespo.observability.mean_rewards import mean_reward


@dataclass(frozen=True)
class EngineStates:
    """The engines of a run at one moment."""

    number: int
    serving: int  # get requests
    running: int  # serving, or ready but without the current weights
    starting: tuple[tuple[int, int], ...] = ()  # (engine, restart): restart 0 is the first start
    restarts: int = 0  # that every engine may have
    lost: tuple[int, ...] = ()  # engines whose restarts are used up

    def some(self, number: int) -> str:
        return f"{number} engine" if number == 1 else f"{number} engines"

    def restarting(self) -> list[str]:
        return [
            f"restarting engine {engine} (restart {restart} of {self.restarts})"
            for engine, restart in self.starting
            if restart
        ]

    def waiting(self) -> str:
        """Why nothing can be generated."""
        parts = [f"Waiting for engines: {self.running} of {self.number} ready", *self.restarting()]
        return ", ".join(parts)

    def condition(self) -> str:
        """One line about all engines; "" if there are none."""
        if not self.number:
            return ""
        if self.serving == self.number:
            return "1 engine serves" if self.number == 1 else f"all {self.number} engines serve"
        parts = [f"{self.serving} of {self.number} engines serve", *self.restarting()]
        parts += [f"engine {engine} is given up" for engine in self.lost]
        return ", ".join(parts)


NO_ENGINES = EngineStates(0, 0, 0)
PLAIN_WORDS = {  # of phases that count nothing
    "log-probs": "Preparing the batch and its log-probs",
    "save": "Saving a checkpoint",
    "export": "Exporting the model as a Hugging Face checkpoint",
    "start Ray": "Starting Ray",
    "start Megatron": "Starting the trainer",
}


@dataclass
class OpenPhase:
    """A phase that goes on; `done` of `total` is known where someone counts."""

    name: str
    done: int | None = None
    total: int = 0


@dataclass
class Background:
    """What generation beside training has ready for the next batch, in groups."""

    ready: int
    wanted: int


def sentence(phase: OpenPhase, engines: EngineStates, background: Background | None) -> str:
    """What goes on in the phase."""
    needed = {"generate": engines.serving, "evaluate": engines.serving, "sync": engines.running}
    if engines.number and needed.get(phase.name) == 0:
        return engines.waiting()
    if phase.name == "generate":
        return _generating(phase, engines, background)
    counted, done, total = phase.done is not None, phase.done or 0, phase.total
    match phase.name:
        case "teacher":
            return f"The teacher scores {total:,} responses: {done:,} done"
        case "reward":
            return f"Scoring {total:,} responses" if counted else "Scoring responses"
        case "train":
            return f"Training step {done + 1} of {total} in this batch" if counted else "Training"
        case "sync":
            return "Syncing weights" + (f" to {engines.some(engines.running)}" if engines.number else "")
        case "evaluate":
            counts = f": {done:,} of {total:,} responses" if counted else ""
            return f"Evaluating on held-out prompts{counts}"
        case "start SGLang":
            restarting = "".join(f", {text}" for text in engines.restarting())
            return f"Starting {engines.some(engines.number)}: {engines.running} ready{restarting}"
    return PLAIN_WORDS.get(phase.name) or phase.name[:1].upper() + phase.name[1:]


def _generating(phase: OpenPhase, engines: EngineStates, background: Background | None) -> str:
    if background is not None:
        return f"Waiting for a rollout batch: {background.ready} of {background.wanted} groups are ready"
    by = f" with {engines.some(engines.serving)}" if engines.number else ""
    if phase.done is None:
        return f"Generating responses{by}"
    return f"Generating {phase.total:,} responses{by}: {phase.done:,} done"


@dataclass
class Noteworthy:
    """Collects what a person should know beside the newest numbers."""

    on: dict[str, int] = field(default_factory=dict)  # alarm -> the step since which it is on
    last: tuple[str, int] | None = None  # the last alarm that went off, and when it had come on
    failed_rewards: int = 0  # of the last batch
    accuracies: list[float] = field(default_factory=list)  # the first and the newest one
    saved: tuple[int, float] | None = None  # optimizer step of the last checkpoint, seconds

    def update(self, step: int, metrics: dict[str, float]) -> None:
        """Takes the metrics of a rollout batch."""
        on = {name.removeprefix("alarm/") for name in metrics if name.startswith("alarm/")}
        for name in self.on.keys() - on:
            self.last = name, self.on[name]
        self.on = {name: self.on.get(name, step) for name in sorted(on)}
        counts = (metrics.get(f"reward/{kind}_count", 0.0) for kind in ("error", "timeout"))
        self.failed_rewards = round(sum(count for count in counts if count > 0))  # NaN is not
        self.evaluated(metrics)

    def evaluated(self, metrics: dict[str, float]) -> None:
        if (accuracy := metrics.get("eval/accuracy")) is not None:
            self.accuracies = [*self.accuracies[:1], accuracy]

    def accuracy(self) -> str:
        if not self.accuracies:
            return ""
        known = self.accuracies
        was = f" (was {mean_reward(known[0], known)})" if len(known) > 1 else ""
        return f"held-out accuracy {mean_reward(known[-1], known)}{was}"

    def checkpoint(self, now: float) -> str:
        if self.saved is None:
            return ""
        step, when = self.saved
        hours, minutes = divmod(int(now - when) // 60, 60)
        ago = f"{hours} h {minutes} min ago" if hours else f"{minutes} min ago" if minutes else "just now"
        return f"last checkpoint: step {step}, {ago}"

    def warnings(self) -> list[str]:
        """Lines about alarms and rewards."""
        lines = []
        if self.on:
            said = ", ".join(f"{name.replace('_', ' ')} since step {step}" for name, step in self.on.items())
            lines.append(f"{len(self.on)} {'alarm' if len(self.on) == 1 else 'alarms'}: {said}")
        elif self.last:
            lines.append(
                f"no alarm now, the last was {self.last[0].replace('_', ' ')} at step {self.last[1]}"
            )
        if self.failed_rewards:
            lines.append(f"{self.failed_rewards:,} rewards failed or timed out in the last batch")
        return lines
