"""`megatron-vespo submit RECIPE --nodes N`: shows, checks and queues a training run as a SLURM job."""

from __future__ import annotations

import argparse
import math
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import megatron_vespo
from megatron_vespo.arguments.checks import check_positive
from megatron_vespo.arguments.parser import recipe_parser
from megatron_vespo.arguments.recipe import read_recipe
from megatron_vespo.arguments.train_settings import TrainSettings
from megatron_vespo.commands.submit import engine_nodes
from megatron_vespo.commands.submit.options import SubmitOptions
from megatron_vespo.commands.submit.sbatch_command import (
    check_time_limit,
    directives,
    sbatch_command,
    seconds_before_limit,
    shown,
)
from megatron_vespo.system.hardware import GPUS, ON_GPUS
from megatron_vespo.system.paths import path_word, user_path
from megatron_vespo.system.wording import counted

DESCRIPTION = """\
Shows the sbatch command that runs slurm/train.sbatch with the flags of a recipe, and runs it if
megatron-vespo plan says that the run fits.

Flags of train that follow count after the recipe's: megatron-vespo submit R.flags --nodes 4 --train-iters 800

With --smoke it is slurm/smoke.sbatch: megatron-vespo smoke RECIPE, and the flags that follow, on all nodes.
"""
SCRIPT = Path(megatron_vespo.__file__).parents[1] / "slurm/train.sbatch"
SMOKE_SCRIPT = SCRIPT.with_name("smoke.sbatch")
SUBMIT_TIMEOUT_S = 120.0
END_S = 60.0  # time that a job needs after --preemption-deadline to end its processes


def main(argv: list[str]) -> int:
    engine_nodes.check_words(argv)
    parsed, more = _parser().parse_known_args(argv)
    asked = SubmitOptions.of(parsed)
    check_positive(asked, ("nodes",))
    if asked.gpus_per_node < 0:
        raise ValueError(
            f"--gpus-per-node is {asked.gpus_per_node}, must be positive, or 0: the job asks for none"
        )
    if asked.chain < 1:
        raise ValueError(f"--chain {asked.chain}: must be 1, or the number of jobs")
    flags = read_recipe(asked.recipe) + more
    engine_nodes.check(asked, flags)
    if asked.smoke:
        return _submit_smoke(asked, more)
    # the submitting machine may have no GPU
    there = [*(ON_GPUS if asked.gpus_per_node else []), *flags]
    settings = checked_run(there)
    from megatron_vespo.arguments.parse import with_expanded_paths  # takes seconds

    # absolute paths mean the same in every environment
    command = train_command(asked, with_expanded_paths(flags), settings.run.preemption_deadline)
    print(shown(command), flush=True)
    use = described_use(settings, asked)
    if not (settings.run.train_from or settings.run.rollout_only):
        check_plan(there, asked)
    print(use)
    return _submit_unless_dry(command, asked)


def _submit_smoke(asked: SubmitOptions, more: list[str]) -> int:
    """Submits a smoke run. Its model always fits, so only its flags are checked."""
    if asked.chain > 1:
        raise ValueError(f"--chain {asked.chain} is for a run that goes on in the next job, --smoke does not")
    command = smoke_command(asked, more)
    print(shown(command), flush=True)
    print(f"checked: {smoke_layout(asked, more)}")
    return _submit_unless_dry(command, asked)


def _submit_unless_dry(command: list[str], asked: SubmitOptions) -> int:
    for line in asked_sbatch(command) if asked.dry_run else submit(command, asked.chain):
        print(line)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = recipe_parser("submit", "[options] [flags of train]", DESCRIPTION)
    add = parser.add_argument
    add("--gpus-per-node", type=int, default=8, metavar="N", help="0: the job asks for none")
    add("--gpu", choices=(*GPUS, "other"), default="h100",
        help="whose memory the run must fit; other: that is not checked; default: h100")  # fmt: skip
    add("--time", metavar="LIMIT", help="of one job, as sbatch takes it; default: the script's")
    add("--sbatch", nargs="+", action="extend", default=[], metavar="NAME[=VALUE]",
        help="more options of sbatch, without dashes: partition=h100 account=rl exclude=node7")  # fmt: skip
    engine_nodes.add_flags(parser)
    add("--chain", type=int, default=1, metavar="JOBS",
        help="so many jobs, each beginning when the one before has not finished the run: for clusters that "
        "do not let jobs go back into the queue")  # fmt: skip
    add("--venv", type=user_path, default=Path(sys.prefix), help="default: the one that this runs in")
    add("--smoke", action="store_true",
        help="every part of the run once, with a small model: megatron-vespo smoke RECIPE")  # fmt: skip
    add("--container", type=path_word, metavar="IMAGE", help="instead of --venv")
    add("--container-runtime", choices=("pyxis", "apptainer"), default="pyxis")
    add(
        "--mounts",
        nargs="+",
        default=[],
        type=path_word,
        metavar="DIR",
        help="what the container sees beside this folder",
    )
    add("--dry-run", action="store_true", help="show and check only")
    return parser


