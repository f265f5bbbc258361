"""`megatron-vespo train`: builds everything, runs the controller, leaves nothing running."""

from __future__ import annotations

import time
from argparse import Namespace
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from megatron_vespo.arguments.checks import check_output_folder
from megatron_vespo.arguments.parse import full_parser, parse_args
from megatron_vespo.arguments.resume import how_to_go_on
from megatron_vespo.checkpoints.run_folder import newest_save
from megatron_vespo.cluster.calls import TrainerError
from megatron_vespo.cluster.placement import has_gpus, nodes_of_the_cluster
from megatron_vespo.driver.controller import Controller, StoppedByAlarm
from megatron_vespo.driver.debug_modes import check_modes
from megatron_vespo.driver.finished import why_finished
from megatron_vespo.driver.resume import find_checkpoint
from megatron_vespo.driver.run_record import RunRecord, describe_run
from megatron_vespo.driver.services import Platform, load_task
from megatron_vespo.driver.session import Restarts, Session
from megatron_vespo.observability.metrics import read_metrics
from megatron_vespo.observability.progress import RunDisplay
from megatron_vespo.observability.report import format_summary, plot_curves, write_summary
from megatron_vespo.observability.tracing import Trace
from megatron_vespo.system.preemption import EXIT_RESUME, EXIT_UNSAVED, EndedBySignal, Preempted, Preemption
from megatron_vespo.types import RunState


def main(argv: list[str]) -> None:
    """Raises ValueError for a user's mistake, with one line that says what would be right."""
    started = time.monotonic()
    args = parse_args(argv, on_gpus=has_gpus)
    preemption = Preemption(args.preemption_deadline)
    preemption.listen()
    check_modes(args)
    for name in ("output_dir", "save", "save_rollouts"):
        if folder := getattr(args, name):
            check_output_folder(f"--{name.replace('_', '-')}", Path(folder))
    found = find_checkpoint(args)
    if found and (finished := why_finished(args, found.folder, found.step)):
        print(finished)
        return
    task = load_task(args)
    if args.train_from:
        args.rollout_engines = 0
    if args.rollout_only:
        args.trainer_ranks, args.hf_export = 0, False
    args.output_dir.mkdir(parents=True, exist_ok=True)
    origin = {"resumed_from": str(found.folder), "went_back_to": args.ckpt_step} if found else {}
    record = RunRecord(args.output_dir, describe_run(args, full_parser()) | origin)

    with ExitStack() as stack:
        trace = stack.enter_context(Trace(args.output_dir / "trace.json"))
        title = f"VESPO: {args.hf_checkpoint}"
        display = stack.enter_context(RunDisplay(title, args.train_iters, on_phase=trace.phase))
        for remark in task.remarks:
            display.message(remark)
        for change in found.changes if found else ():
            display.message(change)
        platform = Platform(args, task, display, trace, preemption, stack)
        record.add(nodes=nodes_of_the_cluster())
        run = Run(args, platform, args.setup_seconds - started)
        try:
            state = run.train()
        except StoppedByAlarm:
            _draw(args)  # what led to it
            raise
        except BrokenPipeError:
            raise
        except OSError as error:
            # no mistake in a flag: paths were right when the run started, and may be so again
            raise RuntimeError(f"the run broke: {error}") from error
    _report(args, state, len(task.eval_prompts), run.setup_seconds, run.idle)


