"""Finds what is wrong with a plan, and the fix: one line each."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron_vespo.commands.plan.engine_memory import CONTEXT
from megatron_vespo.commands.plan.gpu_count import too_few_gpus
from megatron_vespo.commands.plan.plan import Plan
from megatron_vespo.commands.plan.trainer_memory import ENGINE_AT_REST
from megatron_vespo.system.hardware import GIB

# an engine's activations and CUDA graphs, beside a trainer on the same GPU: an allowance
ENGINE_AT_WORK = 5 * GIB
HOST_SHARE = 0.8  # share of a node's CPU memory: the rest is for engines, files and the system
# From this idle share of one side on, another split of the GPUs is better. In turn, each side waits while
# the other works.
IDLE_SHARE, IDLE_SHARE_IN_TURN = 0.4, 0.8
# suggested deadline / training seconds of a batch: these are estimated, and the save follows
DEADLINE_MARGIN = 1.3


def errors(plan: Plan) -> list[str]:
    """Reasons why the run fails, except for the trainer's memory: fixes for that are tried separately."""
    return [*_placement(plan), *_engines(plan), *_turns(plan)]


def warnings(plan: Plan) -> list[str]:
    """Reasons why the run works, but not well."""
    return [
        *_tight_engines(plan), *_restarts(plan), *_host(plan), *_layout(plan), *_balance(plan),
        *_preemption(plan),
    ]  # fmt: skip


def _placement(plan: Plan) -> Iterator[str]:
    cluster, settings = plan.cluster, plan.settings
    wrong = too_few_gpus(
        settings.trainer.trainer_ranks, settings.engines.rollout_engines, plan.engine_size, cluster.nodes,
        cluster.gpus_per_node, settings.sync.colocate, plan.teacher_sizes,
    )  # fmt: skip
    if wrong:
        yield wrong


def _engines(plan: Plan) -> Iterator[str]:
    engine, longest = plan.engine, plan.longest
    staging = plan.settings.sync.weight_sync_staging
    if engine.tokens < longest:
        yield (
            f"an engine holds keys and values of {engine.tokens:,} tokens, a request may have {longest:,}: "
            f"raise --sglang-mem-fraction-static {engine.fraction:g} or --sglang-tp-size {engine.size}"
        )
    if engine.rest < engine.sync and not plan.settings.sync.colocate:
        yield (
            f"--sglang-mem-fraction-static {engine.fraction:g} leaves {engine.rest / GIB:.1f} GiB, a weight "
            f"sync alone takes {engine.sync / GIB:.1f}: lower it, or "
            + ("leave out --weight-sync-staging" if staging else "--weight-sync-bucket-mb")
        )


def _turns(plan: Plan) -> Iterator[str]:
    """Memory that does not fit when trainer and engine take turns on a GPU, in a sync or for log-probs."""
    engine, free = plan.engine, plan.cluster.gpu.memory - CONTEXT
    if not plan.settings.sync.colocate:
        return
    back = max(memory.comes_back for memory in plan.trainer)
    left = engine.cache + engine.rest - ENGINE_AT_REST
    if back > left:
        yield (
            f"a checkpoint and its log-probs may take {back / GIB:.1f} GiB, an engine's weights leave "
            f"{left / GIB:.1f}: lower --max-tokens-per-gpu, or engines of more GPUs"
        )
    in_sync = max(memory.in_sync for memory in plan.trainer) + 2 * engine.bucket
    if in_sync > (left := free - engine.weights - ENGINE_AT_REST):
        yield (
            f"in a weight sync trainer and buckets take {in_sync / GIB:.1f} GiB, an engine's weights leave "
            f"{left / GIB:.1f}: engines of more GPUs, or more trainer ranks"
        )
    if engine.rest >= ENGINE_AT_WORK:
        return
    most = math.floor(100 * (engine.fraction + (engine.rest - ENGINE_AT_WORK) / free)) / 100
    needed = (engine.weights + plan.longest * engine.token_bytes) / free
    fix = (
        f"--sglang-mem-fraction-static {most:g}"
        if most > needed
        else "more trainer ranks, engines of more GPUs, or --use-precision-aware-optimizer "
        "--optimizer-cpu-offload"
    )
    yield (
        f"while an engine generates, trainer and --sglang-mem-fraction-static {engine.fraction:g} leave it "
        f"{engine.rest / GIB:.1f} GiB for activations and graphs, {ENGINE_AT_WORK / GIB:g} are wanted: {fix}"
    )