def checked_run(flags: list[str]) -> TrainSettings:
    """The settings that train would have; ValueError for mistakes that would only show when the job runs."""
    from megatron_vespo.arguments.parse import parse_settings  # takes seconds

    settings = parse_settings(flags, "submit")
    if settings.engines.ray_address:
        raise ValueError("--ray-address is the job script's to say: leave it out")
    # a run that goes back to an older checkpoint does so once, then it resumes from --save
    if settings.save.save is None or (
        settings.save.save != settings.save.load and settings.save.gone_back is None
    ):
        raise ValueError(
            f"--save {settings.save.save} and --load {settings.save.load} must be one folder: a job that is "
            "started again goes on there"
        )
    return settings


def train_command(asked: SubmitOptions, flags: list[str], preemption_deadline_s: float) -> list[str]:
    """The sbatch command for slurm/train.sbatch, from `asked` and the flags."""
    own, needed = _own_options(SCRIPT), math.ceil(preemption_deadline_s + END_S)
    options, variables = _options(asked, asked.recipe.stem), _variables(asked)
    if seconds_before_limit(own) < needed:
        options["signal"] = f"B:USR1@{needed}"
    if asked.chain > 1:  # the next job continues; this one is not requeued
        options["no-requeue"] = None
        variables["VESPO_MAX_RESTARTS"] = "0"
    options |= engine_nodes.options_of_sbatch(asked.sbatch)
    if (seconds := seconds_before_limit(own | options)) < needed:
        raise ValueError(
            f"--sbatch signal leaves {seconds} seconds, --preemption-deadline {preemption_deadline_s:g} and "
            f"the end need {needed}"
        )
    check_time_limit(own | options, longer_than=seconds)
    return sbatch_command(SCRIPT, options, variables, flags, engine_nodes.component(asked))


def smoke_command(asked: SubmitOptions, more: list[str]) -> list[str]:
    """The sbatch command for slurm/smoke.sbatch, from `asked`, followed by the recipe and the flags."""
    options = _options(asked, f"smoke-{asked.recipe.stem}") | engine_nodes.options_of_sbatch(asked.sbatch)
    check_time_limit(_own_options(SMOKE_SCRIPT) | options)
    words = [str(asked.recipe.resolve()), *more]
    return sbatch_command(SMOKE_SCRIPT, options, _variables(asked), words, engine_nodes.component(asked))


def _own_options(script: Path) -> dict[str, str | None]:
    if not script.is_file():
        raise ValueError(f"{script}: no such file; job scripts come with a clone (pip install -e .)")
    return directives(script.read_text())


def _options(asked: SubmitOptions, name: str) -> dict[str, str | None]:
    """Options of sbatch for the first component of a job."""
    options: dict[str, str | None] = {"job-name": name, "nodes": str(asked.nodes)}
    if asked.gpus_per_node:
        options["gpus-per-node"] = str(asked.gpus_per_node)
    if asked.time:
        options["time"] = asked.time
    return options


def _variables(asked: SubmitOptions) -> dict[str, str]:
    """Variables of slurm/environment.sh."""
    root = str(SCRIPT.parents[1])
    if not asked.container:
        return {"VESPO_ROOT": root, "VESPO_VENV": str(asked.venv.resolve())}
    return {
        "VESPO_ROOT": root,
        "VESPO_CONTAINER": asked.container,
        "VESPO_CONTAINER_RUNTIME": asked.container_runtime,
        "VESPO_MOUNTS": ",".join(dict.fromkeys([root, str(Path.cwd()), *asked.mounts])),
    }


def smoke_layout(asked: SubmitOptions, more: list[str]) -> str:
    """The layout of a smoke run of the recipe on these nodes; ValueError for flags that it would refuse."""
    with warnings.catch_warnings(action="ignore"):
        from megatron_vespo.commands.smoke.command import checked_layout, parse  # takes seconds
        from megatron_vespo.commands.smoke.fit import Nodes

    options, flags = parse([str(asked.recipe), *more])
    if options.ray_address:
        raise ValueError("--ray-address is the job script's to say: leave it out")
    if not asked.gpus_per_node:
        return "none of it on a GPU, the layout as Ray's nodes have cores"
    trainer = engines = (asked.gpus_per_node,) * asked.nodes
    if asked.engine_nodes is not None:
        engines = (engine_nodes.gpus_per_node(asked),) * asked.engine_nodes
    nodes = Nodes(trainer, engines, on_gpus=True, apart=asked.engine_nodes is not None)
    return str(checked_layout([*ON_GPUS, *flags], nodes, options.timeout))


