"""What is wrong with a plan, and what would be right. A line each."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_vespo.hardware import GIB
from megatron_vespo.planning.gpu_count import too_few_gpus
from megatron_vespo.planning.plan import Plan

# of one side, from where the GPUs are better split otherwise; in turn each waits while the other works
IDLE_SHARE, IDLE_SHARE_IN_TURN = 0.4, 0.8


def errors(plan: Plan) -> list[str]:
    """What will not run; memory of the trainer aside, which has fixes to try."""
    return [*_placement(plan), *_engines(plan)]


def warnings(plan: Plan) -> list[str]:
    """What will run, and not well."""
    return [*_tight_engines(plan), *_layout(plan), *_balance(plan)]


def _placement(plan: Plan) -> Iterator[str]:
    cluster, args = plan.cluster, plan.args
    wrong = too_few_gpus(
        args.trainer_ranks, args.rollout_engines, plan.engine_size, cluster.nodes, cluster.gpus_per_node
    )
    if wrong:
        yield wrong


def _engines(plan: Plan) -> Iterator[str]:
    engine, args = plan.engine, plan.args
    longest = args.max_prompt_tokens + args.max_completion_tokens
    if engine.tokens < longest:
        yield (
            f"an engine holds keys and values of {engine.tokens:,} tokens, a request may have {longest:,}: "
            f"raise --sglang-mem-fraction-static {engine.fraction:g} or --sglang-tp-size {engine.size}"
        )
    if engine.rest < 2 * engine.bucket:
        yield (
            f"--sglang-mem-fraction-static {engine.fraction:g} leaves {engine.rest / GIB:.1f} GiB, a weight "
            f"sync alone takes {2 * engine.bucket / GIB:.1f}: lower it, or --weight-sync-bucket-mb"
        )


def _tight_engines(plan: Plan) -> Iterator[str]:
    engine, running = plan.engine, plan.speed.running
    assigned = plan.requests_per_engine
    fits = int(engine.tokens // plan.lengths.sample)
    if fits < min(assigned, 64):
        yield (
            f"the KV cache of an engine holds {fits} mean requests, a batch brings it {assigned}: a larger "
            "--sglang-mem-fraction-static or --sglang-tp-size"
        )
    if plan.args.rollout_engines > 1 and assigned < 8:
        yield f"a rollout batch gives an engine {assigned} requests ({running} fit): fewer --rollout-engines"


def _layout(plan: Plan) -> Iterator[str]:
    args, per_node = plan.args, plan.cluster.gpus_per_node
    if args.tensor_model_parallel_size > per_node:
        yield (
            f"--tensor-model-parallel-size {args.tensor_model_parallel_size} crosses nodes of {per_node} "
            "GPUs: at most that many, the rest by --pipeline-model-parallel-size"
        )
    rest = plan.cluster.gpus - plan.gpus_needed
    if rest >= plan.engine_size:
        yield (
            f"{rest} of {plan.cluster.gpus} GPUs stay empty: --rollout-engines "
            f"{args.rollout_engines + rest // plan.engine_size}"
        )


def _balance(plan: Plan) -> Iterator[str]:
    result = plan.speed.result
    waiting, engines = result.trainer_idle.get("generation", 0.0), result.engines_idle.get("training", 0.0)
    most = IDLE_SHARE if plan.args.max_staleness else IDLE_SHARE_IN_TURN
    if waiting > most:
        yield f"the trainer waits for engines {waiting:.0%} of the time: more of the GPUs for engines"
    elif engines > most:
        yield f"engines wait for the trainer {engines:.0%} of the time: more of the GPUs for the trainer"
    elif not plan.args.max_staleness:
        yield (
            f"engines wait for the trainer {engines:.0%} of the time and it for them {waiting:.0%}: "
            f"--max-staleness {2 * plan.args.mini_batches} lets both work"
        )