class Run:
    """Sessions one after another, as long as trainer ranks die and --trainer-restarts allows it."""

    def __init__(self, args: Namespace, platform: Platform, setup_seconds: float):
        """`setup_seconds` plus the time of the monotonic clock is what has passed until then."""
        self._args, self._platform = args, platform
        self.setup_seconds = setup_seconds
        self.idle: dict[str, dict] = {}
        self._training_since: int | None = None  # nanoseconds since 1970

    def train(self) -> RunState:
        restarts, args, number = Restarts(self._args), self._args, 0
        while True:
            session = Session(args, self._platform, number)
            try:
                with session:
                    return self._train(session.controller)
            except TrainerError as error:
                if self._platform.preemption.signal is not None:
                    self._end_unsaved(str(error).splitlines()[0], error)
                if self._training_since is None:  # what does not even start is not repaired by a repetition
                    raise
                args, message = restarts.next(error)
                self._platform.display.message(message)
            session.wait_until_gone()
            number += 1

    def _train(self, controller: Controller) -> RunState:
        args, platform = self._args, self._platform
        if self._training_since is None:
            self.setup_seconds += time.monotonic()
            self._training_since = time.time_ns()
        try:
            if args.save is None:
                state = controller.train()
            else:
                with platform.preemption.guarded():
                    state = controller.train()
        except Preempted:
            self._end_resumable(controller)
        except EndedBySignal:
            raise
        except KeyboardInterrupt:
            raise KeyboardInterrupt(self._interrupted(controller.state.iteration)) from None
        except StoppedByAlarm:
            if args.save is not None:
                controller.trainer.finish_save()
            raise
        self.idle = platform.trace.idle(self._training_since, time.time_ns())
        if args.save is not None:
            with platform.display.phase("save"):
                controller.trainer.finish_save()
        if args.hf_export:
            with platform.display.phase("export"):
                controller.trainer.export_hf((args.output_dir / "hf").resolve())
        return state

    def _end_resumable(self, controller: Controller) -> None:
        """Saves and raises what is to be said; the deadline runs on meanwhile."""
        args, preemption = self._args, self._platform.preemption
        if args.save is None:
            preemption.conclude(EXIT_RESUME)
            raise Preempted(f"ended by {preemption.signal}; without --save nothing is kept")
        trainer, step = controller.trainer, controller.state.iteration
        try:
            trainer.wait_for_save()
            if step not in (0, trainer.saved_iteration):
                controller.save()
                trainer.finish_save()
        except RuntimeError as error:
            self._end_unsaved(str(error).splitlines()[0], error)
        preemption.conclude(EXIT_RESUME)
        saved = (
            f", which is saved: go on with {how_to_go_on(args, step)}" if step else ": nothing to save yet"
        )
        raise Preempted(f"ended by {preemption.signal} at optimizer step {step}{saved}")

    def _interrupted(self, step: int) -> str:
        save, where = self._args.save, f"interrupted at optimizer step {step}"
        if save is None:
            return f"{where}; without --save nothing is kept"
        if (newest := newest_save(Path(save))) is None:
            return f"{where}, before the first checkpoint: the same command begins anew"
        how = "the same command goes on" if self._args.load == save else f"go on with --load {save}"
        return f"{where}; the newest checkpoint is {newest}: {how}"

    def _end_unsaved(self, reason: str, error: Exception) -> None:
        preemption = self._platform.preemption
        preemption.conclude(EXIT_UNSAVED)
        raise EndedBySignal(f"ended by {preemption.signal}, not saved: {reason}") from error


def _draw(args: Namespace) -> Path:
    picture = args.output_dir / "curves.png"
    metrics = read_metrics(args.output_dir / "metrics.jsonl")
    plot_curves(metrics, picture, f"VESPO, N = {args.steps_per_rollout}")
    return picture


def _eval_summary(when: str, metrics: dict[str, float] | None) -> dict[str, Any]:
    if metrics is None:
        return {}
    interval = [metrics["eval/interval_low"], metrics["eval/interval_high"]]
    return {f"eval_accuracy_{when}": metrics["eval/accuracy"], f"eval_interval_{when}": interval}


def _report(
    args: Namespace, state: RunState, num_eval: int, setup_seconds: float, idle: dict[str, dict]
) -> None:
    paths = {
        "metrics": args.output_dir / "metrics.jsonl",
        "TensorBoard": args.output_dir / "tensorboard",
        "picture": _draw(args),
        "timeline": args.output_dir / "trace.json",
        "logs": args.output_dir / "logs",
    }
    if args.save:
        paths["checkpoint"] = Path(args.save)
    if args.save_rollouts:
        paths["rollouts"] = args.save_rollouts
    if args.hf_export:
        paths["HF export"] = args.output_dir / "hf"
    tensor, pipeline = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    context = args.context_parallel_size
    summary = {
        **_eval_summary("before", state.eval_before),
        **_eval_summary("after", state.eval_after),
        "eval_prompts": num_eval,
        "train_seconds": state.train_seconds,
        "setup_seconds": setup_seconds,
        "steps": state.iteration,
        "max_logprob_difference": None if args.rollout_only else state.max_logprob_difference,
        "idle": idle,
        "layout": {
            "tensor": tensor,
            "pipeline": pipeline,
            "virtual_pipeline": args.virtual_pipeline_model_parallel_size or 1,
            "context": context,
            "expert": args.expert_model_parallel_size,
            "expert_tensor": args.expert_tensor_parallel_size,
            "data": args.trainer_ranks // (tensor * pipeline * context),
            "trainer_ranks": args.trainer_ranks,
            "engines": args.rollout_engines,
        },
        "paths": {label: str(path) for label, path in paths.items()},
    }
    write_summary(args.output_dir / "summary.json", summary)
    print(format_summary(summary))
