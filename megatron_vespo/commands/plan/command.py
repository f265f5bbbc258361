"""`megatron-vespo plan`: checks a run before it is queued; needs no GPU."""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Iterator, Sequence

from megatron_vespo.arguments.checks import check_positive
from megatron_vespo.arguments.parse import parse_settings
from megatron_vespo.arguments.parser import recipe_parser
from megatron_vespo.arguments.recipe import read_recipe
from megatron_vespo.arguments.train_settings import TrainSettings
from megatron_vespo.commands.plan import findings
from megatron_vespo.commands.plan.plan import Cluster, Plan, make_plan, memory_of
from megatron_vespo.commands.plan.recomputation import margin, selections, without_recomputation
from megatron_vespo.commands.plan.report import format_memory, format_speed
from megatron_vespo.commands.plan.speed import Lengths
from megatron_vespo.models.stage import Stage
from megatron_vespo.rollout.server_arguments import engine_size
from megatron_vespo.system.hardware import GIB, GPUS, ON_GPUS
from megatron_vespo.system.plugins import prepare_for_megatron

DESCRIPTION = """\
Check a run of `megatron-vespo train` before it waits in a queue. Needs no GPU and no data; of --hf-checkpoint
only config.json.

Megatron itself parses the flags and builds the model of every pipeline stage at the real number of ranks,
on tensors without memory. What the parameters take follows from that exactly; activations, engines and
seconds are estimates: even routing, full micro-batches, rates derived from data sheets, nothing measured.

Exit code: 0 for a run that fits, 1 for one that does not, 2 for flags that are refused.
"""


def main(argv: list[str]) -> int:
    options, flags = _parser().parse_known_args(argv)
    check_positive(options, ("nodes", "gpus_per_node", "mean_prompt_tokens", "mean_completion_tokens"))
    flags = [*ON_GPUS, *read_recipe(options.recipe), *flags]
    cluster = Cluster(options.nodes, options.gpus_per_node, GPUS[options.gpu])
    plan = planned(flags, cluster, options.mean_prompt_tokens, options.mean_completion_tokens)
    print(format_memory(plan), end="\n\n")
    if errors := what_does_not_fit(plan, flags):
        for error in errors:
            print(f"DOES NOT FIT: {error}")
        return 1
    print(format_speed(plan), end="\n\n")
    for warning in findings.warnings(plan):
        print(f"warning: {warning}")
    if suggestion := less_recomputation(plan, flags):
        print(f"suggestion: {suggestion}")
    print("fits")
    return 0


def _parser() -> argparse.ArgumentParser:
    usage = "[--gpus-per-node 8] [--gpu h100] [flags of train]"
    parser = recipe_parser("plan", usage, DESCRIPTION)
    add = parser.add_argument
    add("--gpus-per-node", type=int, default=8, metavar="N", help="default: 8")
    add("--gpu", choices=GPUS, default="h100", help="default: h100")
    add("--mean-completion-tokens", type=float, metavar="X",
        help="default: a quarter of --max-completion-tokens")  # fmt: skip
    add("--mean-prompt-tokens", type=float, metavar="X", help="default: a quarter of --max-prompt-tokens")
    return parser


def planned(
    flags: list[str],
    cluster: Cluster,
    prompt_tokens: float | None = None,
    completion_tokens: float | None = None,
) -> Plan:
    """The plan of a run; tokens are means. ValueError for flags that this program or Megatron refuses."""
    settings, stages = parsed(flags)
    lengths = Lengths(
        prompt_tokens or settings.rollout.max_prompt_tokens / 4,
        completion_tokens or settings.rollout.max_completion_tokens / 4,
    )
    return make_plan(settings, stages, cluster, engine_size(settings.engines.sglang_flags), lengths)


def parsed(flags: list[str]) -> tuple[TrainSettings, list[Stage]]:
    """The run's settings, and its pipeline stages as Megatron divides them."""
    with warnings.catch_warnings(action="ignore"):
        prepare_for_megatron()
        from megatron_vespo.trainer.meta_model import build_stages

    logging.getLogger("megatron").setLevel(logging.ERROR)
    # the checkpoint to resume from need not exist yet
    settings = parse_settings([*flags, "--load", ""], "plan", ("hf_checkpoint",))
    if settings.run.train_from or settings.run.rollout_only:
        raise ValueError("plan is for runs that train and generate: leave --train-from, --rollout-only out")
    return settings, build_stages(settings.megatron)


def what_does_not_fit(plan: Plan, flags: list[str], with_engines: bool = True) -> list[str]:
    """One line per problem, with the fix. `flags` are the plan's; without engines: the trainer's only."""
    return [*_memory_errors(plan, flags), *(findings.errors(plan) if with_engines else [])]


def _memory_errors(plan: Plan, flags: list[str]) -> Iterator[str]:
    index = plan.tightest
    headroom = plan.headroom(index)
    if headroom >= 0:
        return
    where = f" on pipeline stage {index}" if len(plan.stages) > 1 else ""
    fixes = [
        f"{' '.join(fix)} (headroom {left / GIB:.1f} GiB)"
        for fix in _candidates(plan.settings)
        if (left := _headroom(plan, [*flags, *fix])) is not None and left >= 0
    ]
    hint = ", or ".join(fixes) or "no single flag helps: more trainer ranks, or another layout"
    yield f"trainer headroom is {headroom / GIB:.1f} GiB{where}: {hint}"


def _candidates(settings: TrainSettings) -> Iterator[Sequence[str]]:
    """Flags that save memory, the cheapest first."""
    full = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".split()
    if settings.trainer.recompute_granularity != "full":
        yield full
    for name in ("expert_model_parallel_size", "tensor_model_parallel_size", "pipeline_model_parallel_size"):
        if name != "expert_model_parallel_size" or settings.trainer.num_experts is not None:
            yield [f"--{name.replace('_', '-')}", str(2 * getattr(settings.trainer, name))]
    longest = -(-settings.trainer.seq_length // settings.trainer.context_parallel_size)
    if longest < settings.trainer.max_tokens_per_gpu:
        yield ["--max-tokens-per-gpu", str(longest)]
    if not settings.trainer.optimizer_cpu_offload and settings.trainer.bf16:
        yield ["--use-precision-aware-optimizer", "--optimizer-cpu-offload"]
        if settings.trainer.recompute_granularity != "full":
            yield [*full, "--use-precision-aware-optimizer", "--optimizer-cpu-offload"]


def less_recomputation(plan: Plan, flags: list[str]) -> str | None:
    """Instead of full recomputation: of the selections that fit well, the one that recomputes least."""
    if plan.settings.trainer.recompute_granularity != "full":
        return None
    for modules in selections(plan.settings):
        selective = modules and ["--recompute-granularity", "selective", "--recompute-modules", *modules]
        try:
            settings, stages = parsed([*without_recomputation(flags), *selective])
        except ValueError:
            continue
        left = _least_left(plan, settings, stages)
        if left >= margin(settings, stages, plan.cluster.gpu.memory):
            how = " ".join(selective) or "without --recompute-granularity a run"
            return f"{how} recomputes less (headroom {left / GIB:.1f} GiB)"
    return None


def _headroom(plan: Plan, flags: list[str]) -> float | None:
    """Headroom of the fullest rank with these flags; None if they are refused."""
    try:
        settings, stages = parsed(flags)
    except ValueError:
        return None
    return _least_left(plan, settings, stages)


def _least_left(plan: Plan, settings: TrainSettings, stages: list[Stage]) -> float:
    """Headroom of the fullest rank."""
    return plan.cluster.gpu.memory - max(memory.total for memory in memory_of(settings, stages))