def _restarts(plan: Plan) -> Iterator[str]:
    """A restarted engine, also one during a sync, takes its fraction of what the trainer leaves free."""
    engine = plan.engine
    again = engine.cache - engine.fraction * max(memory.in_sync for memory in plan.trainer)
    if plan.settings.sync.colocate and again < plan.longest * engine.token_bytes:
        yield (
            "an engine that fails cannot be started again: its share of what the trainer leaves "
            "holds no request; engines of more GPUs, or more trainer ranks"
        )


def _host(plan: Plan) -> Iterator[str]:
    there = plan.cluster.gpu.host * plan.cluster.gpus_per_node
    if plan.host.node > HOST_SHARE * there:
        yield (
            f"training takes {plan.host.node / GIB:,.0f} GiB of a node's CPU memory, a DGX has "
            f"{there / GIB:,.0f}: a smaller --rollout-batch-size with fewer --steps-per-rollout, or more "
            "--trainer-ranks"
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
    if plan.settings.engines.rollout_engines > 1 and assigned < 8:
        yield f"a rollout batch gives an engine {assigned} requests ({running} fit): fewer --rollout-engines"


def _layout(plan: Plan) -> Iterator[str]:
    settings, per_node = plan.settings, plan.cluster.gpus_per_node
    if settings.trainer.tensor_model_parallel_size > per_node:
        yield (
            f"--tensor-model-parallel-size {settings.trainer.tensor_model_parallel_size} crosses nodes of "
            f"{per_node} GPUs: at most that many, the rest by --pipeline-model-parallel-size"
        )
    rest = plan.cluster.gpus - plan.gpus_needed
    if settings.sync.colocate:
        if rest:
            yield f"{rest} of {plan.cluster.gpus} GPUs stay empty: more --trainer-ranks"
        if (
            beside := settings.trainer.trainer_ranks - settings.engines.rollout_engines * plan.engine_size
        ) >= plan.engine_size:
            yield (
                f"{beside} trainer ranks have no engine on their GPU: --rollout-engines "
                f"{settings.trainer.trainer_ranks // plan.engine_size}"
            )
    elif rest >= plan.engine_size:
        yield (
            f"{rest} of {plan.cluster.gpus} GPUs stay empty: --rollout-engines "
            f"{settings.engines.rollout_engines + rest // plan.engine_size}"
        )


def _balance(plan: Plan) -> Iterator[str]:
    if plan.settings.sync.colocate:
        return
    result = plan.speed.result
    waiting, engines = result.trainer_idle.get("generation", 0.0), result.engines_idle.get("training", 0.0)
    most = IDLE_SHARE if plan.settings.rollout.max_staleness else IDLE_SHARE_IN_TURN
    if waiting > most:
        yield f"the trainer waits for engines {waiting:.0%} of the time: more of the GPUs for engines"
    elif engines > most:
        yield f"engines wait for the trainer {engines:.0%} of the time: more of the GPUs for the trainer"
    elif not plan.settings.rollout.max_staleness:
        yield (
            f"engines wait for the trainer {engines:.0%} of the time and it for them {waiting:.0%}: "
            f"--max-staleness {2 * plan.settings.rollout.steps_per_rollout} lets both work"
        )


def _preemption(plan: Plan) -> Iterator[str]:
    """The save comes after the current batch is trained: with a shorter deadline nothing is saved."""
    seconds, deadline = plan.speed.training_seconds, plan.settings.run.preemption_deadline
    if deadline < seconds:
        enough = 100 * math.ceil(DEADLINE_MARGIN * seconds / 100)
        yield (
            f"a rollout batch trains {seconds:,.0f} s, a run that is preempted has --preemption-deadline "
            f"{deadline:g} to finish and save it: --preemption-deadline {enough}"
        )
