"""One life of the trainer: its ranks, their connection to the engines, and the state that they go on from.

A run has one session, or, where trainer ranks die, one after another on the same platform.
"""

from __future__ import annotations

import copy
import time
from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from megatron_vespo.arguments.resume import describe, resumed_folder
from megatron_vespo.checkpoints.megatron_checkpoint import TRACKER_NAME
from megatron_vespo.checkpoints.run_folder import SaveReport, newest_save, repair_tracker
from megatron_vespo.cluster.calls import TrainerError
from megatron_vespo.cluster.colocated import ColocatedTrainer
from megatron_vespo.cluster.trainer_group import TrainerGroup
from megatron_vespo.cluster.trainer_worker import Resumed
from megatron_vespo.data.prompts import PromptCursor
from megatron_vespo.driver.controller import Controller
from megatron_vespo.driver.debug_modes import Recorder, Replay, RolloutOnly, check_recorded
from megatron_vespo.driver.services import Platform
from megatron_vespo.observability.metrics import MetricsWriter, batch_records, read_metrics
from megatron_vespo.rewards.pool import RewardResult
from megatron_vespo.rollout.async_collector import AsyncCollector
from megatron_vespo.rollout.buffer import RolloutBuffer
from megatron_vespo.rollout.buffer_state import unpack_pending
from megatron_vespo.rollout.collector import Collector
from megatron_vespo.rollout.dynamic_sampling import teaches
from megatron_vespo.rollout.engine_client import RouteShape
from megatron_vespo.types import Completion, RunState

STREAM_STOP_TIMEOUT_S = 5.0
FROM_THE_BEGINNING = -1  # no step of the session before is kept


class Session:
    """`number` 0 is the run's first. Entering starts it, leaving ends what it has started."""

    def __init__(self, args: Namespace, platform: Platform, number: int):
        self._args, self._platform, self._number = args, platform, number
        self._stack = ExitStack()
        self._trainer: TrainerGroup | None = None
        self._metrics: MetricsWriter | None = None
        self.controller: Controller | None = None  # None until everything has started

    def __enter__(self) -> Session:
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def wait_until_gone(self) -> None:
        """After its end, before another session takes its places."""
        if self._trainer is not None:
            self._trainer.wait_until_gone()

    def _start(self) -> None:
        args, platform = self._args, self._platform
        if self._number == 0 and args.colocate:  # engines take their share of a GPU that is empty
            platform.wait_for_engines()
        resumed = self._start_trainer()
        if self._number == 0 and not args.colocate:
            platform.wait_for_engines()
        if self._trainer is not None:
            platform.engine_sync.attach(self._trainer)
        state = RunState.of(resumed.rollout_state) if resumed else RunState()
        if args.train_from:
            check_recorded(args, state.iteration)
        goes_back = self._number == 0 and args.ckpt_step is not None
        self._metrics = MetricsWriter(args.output_dir, self._kept_step(resumed), keep_cut=goes_back)
        self._stack.callback(self._metrics.close)
        if resumed:
            self._log_resumed(state, resumed)
        for line in describe(args, state.iteration):
            platform.display.message(line)
        self.controller = self._make_controller(state, resumed.rollout_buffer if resumed else None)
        platform.display.phase_seconds()  # start-up phases end here

    def _start_trainer(self) -> Resumed | None:
        args, platform = self._args, self._platform
        if args.rollout_only:
            return None
        if args.load and (repaired := repair_tracker(Path(args.load))):
            platform.display.message(
                f"{args.load}: a kill has left its tracker empty, {repaired} is complete"
            )
        group = (
            TrainerGroup
            if platform.gpu_sharing is None
            else partial(ColocatedTrainer, gpu_sharing=platform.gpu_sharing)
        )
        self._trainer = group(
            args, platform.placement, platform.log_dir, platform.engines.check, platform.trace.calls,
            self._on_save, platform.task.record,
        )  # fmt: skip
        self._stack.callback(self._trainer.stop)
        with platform.display.phase("start Megatron"):
            resumed = self._trainer.start()
            for line in self._trainer.describe() if self._number == 0 else ():
                platform.display.message(line)
        return resumed

    def _kept_step(self, resumed: Resumed | None) -> int | None:
        """The last step whose metrics stay; None where this run has written none yet."""
        if resumed:
            return resumed.rollout_state["iteration"]
        return FROM_THE_BEGINNING if self._number else None

    def _log_resumed(self, state: RunState, resumed: Resumed) -> None:
        probe = (
            ""
            if resumed.probe_difference is None
            else f"; log-probs saved with it differ by {resumed.probe_difference:.1e} at most"
        )
        self._platform.display.message(
            f"resumed at optimizer step {state.iteration}, {state.consumed_prompts} prompts consumed{probe}"
        )

    def _on_save(self, report: SaveReport) -> None:
        if report.problem is None:
            seconds = {"checkpoint/seconds": report.seconds, "checkpoint/bytes": float(report.num_bytes)}
            self._metrics.write(report.iteration, seconds)
            return
        newest = newest_save(Path(self._args.save)) or "no checkpoint"
        self._platform.display.message(
            f"WARNING: THE CHECKPOINT OF OPTIMIZER STEP {report.iteration} COULD NOT BE SAVED: "
            f"{report.problem}; {newest} stays, the run goes on"
        )

    def _make_controller(self, state: RunState, rollout_buffer: bytes | None) -> Controller:
        args, platform = self._args, self._platform
        task = platform.task
        collector = cursor = stream = None
        if platform.generates:
            collector = self._collector()
            cursor = PromptCursor(task.prompts.prompts, args.seed, state.consumed_prompts)
            stream = self._stream(collector, cursor, state, rollout_buffer)
        mode = Replay if args.train_from else RolloutOnly if args.rollout_only else Controller
        controller = mode(
            args=args,
            trainer=self._trainer,
            collector=collector,
            scorer=platform.scorer,
            cursor=cursor,
            eval_prompts=task.eval_prompts,
            sampling=task.sampling,
            display=platform.display,
            metrics=self._metrics,
            engine_sync=platform.engine_sync,
            state=state,
            # what the alarms compare with survives a resume into the same folder
            history=batch_records(read_metrics(args.output_dir / "metrics.jsonl")),
            record=Recorder(args, state.iteration) if args.save_rollouts else None,
            stream=stream,
            preemption=platform.preemption,
        )
        if collector is not None:
            collector.on_wait = partial(controller.on_wait, while_others_serve=False)
        if stream is not None:
            stream.on_wait = partial(controller.on_wait, while_others_serve=True)
        return controller

    def _collector(self) -> Collector:
        args, engines = self._args, self._platform.engines
        return Collector(
            engines.urls,
            routes=RouteShape(args.num_layers, args.moe_router_topk) if args.routing_replay == "R3" else None,
            request_timeout_s=args.generate_timeout,
            max_dispatches=1 + args.max_request_retries,
            check=self._check,
            on_requests=self._platform.trace.requests,
            lost=engines.lost,
            generate_function=self._platform.task.generate,
            api_key=self._platform.api_key,
        )

    def _check(self) -> None:
        """Every second while engines generate."""
        self._platform.engines.check()
        if self._trainer is not None:
            self._trainer.poll_save()

    def _stream(
        self, collector: Collector, cursor: PromptCursor, state: RunState, rollout_buffer: bytes | None
    ) -> AsyncCollector | None:
        """What generates in the background; None in synchronous runs."""
        args, platform = self._args, self._platform
        task, trace = platform.task, platform.trace
        by_id = {prompt.prompt_id: prompt for prompt in task.prompts.prompts}
        pending = unpack_pending(rollout_buffer, by_id) if rollout_buffer else []
        if args.max_staleness == 0:
            if pending:
                raise ValueError(
                    f"--load {args.load}: {len(pending)} prompts were in flight when this asynchronous run "
                    "was saved: go on with --max-staleness above 0"
                )
            return None
        buffer = rollout_buffer_of(args, cursor, state)
        buffer.restore(pending)

        def score(group: list[Completion]) -> Sequence[RewardResult]:
            start = time.time_ns()
            try:
                return platform.scorer.score(group)
            finally:
                trace.phase("score", start, time.time_ns())

        stream = AsyncCollector(
            collector,
            buffer,
            task.sampling,
            score,
            num_completions=args.group_size,
            seed=args.seed,
            on_change=lambda buffer: trace.count(
                "groups", in_flight=buffer.num_in_flight, finished=buffer.num_finished
            ),
        )
        self._stack.callback(stream.stop, STREAM_STOP_TIMEOUT_S)
        return stream


