"""`megatron-vespo train`: checks, starts, runs and reports one run, and leaves nothing running."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

from megatron_vespo.arguments.checks import check_output_folder
from megatron_vespo.arguments.parse import full_parser, parse_args
from megatron_vespo.cluster.placement import has_gpus, nodes_of_the_cluster
from megatron_vespo.driver.controller import StoppedByAlarm
from megatron_vespo.driver.debug_modes import check_modes
from megatron_vespo.driver.finished import why_finished
from megatron_vespo.driver.resume import find_checkpoint
from megatron_vespo.driver.run import Run
from megatron_vespo.driver.run_record import RunRecord, describe_run
from megatron_vespo.driver.services import Services, load_task
from megatron_vespo.driver.summary import plot, summarize
from megatron_vespo.observability.progress import RunDisplay
from megatron_vespo.observability.tracing import Trace
from megatron_vespo.system.preemption import Preemption


def main(argv: list[str]) -> None:
    """Raises ValueError with one line if a flag or a file is wrong."""
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
        services = Services(args, task, display, trace, preemption, stack)
        record.add(nodes=nodes_of_the_cluster())
        run = Run(args, services, args.setup_seconds - started)
        try:
            state = run.train()
        except StoppedByAlarm:
            plot(args)  # what led to the alarm
            raise
        except BrokenPipeError:
            raise
        except OSError as error:
            # not the user's mistake: the paths were right when the run started, and may be right again
            raise RuntimeError(f"the run broke: {error}") from error
    print(summarize(args, state, len(task.eval_prompts), run.setup_seconds, run.idle))
