"""`megatron-vespo train`: checks, starts and reports one run, and leaves no process behind."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import cast

from megatron_vespo.arguments.checks import check_folder
from megatron_vespo.arguments.parse import full_parser, parse_settings
from megatron_vespo.arguments.tracking import check_tracker_packages
from megatron_vespo.arguments.train_settings import TrainSettings
from megatron_vespo.cluster.placement import has_gpus, nodes_of_the_cluster
from megatron_vespo.driver.controller import StoppedByAlarm
from megatron_vespo.driver.debug_modes import check_modes
from megatron_vespo.driver.finished import Wanted, why_finished
from megatron_vespo.driver.resume import find_checkpoint
from megatron_vespo.driver.run import Run
from megatron_vespo.driver.run_end import end_early, record_end
from megatron_vespo.driver.run_record import RunRecord, describe_run
from megatron_vespo.driver.run_state import RunState
from megatron_vespo.driver.services import Services, load_task
from megatron_vespo.driver.summary import plot, summarize
from megatron_vespo.driver.tracking import Tracking
from megatron_vespo.observability.progress import RunDisplay
from megatron_vespo.observability.tracing import Trace
from megatron_vespo.system.preemption import Preemption


def main(argv: list[str]) -> None:
    """Raises ValueError with one line if a flag or a file is wrong."""
    started = time.monotonic()
    settings = parse_settings(argv, on_gpus=has_gpus)
    preemption = Preemption(settings.run.preemption_deadline)
    preemption.listen()
    check_modes(settings)
    check_tracker_packages(settings.tracking)
    for flag, folder in (
        ("--output-dir", settings.run.output_dir),
        ("--save", settings.save.save),
        ("--save-rollouts", settings.run.save_rollouts),
    ):
        check_folder(flag, folder, writable=True)
    found = find_checkpoint(settings)
    if found:
        run = settings.run
        wanted = Wanted(cast(str, settings.save.load), run.train_iters, run.output_dir, run.hf_export)
        if finished := why_finished(wanted, found.folder, found.step):
            print(finished)
            return
    task = load_task(settings)
    settings = settings.as_run()
    settings.run.output_dir.mkdir(parents=True, exist_ok=True)
    origin = {"resumed_from": str(found.folder), "went_back_to": settings.save.ckpt_step} if found else {}
    content = describe_run(vars(settings.megatron), full_parser()) | origin
    record = RunRecord(settings.run.output_dir, content)
    trace = Trace(settings.run.output_dir / "trace.json")
    title = f"VESPO: {settings.engines.hf_checkpoint}"
    display = RunDisplay(title, settings.run.train_iters, on_phase=trace.phase)
    run = None
    with Tracking(settings, content, resumes=found is not None, say=display.message) as tracking:
        try:
            with ExitStack() as stack:
                stack.enter_context(trace)
                stack.enter_context(display)
                for remark in (*task.remarks, *(found.changes if found else ())):
                    display.message(remark)
                services = Services(settings, task, display, trace, preemption, stack, tracking)
                display.watch_engines(services.engines.states)
                record.add(nodes=nodes_of_the_cluster())
                run = Run(settings, services, settings.run.setup_seconds - started)
                state = _train(run, settings)
        except BaseException as error:
            end_early(settings.run.output_dir, record, run, error)
            raise
        record_end(record, run, None)
        print(summarize(settings, state, len(task.eval_prompts), run.setup_seconds, run.idle), flush=True)


def _train(run: Run, settings: TrainSettings) -> RunState:
    try:
        return run.train()
    except StoppedByAlarm:
        plot(settings)  # shows what led to the alarm
        raise
    except BrokenPipeError:
        raise
    except OSError as error:
        # not the user's mistake: the paths were valid when the run started, and may be valid again
        raise RuntimeError(f"the run broke: {error}") from error