def rollout_buffer_of(args: Namespace, cursor: PromptCursor, state: RunState) -> RolloutBuffer:
    """Empty; as the flags say."""
    size = args.rollout_batch_size
    return RolloutBuffer(
        lambda: cursor.take(1)[0],
        batch_size=size,
        mini_batches=args.steps_per_rollout,
        max_staleness=args.max_staleness,
        requeue=args.stale_groups == "requeue",
        max_dispatches=args.max_attempts,
        version=state.iteration,
        serial=state.consumed_prompts,
        max_held=args.over_subscription and int(args.over_subscription * size),
        teaches=teaches,
        max_left_out=(args.dynamic_sampling_max_batches - 1) * size if args.dynamic_sampling else 0,
    )


class Restarts:
    """Where a run goes on whose trainer has died, and how often it may."""

    def __init__(self, args: Namespace):
        self._args, self._left = args, args.trainer_restarts
        self._first = self._newest = self._tracker()
        self._last_failure: str | None = None

    def next(self, error: TrainerError) -> tuple[Namespace, str]:
        """The next session's arguments, and what to tell people; raises `error` when it has to end."""
        newest = self._tracker()
        if newest != self._newest:  # it has come further
            self._newest, self._left = newest, self._args.trainer_restarts
        first_line = str(error).splitlines()[0]
        repeated = not error.died and first_line == self._last_failure  # the next time would be no better
        self._last_failure = first_line
        if self._left == 0 or repeated:
            raise error
        self._left -= 1
        args, where = copy.copy(self._args), "from the beginning, there is no checkpoint yet"
        if newest is not None and newest != self._first:  # this run has saved
            args.load, args.ckpt_step = args.save, None
        if folder := resumed_folder(args):
            where = f"from {folder}"
        return args, (
            f"RESTART OF THE TRAINER {where} ({self._left} more without a new checkpoint): {first_line}"
        )

    def _tracker(self) -> tuple[Path, int] | None:
        """The newest checkpoint of --save and when it was named: a run may save under an old one's name."""
        if self._args.save is None:
            return None
        folder = newest_save(Path(self._args.save))
        return None if folder is None else (folder, (folder.parent / TRACKER_NAME).stat().st_mtime_ns)
