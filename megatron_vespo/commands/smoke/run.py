"""Runs a smoke run with the objects of a real one: services, trainer attempt, controller."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from pathlib import Path
from typing import cast

import numpy as np

from megatron_vespo.arguments.train_settings import TrainSettings
from megatron_vespo.cluster.trainer_group import TrainerGroup
from megatron_vespo.commands.smoke.log_probs import BOUNDS_BF16, BOUNDS_FP32, compare, differences, prefilled
from megatron_vespo.commands.smoke.stages import CheckFailed, Stage, Stages
from megatron_vespo.data.prompts import PromptSet
from megatron_vespo.driver.controller import Controller
from megatron_vespo.driver.services import Services, Task
from megatron_vespo.driver.trainer_attempt import TrainerAttempt
from megatron_vespo.driver.training_samples import training_samples
from megatron_vespo.observability.progress import RunDisplay
from megatron_vespo.observability.tracing import Trace
from megatron_vespo.rollout.synchronous_batches import SynchronousBatches
from megatron_vespo.system.preemption import Preemption
from megatron_vespo.types import Prompt, SamplingParams, TrainingSample
from megatron_vespo.weight_sync.engine_admin import EngineAdmin
from megatron_vespo.weight_sync.verify import Sums, WeightMismatchError, compare_sums, weight_sums

NUM_PREFILLED = 4  # sequences per engine
ENGINES = "the end of logs/engine-N.log; megatron-vespo doctor on that node; --sglang- flags of the recipe"
RANKS = "the end of logs/trainer-N.log; megatron-vespo doctor on that node"
KERNELS = (
    "which side is wrong, by --transformer-impl local, --sglang-attention-backend triton or "
    "--sglang-disable-cuda-graph"
)
WIRE = (
    "NCCL_DEBUG=INFO, and the end of logs/trainer-0.log and logs/engine-0.log; NCCL_SOCKET_IFNAME for the "
    "network; NCCL_CUMEM_ENABLE must be the same for both; srun megatron-vespo doctor tests the nodes"
)
DISK = "whether all nodes see --output-dir as one folder with room: srun megatron-vespo doctor --shared-dir"
LOADER = (
    "NCCL_DEBUG=INFO; whether another release of SGLang or Megatron-Core is installed: megatron-vespo doctor"
)


def all_stages(colocate: bool) -> Stages:
    starts = {"start SGLang": ENGINES, "start Megatron": RANKS}  # engines first, while the GPUs are empty
    rows = {
        "cluster": "ray status; nvidia-smi on each node; --ray-address auto for a Ray that runs",
        "model": DISK,
        "start Ray": "ray status: what others have taken of its GPUs",
        **(starts if colocate else dict(reversed(starts.items()))),
        "first weight sync": WIRE,
        "generate": ENGINES,
        "decoded log-probs": KERNELS,
        "prefilled log-probs": KERNELS,
        "train": RANKS,
        "weight sync": LOADER,
        "new log-probs": LOADER,
        "colocated turn": "--sglang-disable-cuda-graph; a smaller --sglang-mem-fraction-static",
        "checkpoint": DISK,
        "resume": RANKS,
        "resumed log-probs": DISK,
        "resumed weights": LOADER,
    }
    return Stages([Stage(name, hint) for name, hint in rows.items() if colocate or name != "colocated turn"])


def _controller(attempt: TrainerAttempt) -> Controller:
    assert attempt.controller is not None, "the attempt has not started"
    return attempt.controller


def _trainer(controller: Controller) -> TrainerGroup:
    assert controller.trainer is not None, "a smoke run trains"
    return controller.trainer


def _seconds_of_sharing(services: Services) -> float:
    assert services.gpu_sharing is not None, "a colocated run shares its GPUs"
    return services.gpu_sharing.seconds


class SmokeRun:
    """`settings` come from `smoke_arguments`; `model_bytes` is the size of a weight sync."""

    def __init__(self, settings: TrainSettings, model_bytes: int, stages: Stages):
        self._settings, self._model_bytes, self._stages = settings, model_bytes, stages
        self._bounds = BOUNDS_BF16 if settings.trainer.bf16 else BOUNDS_FP32
        self._draw = np.random.default_rng(settings.rollout.seed)
        self._services = cast(Services, None)  # until `run` has started them

    def run(self, stack: ExitStack) -> None:
        """Runs all stages; `stack` ends everything that was started. Raises Stopped if a stage breaks."""
        settings, stages = self._settings, self._stages
        trace = stack.enter_context(Trace(settings.run.output_dir / "trace.json"))
        display = cast(RunDisplay, stages)  # it has the methods that services call
        with stages.stage("start Ray"):
            self._services = Services(settings, self._task(), display, trace, Preemption(), stack)
        first = TrainerAttempt(settings, self._services, 0)
        with first:
            samples = self._generate_and_train(_controller(first))
            log_probs, sums = self._save(_controller(first), samples)
        with stages.stage("resume") as row:
            first.wait_until_gone()
            second = stack.enter_context(TrainerAttempt(settings, self._services, 1))
            row.detail = f"at optimizer step {_controller(second).state.iteration}"
            if _controller(second).state.iteration != settings.run.train_iters:
                raise CheckFailed(f"resumed {row.detail}, saved was {settings.run.train_iters}")
        self._compare_resumed(_controller(second), samples, log_probs, sums)

    def _task(self) -> Task:
        """Prompts of random tokens; completions end only by their length."""
        rollout, vocab_size = self._settings.rollout, self._settings.trainer.vocab_size
        lengths = self._draw.integers(1, rollout.max_prompt_tokens + 1, rollout.rollout_batch_size)
        prompts = [
            Prompt(number, self._draw.integers(0, vocab_size, length).tolist(), answer="", text="")
            for number, length in enumerate(lengths)
        ]
        sampling = SamplingParams(rollout.rollout_temperature, rollout.max_completion_tokens, ())
        return Task(sampling=sampling, prompts=PromptSet(prompts, 0, Path("random tokens")))

    def _generate_and_train(self, controller: Controller) -> list[TrainingSample]:
        """All stages up to engines that serve the trained weights; returns the samples of these engines."""
        stages = self._stages
        self._sync(controller, "first weight sync")
        with stages.stage("generate") as row:
            samples = self._generate(controller, row)
        with stages.stage("decoded log-probs") as row:
            before = _trainer(controller).log_probs(samples)
            row.detail = self._compare_decoded(before, samples)
        with stages.stage("prefilled log-probs") as row:
            row.detail = self._compare_prefilled(before, samples)
        with stages.stage("train") as row:
            self._train(controller, samples, before, row)
        self._sync(controller, "weight sync")
        with stages.stage("new log-probs") as row:
            samples = self._generate_and_compare(controller, row)
        if self._settings.sync.colocate:
            self._take_a_turn(controller, samples)
        return samples

    def _sync(self, controller: Controller, name: str) -> None:
        with self._stages.stage(name) as row:
            started = time.monotonic()
            checking = controller.sync_weights()["sync/weight_check_seconds"]
            row.seconds = time.monotonic() - started - checking
            row.bytes = self._model_bytes
            row.detail = f"of {len(self._urls())} engine(s); checksums equal, in {checking:.1f} s"

    def _generate(self, controller: Controller, row: Stage) -> list[TrainingSample]:
        """A rollout batch with random rewards."""
        started = time.monotonic()
        source = controller.source
        assert isinstance(source, SynchronousBatches)
        groups = source.generate(
            self._settings.rollout.rollout_batch_size, self._settings.rollout.seed + controller.policy_version
        )
        completions = [completion for group in groups for completion in group]
        for completion in completions:
            completion.reward = float(self._draw.normal())
        tokens = sum(completion.num_sampled for completion in completions)
        row.detail = f"{tokens} tokens, {tokens / (time.monotonic() - started):.0f} per second"
        loss, replay = self._settings.loss, self._settings.rollout.routing_replay
        return training_samples(groups, loss.advantage_estimator, replay, loss.pair_length_gap)

    def _train(
        self, controller: Controller, samples: list[TrainingSample], before: list[np.ndarray], row: Stage
    ) -> None:
        number = self._settings.rollout.steps_per_rollout
        size = len(samples) // number
        mini_batches = [samples[i * size : (i + 1) * size] for i in range(number)]
        if self._settings.loss.kl_coef is not None:  # then `prepare` takes them from the samples
            reference = _trainer(controller).reference_log_probs(mini_batches)
            for sample, log_probs in zip(samples, reference, strict=True):
                sample.reference_log_probs = log_probs
        _trainer(controller).prepare(mini_batches)
        steps = [_trainer(controller).train_step(index) for index in range(number)]
        controller.state.iteration += number
        moved = differences(_trainer(controller).log_probs(samples), before).mean()
        losses, norms = [[step[name] for step in steps] for name in ("loss", "grad_norm")]
        row.detail = (
            f"{number} steps: loss {_numbers(losses)}, gradient norm {_numbers(norms)}, "
            f"log-probs move by {moved:.2g}"
        )
        if not all(math.isfinite(loss) for loss in losses):
            raise CheckFailed(f"a loss is not finite: {_numbers(losses)}")
        if not all(math.isfinite(norm) and norm > 0 for norm in norms):
            raise CheckFailed(f"a gradient norm is not positive and finite: {_numbers(norms)}")
        if not moved > 2 * self._bounds.mean:  # otherwise the next comparison would pass with the old weights
            raise CheckFailed(f"the steps have moved log-probs by {moved:.2g} only")

    def _generate_and_compare(self, controller: Controller, row: Stage) -> list[TrainingSample]:
        """Checks, by decoding and prefill, that the engines serve the trainer's weights."""
        samples = self._generate(controller, row)
        ours = _trainer(controller).log_probs(samples)
        row.detail = self._compare_decoded(ours, samples)
        self._compare_prefilled(ours, samples)
        return samples

    def _compare_decoded(self, ours: list[np.ndarray], samples: list[TrainingSample]) -> str:
        theirs = [sample.behavior_log_probs for sample in samples]
        return compare(ours, theirs, self._bounds, "decoded tokens")

    def _compare_prefilled(self, ours: list[np.ndarray], samples: list[TrainingSample]) -> str:
        """Compares every engine; returns the last one's line."""
        some = samples[:NUM_PREFILLED]
        for url in self._urls():
            theirs = prefilled(url, some, self._settings.rollout.generate_timeout, self._services.api_key)
            told = compare(ours[: len(some)], theirs, self._bounds, f"engine {url}, prefilled tokens")
        return told

    def _take_a_turn(self, controller: Controller, samples: list[TrainingSample]) -> None:
        """Offloads and onloads the engines, and checks that they serve the same weights."""
        with self._stages.stage("colocated turn") as row:
            seconds = _seconds_of_sharing(self._services)
            _trainer(controller).prepare([samples])
            controller.sync_weights()
            found = self._generate_and_compare(controller, row)
            assert len(found) == len(samples)
            row.seconds = _seconds_of_sharing(self._services) - seconds

    def _save(
        self, controller: Controller, samples: list[TrainingSample]
    ) -> tuple[list[np.ndarray], list[Sums]]:
        """Saves; returns what the resumed trainer and its engines are compared with."""
        with self._stages.stage("checkpoint") as row:
            controller.save()
            _trainer(controller).finish_save()
            row.bytes = sum(
                path.stat().st_size
                for path in Path(cast(str, self._settings.save.save)).rglob("*")
                if path.is_file()
            )
            row.seconds = None
            return _trainer(controller).log_probs(samples), self._sums()

    def _compare_resumed(
        self,
        controller: Controller,
        samples: list[TrainingSample],
        before: list[np.ndarray],
        sums: list[Sums],
    ) -> None:
        with self._stages.stage("resumed log-probs") as row:
            row.detail = compare(
                _trainer(controller).log_probs(samples), before, self._bounds, "resumed trainer"
            )
        with self._stages.stage("resumed weights") as row:
            controller.sync_weights()
            try:
                for url, now, then in zip(self._urls(), self._sums(), sums, strict=True):
                    compare_sums(url, now, "the trainer before it was saved", then, controller.policy_version)
            except WeightMismatchError as error:
                raise CheckFailed(str(error)) from error
            self._generate_and_compare(controller, row)

    def _urls(self) -> list[str]:
        return [url for url in self._services.engines.urls if url is not None]

    def _sums(self) -> list[Sums]:
        timeout_s = self._settings.sync.weight_sync_timeout
        admin = EngineAdmin(self._urls(), timeout_s, api_key=self._services.api_key)
        try:
            return weight_sums(admin)
        finally:
            admin.close()


def _numbers(values: list[float]) -> str:
    return " and ".join(f"{value:.3g}" for value in values)
