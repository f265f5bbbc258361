"""`megatron-vespo smoke [RECIPE]`: runs every part of a run once; the first command on a new cluster."""

from __future__ import annotations

import shutil
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from megatron_vespo.arguments.checks import check_folder, check_positive
from megatron_vespo.arguments.parse import refuse_unknown
from megatron_vespo.arguments.parser import FlagParser
from megatron_vespo.arguments.recipe import read_recipe, with_recipes
from megatron_vespo.arguments.train_settings import TrainSettings
from megatron_vespo.cluster.placement import node_resources, start_ray, stop_ray
from megatron_vespo.cluster.roles import ROLES
from megatron_vespo.commands.smoke.fit import Nodes, Wanted, fit, nodes_of
from megatron_vespo.commands.smoke.flags import (
    MAX_COMPLETION_TOKENS,
    MAX_PROMPT_TOKENS,
    smoke_arguments,
    wanted_layout,
)
from megatron_vespo.commands.smoke.model import config_for, write_config, write_weights
from megatron_vespo.commands.smoke.run import SmokeRun, all_stages
from megatron_vespo.commands.smoke.stages import Stages, Stopped
from megatron_vespo.system.paths import expanded, user_path
from megatron_vespo.system.plugins import has_runtime_plugins
from megatron_vespo.system.settings import Settings

DESCRIPTION = """\
Runs every part of a training run once, with a small random Qwen3-MoE: Ray's placement, trainer ranks, SGLang
engines, log-probs of both compared, two optimizer steps, weight syncs with checksums, turns on shared GPUs
where the run is colocated, a checkpoint and a resume.

RECIPE is a file of train's flags, and flags of train may follow. Their layout and everything that decides how
things are computed are kept; where the layout does not fit what Ray has it is made smaller. Model, data,
lengths and batches are this command's own. Without a RECIPE it takes what there is.

Exit code: 0 when all is well, 1 when a stage failed, 2 for a mistake in flags.
"""
WITHOUT_RECIPE = (
    "--tensor-model-parallel-size 2 --expert-model-parallel-size 2 --expert-tensor-parallel-size 1"
)
LOCAL_CORES = 3  # for two ranks and an engine, which share the cores of a smaller machine


@dataclass(frozen=True)
class SmokeOptions(Settings):
    output_dir: Path
    ray_address: str | None  # None: a local cluster is started
    timeout: float  # seconds, for each wait
    has_recipe: bool


def main(argv: list[str]) -> int:
    options, flags = parse(argv)
    wanted = wanted_layout(flags)
    refuse_unknown(flags, "smoke")  # before anything starts
    stages = all_stages(wanted.colocate)
    check_folder("--output-dir", options.output_dir, writable=True)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="smoke-", dir=options.output_dir)).resolve()
    facts = {"wanted": str(wanted), "logs": str(folder / "logs")}
    try:
        run(options, flags, wanted, stages, folder, facts)
    except Stopped:
        pass
    finally:
        _clean(folder, keep_logs=not stages.ok)
    stages.print_table()
    report = options.output_dir / "smoke.json"
    stages.write(report, facts)
    took = f"{time.monotonic() - stages.started:.0f} s"
    if stages.ok:
        print(f"all is well, in {took}: {report}")
        return 0
    print(f"NOT WELL, after {took}: {report}, {facts['logs']}")
    return 1