def described_use(settings: TrainSettings, asked: SubmitOptions) -> str:
    """One line about the GPUs that a run will use; ValueError if the nodes have too few."""
    from megatron_vespo.commands.plan.gpu_count import too_few_gpus
    from megatron_vespo.rollout.server_arguments import engine_size

    ranks = 0 if settings.run.rollout_only else settings.trainer.trainer_ranks
    engines = 0 if settings.run.train_from else settings.engines.rollout_engines
    size = engine_size(settings.engines.sglang_flags)
    distillation = settings.distillation
    teachers = [distillation.engine_size(size)] * (distillation.num_engines if engines else 0)
    nodes, gpus_per_node = asked.nodes, asked.gpus_per_node
    if asked.engine_nodes is not None and gpus_per_node:
        return engine_nodes.described_use(asked, ranks, engines, size, teachers)
    there = nodes * gpus_per_node
    used = ranks + engines * size * (not settings.sync.colocate) + sum(teachers)
    of_engines = f"{counted(engines, 'engine')} of {counted(size, 'GPU')}"
    what = f"{counted(ranks, 'trainer rank')} and {of_engines}" + " in turn" * settings.sync.colocate
    if teachers:
        what += f" and {counted(len(teachers), 'teacher engine')} of {counted(teachers[0], 'GPU')}"
    if not gpus_per_node:
        return f"checked: {what}, none of them on a GPU"
    if wrong := too_few_gpus(ranks, engines, size, nodes, gpus_per_node, settings.sync.colocate, teachers):
        raise ValueError(wrong)
    return f"checked: {what} use {used} of {there} GPUs"


def check_plan(flags: list[str], asked: SubmitOptions) -> None:
    """ValueError for a run that `megatron-vespo plan` refuses. Takes seconds."""
    from megatron_vespo.commands.plan.command import parsed, planned, what_does_not_fit
    from megatron_vespo.commands.plan.plan import Cluster

    if not asked.gpus_per_node or asked.gpu == "other":
        parsed(flags)
        return
    cluster = Cluster(*engine_nodes.all_nodes(asked), GPUS[asked.gpu])
    plan, of_engines = planned(flags, cluster), asked.engine_gpu or asked.gpu
    if of_engines not in (asked.gpu, "other"):
        plan = replace(plan, engine=planned(flags, replace(cluster, gpu=GPUS[of_engines])).engine)
    if wrong := what_does_not_fit(plan, flags, with_engines=of_engines != "other"):
        gpus = f"--gpu {asked.gpu}" + (f" --engine-gpu {asked.engine_gpu}" if asked.engine_gpu else "")
        more = f"; and {len(wrong) - 1} more, see megatron-vespo plan" if wrong[1:] else ""
        raise ValueError(f"does not fit {gpus}: {wrong[0]}{more}")


def asked_sbatch(command: list[str]) -> list[str]:
    """[a line] if sbatch would accept the job, [] without SLURM; ValueError if sbatch would refuse it."""
    if not _slurm_answers():
        return []
    told = _asked([command[0], "--test-only", *command[1:]])
    if told.returncode:
        raise ValueError(f"sbatch would refuse the job: {' '.join(told.stderr.split())}")
    return ["sbatch would take it"]


def _slurm_answers() -> bool:
    if shutil.which("sbatch") is None or shutil.which("scontrol") is None:
        return False
    return not _asked(["scontrol", "ping"]).returncode


def _asked(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=SUBMIT_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(
            f"{command[0]} has not answered in {SUBMIT_TIMEOUT_S:g} s: its controller is busy or gone"
        ) from error


def submit(command: list[str], jobs: int) -> list[str]:
    """Queues the jobs; one line for each."""
    if shutil.which("sbatch") is None:
        raise RuntimeError("sbatch is not on PATH: submit where the cluster's jobs are submitted")
    lines: list[str] = []
    before: str | None = None
    for _ in range(jobs):
        after: list[str] = []
        if before is not None:
            # if the previous job has finished the run, this one never starts and is removed
            after = [f"--dependency=afternotok:{before}", "--kill-on-invalid-dep=yes"]
        told = _asked([command[0], *after, *command[1:]])
        if told.returncode:
            queued = f" (in the queue already: {', '.join(lines)})" if lines else ""
            raise RuntimeError(f"sbatch refuses the job: {' '.join(told.stderr.split())}{queued}")
        number = told.stdout.strip().split(";")[0]
        lines.append(f"job {number}" + (f", begins if {before} does not finish the run" if before else ""))
        before = number
    return lines
