"""Formats a plan as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from megatron_vespo.checkpoints.fp8_report import fp8_lines
from megatron_vespo.commands.plan.plan import Plan, hf_tensors_of
from megatron_vespo.commands.plan.trainer_memory import RESERVE
from megatron_vespo.commands.plan.weight_sync import Broadcast, Exact, WeightSync
from megatron_vespo.system.hardware import GIB
from megatron_vespo.system.wording import counted
from megatron_vespo.weight_sync.traffic import Link

# with --colocate, and without it
WIRES = {True: "by CUDA IPC, and NCCL between trainer ranks", False: "by NCCL from rank to rank"}
LINK_NAMES: dict[Link, str] = {
    "memory": "on the same GPU",
    "host": "over NVLink",
    "network": "over the network",
}
PARTS = ("weights", "gradients", "optimizer", "activations", "log_probs", "packs", "sync_buffers")


def format_memory(plan: Plan) -> str:
    parts = ("\n".join(part(plan)) for part in (_run, _trainer, _host, _engine, _precision))
    return "\n\n".join(filter(None, parts))


def format_speed(plan: Plan) -> str:
    return "\n".join(_speed(plan))


def _run(plan: Plan) -> Iterator[str]:
    settings, cluster = plan.settings, plan.cluster
    gpu = cluster.gpu
    name = settings.engines.hf_checkpoint.name
    yield f"model      {name}: {plan.parameters:,} parameters over all ranks, as in its config"
    yield (
        f"cluster    {counted(cluster.nodes, 'node')} x {cluster.gpus_per_node} {gpu.name} of "
        f"{gpu.memory / GIB:.1f} GiB = {counted(cluster.gpus, 'GPU')}; "
        f"{settings.trainer.trainer_ranks} train, "
        f"{counted(settings.engines.rollout_engines, 'engine')} x {plan.engine_size} generate"
        + (", in turn on the same GPUs" if settings.sync.colocate else "")
    )
    if sizes := plan.teacher_sizes:
        yield (
            f"teachers   {counted(len(sizes), 'engine')} x {sizes[0]} score the responses; their memory is "
            "not planned"
        )
    sizes = {
        "tp": settings.trainer.tensor_model_parallel_size,
        "pp": settings.trainer.pipeline_model_parallel_size,
        "vpp": settings.trainer.virtual_pipeline_model_parallel_size or 1,
        "cp": settings.trainer.context_parallel_size,
        "dp": settings.trainer.data_parallel_size,
        "ep": settings.trainer.expert_model_parallel_size,
        "etp": settings.trainer.expert_tensor_parallel_size or settings.trainer.tensor_model_parallel_size,
    }
    yield "layout     " + ", ".join(f"{name}{size}" for name, size in sizes.items())


def _trainer(plan: Plan) -> Iterator[str]:
    """The first, the last and the fullest stage."""
    last = len(plan.stages) - 1
    shown = sorted({0, last, plan.tightest})
    yield "trainer, GiB a GPU".ljust(26) + "".join(_stage_name(index, last).rjust(16) for index in shown)

    def row(name: str, values: list[float]) -> str:
        return f"  {name:<24}" + "".join(f"{value / GIB:16.2f}" for value in values)

    counts = "".join(f"{plan.stages[index].parameters:16,}" for index in shown)
    yield f"  {'parameters':<24}" + counts
    yield f"  {'of them experts':<24}" + "".join(f"{plan.stages[index].experts:16,}" for index in shown)
    for part in PARTS:
        yield row(part.replace("_", "-"), [getattr(plan.trainer[index], part) for index in shown])
    yield row("CUDA, NCCL, gaps", [RESERVE] * len(shown))
    if plan.settings.sync.colocate:
        yield row("the engine, at rest", [plan.trainer[index].engine for index in shown])
    yield row("headroom", [plan.headroom(index) for index in shown])


def _host(plan: Plan) -> Iterator[str]:
    host = plan.host
    yield f"{'trainer, GiB of CPU memory':<26}{'a rank':>16}{'a node':>16}"
    for name, each in {
        "packs of a rollout batch": host.packs,
        "offloaded optimizer": host.optimizer,
        "while engines generate": host.given_back,
        "pi_old and reference": host.other_policies,
        "a save in the background": host.save,
    }.items():
        if each:
            yield f"  {name:<24}{each / GIB:16.2f}{host.ranks * each / GIB:16.1f}"
    yield f"  {'samples, shared':<24}{'':16}{host.samples / GIB:16.1f}"
    there = plan.cluster.gpu.host * plan.cluster.gpus_per_node / GIB
    yield f"  {'together':<24}{host.rank / GIB:16.2f}{host.node / GIB:16.1f}   of {there:,.0f} in a DGX"


def _stage_name(index: int, last: int) -> str:
    if last == 0:
        return "all ranks"
    return f"stage {index}" + (" (last)" if index == last else "")


def _engine(plan: Plan) -> Iterator[str]:
    engine = plan.engine
    share = f"{engine.fraction:g} ({'assumed' if engine.assumed else 'given'})"
    longest, mean = plan.longest, plan.lengths.sample
    yield f"engine of {counted(engine.size, 'GPU')}, GiB a GPU, mem-fraction-static {share}"
    yield f"  {'weights':<24}{engine.weights / GIB:16.2f}"
    yield (
        f"  {'keys and values':<24}{engine.cache / GIB:16.2f}   {engine.tokens:,} tokens: "
        f"{engine.tokens // longest:,} requests of {longest:,}, {engine.tokens // mean:,.0f} of {mean:,.0f}"
    )
    if plan.settings.sync.colocate:
        stays = "its weights and optimizer wait in CPU memory" if plan.offload else "weights and optimizer"
        yield f"  {'the trainer, at rest':<24}{plan.beside / GIB:16.2f}   {stays}"
    sync = f"with {engine.sync / GIB:.2f} of a weight sync"
    yield f"  {'activations, graphs':<24}{engine.rest / GIB:16.2f}   {sync}"


def _precision(plan: Plan) -> Iterator[str]:
    if plan.settings.engines.rollout_quantization is not None:
        yield from fp8_lines(hf_tensors_of(plan.settings))


def _speed(plan: Plan) -> Iterator[str]:
    speed, settings = plan.speed, plan.settings
    samples = settings.rollout.rollout_batch_size * settings.rollout.group_size
    yield from _sync(plan.sync)
    if plan.offload:
        yield (
            f"turns             {plan.trainer_moved / 1e9:.1f} GB of a rank to CPU memory and back at "
            f"{plan.cluster.gpu.host_link / 1e9:.3g} GB/s: {plan.turn_seconds:.1f} s at least"
        )
    yield (
        f"tokens            {plan.lengths.completion:,.0f} a response and {plan.lengths.prompt:,.0f} a "
        "prompt, in the mean; log-normal"
    )
    yield f"trainer           {speed.trainer_tokens:,.0f} tokens/s while it trains"
    yield (
        f"engines           {speed.engine_tokens:,.0f} tokens/s together, each with {speed.running} requests"
    )
    idle = speed.result
    trainer_idle, engines_idle = sum(idle.trainer_idle.values()), sum(idle.engines_idle.values())
    yield (
        f"a rollout batch   {speed.batch_seconds:,.0f} s for {samples:,} responses and "
        f"{settings.rollout.steps_per_rollout} optimizer steps; trainer idle {trainer_idle:.0%}, "
        f"engines {engines_idle:.0%}"
    )
    hours = speed.batch_seconds * settings.run.train_iters / settings.rollout.steps_per_rollout / 3600
    yield f"the run           {hours:,.1f} h for {settings.run.train_iters:,} optimizer steps"


def _sync(sync: WeightSync) -> Iterator[str]:
    if sync.exact is None:
        yield f"weight sync       {sync.seconds:.1f} s by broadcast: {sync.why_broadcast}"
        yield from _broadcast(sync.broadcast)
        return
    yield f"weight sync       {sync.seconds:.1f} s, shard to shard {WIRES[sync.exact.colocate]}"
    yield from _exact(sync.exact)
    yield (
        f"  otherwise       {sync.broadcast.seconds:.1f} s by broadcast, if an engine reports another layout "
        "of its weights"
    )


def _exact(exact: Exact) -> Iterator[str]:
    traffic, totals = exact.traffic, [part.totals for part in exact.traffic.teams]
    sent = exact.sent.values()
    yield f"  received        per engine rank, at most: {_by_link(traffic.received)}"
    yield (
        f"  sent            per trainer rank, at most: {_by_link(traffic.sent)}; {max(sent) / 1e9:.1f} GB in "
        f"all, {sum(sent) / 1e9 / exact.trainer_ranks:.1f} in the mean"
    )
    buffer = max(each.buffer_bytes for each in totals) / GIB
    landing = max(each.landing_bytes for each in totals) / GIB
    yield (
        f"  buffers         {exact.ring} of {buffer:.2f} GiB per trainer rank, {exact.ring} of {landing:.2f} "
        f"per engine rank; {traffic.calls} groups, {exact.pieces:,} pieces per engine"
    )
    rates = ", ".join(f"{exact.rate(over) / 1e9:.3g} GB/s {LINK_NAMES[over]}" for over in exact.links)
    yield (
        f"  seconds         {exact.sending:.2f} to pack and send{rates and f' ({rates})'}, "
        f"{'then' if exact.staging else 'meanwhile'} {exact.loading:.2f} to load; {exact.around:.1f} for "
        "begin, end and checksums"
    )


def _by_link[Rank](sizes: Mapping[Link, Mapping[Rank, int]]) -> str:
    return ", ".join(
        f"{max(of_link.values()) / 1e9:.1f} GB {LINK_NAMES[over]}"
        for over, of_link in sizes.items()
        if of_link
    )


def _broadcast(sync: Broadcast) -> Iterator[str]:
    yield (
        f"  transfer        {sync.transfer:.1f} s: {sync.gathered_bytes / 1e9:.1f} GB gathered at "
        f"{sync.gathered / 1e9:.3g} GB/s and {sync.bytes / 1e9:.1f} GB broadcast at "
        f"{sync.broadcast / 1e9:.3g} GB/s ({sync.link})"
    )
    yield f"  loading         {sync.loading:.1f} s: {sync.tensors:,} tensors in {sync.buckets} buckets"