def parse(argv: list[str]) -> tuple[SmokeOptions, list[str]]:
    """This command's own options, and the other flags, which are a run's."""
    flags = with_recipes(argv)
    if argv and not argv[0].startswith("-"):
        flags = [*read_recipe(Path(expanded(argv[0]))), *flags[1:]]
    has_recipe = flags != argv
    if not has_recipe:
        flags = [*WITHOUT_RECIPE.split(), *flags]
    parser = FlagParser(
        prog="megatron-vespo smoke",
        usage="megatron-vespo smoke [RECIPE] [options] [flags of train]",
        description=DESCRIPTION,
    )
    add = parser.add_argument
    add("--output-dir", type=user_path, default=Path(), metavar="DIR",
        help="on a disk that all nodes see: gets smoke.json, and the logs where something failed; default: "
        "the recipe's, or the current folder")  # fmt: skip
    add("--ray-address", help="Ray cluster to join, 'auto' for a running one; else a local one starts")
    # long, because the first engines on a cluster compile kernels
    add(
        "--timeout", type=float, default=1200.0, metavar="SECONDS", help="of every wait; default: %(default)g"
    )
    args, rest = parser.parse_known_args(flags)
    options = SmokeOptions.of(args, has_recipe=has_recipe)
    check_positive(options, ("timeout",))
    if options.ray_address:
        rest += ["--ray-address", options.ray_address]
    return options, rest


def run(
    options: SmokeOptions, flags: list[str], wanted: Wanted, stages: Stages, folder: Path, facts: dict
) -> None:
    """Runs all stages. Raises Stopped if one breaks. Fills `facts` with findings about the run."""
    with stages.stage("cluster") as row:
        nodes = look_around(options.ray_address)
        row.detail = facts["nodes"] = str(nodes)
    if nodes.on_gpus and not options.has_recipe:
        flags = [*flags, "--bf16"]  # GPU kernels need it
    layout = fit(wanted, nodes)
    facts["layout"] = str(layout)
    if (wanted.ranks, wanted.engines) not in ((layout.ranks, layout.engines), (None, None)):
        stages.message(f"wanted: {wanted}")
    stages.message(f"layout: {layout}")
    settings = _prepare(flags, layout, nodes, folder, options.timeout)
    facts["dtype"] = str(settings.trainer.params_dtype)
    with stages.stage("model") as row:
        checkpoint, dtype = settings.engines.hf_checkpoint, settings.trainer.params_dtype
        row.bytes = model_bytes = write_weights(checkpoint, dtype, settings.run.seed)
        row.detail = "Qwen3-30B-A3B's shapes, few layers" if nodes.on_gpus else "scaled down, for CPUs"
    with ExitStack() as stack:
        SmokeRun(settings, model_bytes, stages).run(stack)


def checked_layout(flags: list[str], nodes: Nodes, timeout_s: float) -> Wanted:
    """The part of the flags' layout that fits; ValueError for refused flags. Starts nothing."""
    layout = fit(wanted_layout(flags), nodes)
    with tempfile.TemporaryDirectory() as folder:
        _prepare(flags, layout, nodes, Path(folder), timeout_s)
    return layout


def _prepare(flags: list[str], layout: Wanted, nodes: Nodes, folder: Path, timeout_s: float) -> TrainSettings:
    """The run's settings. Writes the model's config into `folder`."""
    longest = 2 * (MAX_PROMPT_TOKENS + MAX_COMPLETION_TOKENS)
    write_config(folder / "model", config_for(layout, nodes.on_gpus, longest))
    return smoke_arguments(flags, layout, nodes, folder, timeout_s)


def look_around(ray_address: str | None) -> Nodes:
    """The nodes that Ray has. RuntimeError without a GPU on a machine that is not set up for CPUs."""
    start_ray(ray_address, 2)
    try:
        resources = node_resources()
    finally:
        stop_ray()
    if ray_address is None and not any(node.get("GPU") for node in resources):
        resources = [node | {"CPU": max(node.get("CPU", 0), LOCAL_CORES)} for node in resources]
    nodes = nodes_of(resources, *ROLES.values())
    if not nodes.on_gpus and not has_runtime_plugins():
        raise RuntimeError(
            f"Ray has no GPU on {len(resources)} node{'s' * (len(resources) > 1)}, and CPUs alone need the "
            "environment of patches/cpu"
        )
    return nodes


def _clean(folder: Path, keep_logs: bool) -> None:
    """Removes what a smoke run has written; keeps its logs if `keep_logs`."""
    for path in folder.iterdir():
        if not (keep_logs and path.name in ("logs", "trace.json")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()
