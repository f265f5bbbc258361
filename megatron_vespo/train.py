"""`megatron-vespo train`: builds everything, runs the controller, leaves nothing running."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import ray
from transformers import AutoTokenizer

from megatron_vespo.arguments import parse_args
from megatron_vespo.cluster.engine_group import EngineGroup, start_engines
from megatron_vespo.cluster.engine_sync import EngineSync
from megatron_vespo.cluster.placement import place, start_ray
from megatron_vespo.cluster.trainer_group import TrainerGroup
from megatron_vespo.controller import Controller, StoppedByAlarm
from megatron_vespo.data.prompts import PromptCursor, PromptSet, load_prompts
from megatron_vespo.data.stop_tokens import stop_token_ids
from megatron_vespo.debug_modes import Recorder, Replay, RolloutOnly, check_modes, check_recorded
from megatron_vespo.observability.metrics import MetricsWriter, batch_records, read_metrics
from megatron_vespo.observability.progress import RunDisplay
from megatron_vespo.observability.report import format_summary, plot_curves, write_summary
from megatron_vespo.observability.tracing import Trace
from megatron_vespo.rewards.pool import RewardPool, RewardResult, load_reward_function
from megatron_vespo.rollout.async_collector import AsyncCollector
from megatron_vespo.rollout.buffer import RolloutBuffer
from megatron_vespo.rollout.buffer_state import unpack_pending
from megatron_vespo.rollout.collector import Collector
from megatron_vespo.rollout.dynamic_sampling import teaches
from megatron_vespo.rollout.generate_function import GenerateFunction, load_generate_function
from megatron_vespo.rollout.scoring import Scorer
from megatron_vespo.rollout.server_arguments import server_arguments
from megatron_vespo.types import Completion, Prompt, RunState, SamplingParams

STREAM_STOP_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Task:
    """What is generated and how it is judged; empty for a run that does not generate."""

    tokenizer: Any = None
    sampling: SamplingParams | None = None
    prompts: PromptSet | None = None
    heldout: list[Prompt] = field(default_factory=list)
    reward: Callable[..., float] | None = None
    generate: GenerateFunction | None = None


def main(argv: list[str]) -> None:
    """Raises ValueError for a user's mistake, with one line that says what would be right."""
    started = time.monotonic()
    args = parse_args(argv)
    check_modes(args)
    task = Task() if args.train_from else _task(args)
    if args.train_from:
        args.rollout_engines = 0
    if args.rollout_only:
        args.trainer_ranks, args.hf_export = 0, False
    args.output_dir.mkdir(parents=True, exist_ok=True)

    with ExitStack() as stack:
        trace = stack.enter_context(Trace(args.output_dir / "trace.json"))
        title = f"VESPO: {args.hf_checkpoint}"
        display = stack.enter_context(RunDisplay(title, args.train_iters, on_phase=trace.phase))
        if task.prompts is not None and task.prompts.num_overlong:
            display.message(
                f"{task.prompts.num_overlong} prompts over --max-prompt-tokens {args.max_prompt_tokens} "
                "skipped"
            )
        controller = _start(args, stack, display, trace, task)
        display.phase_seconds()  # start-up phases end here
        setup_seconds = args.setup_seconds + time.monotonic() - started
        training_started = time.time_ns()
        try:
            state = controller.train()
        except StoppedByAlarm:
            _draw(args)  # what led to it
            raise
        idle = trace.idle(training_started, time.time_ns())
        if args.hf_export:
            with display.phase("export"):
                controller.trainer.export_hf((args.output_dir / "hf").resolve())
    _report(args, state, len(task.heldout), setup_seconds, idle)


def _task(args: Namespace) -> Task:
    tokenizer = AutoTokenizer.from_pretrained(args.hf_checkpoint)
    prompts = _prompts(args, args.prompt_data, tokenizer)
    heldout = (
        _prompts(args, args.heldout_data, tokenizer).prompts[: args.heldout_prompts]
        if args.heldout_data
        else []
    )
    stops = stop_token_ids(args.hf_checkpoint, tokenizer.eos_token_id)
    sampling = SamplingParams(args.rollout_temperature, args.max_completion_tokens, stops)
    reward = load_reward_function(args.reward_function)
    generate = load_generate_function(args.generate_function) if args.generate_function else None
    return Task(tokenizer, sampling, prompts, heldout, reward, generate)


def _prompts(args: Namespace, path: Path, tokenizer) -> PromptSet:
    loaded = load_prompts(
        path,
        tokenizer,
        prompt_key=args.prompt_key,
        answer_key=args.answer_key,
        answer_pattern=args.answer_pattern,
        apply_chat_template=args.apply_chat_template,
        max_prompt_tokens=args.max_prompt_tokens,
        overlong=args.overlong_prompts,
    )
    largest = max(max(prompt.token_ids) for prompt in loaded.prompts)
    if largest >= args.vocab_size:  # SGLang's scheduler would die of it
        raise ValueError(
            f"--hf-checkpoint {args.hf_checkpoint}: its tokenizer makes token id {largest} of {path}, but "
            f"the model's vocabulary has {args.vocab_size} entries"
        )
    return loaded


def _start(args: Namespace, stack: ExitStack, display: RunDisplay, trace: Trace, task: Task) -> Controller:
    """Engines and trainer come up side by side; whatever fails, `stack` ends what had started."""
    log_dir = (args.output_dir / "logs").resolve()
    rewards = None
    if task.reward is not None:
        rewards = RewardPool(task.reward, args.reward_workers, args.reward_timeout, args.reward_memory_gb)
        stack.callback(rewards.close)
    with display.phase("start Ray"):
        stack.callback(ray.shutdown)
        start_ray(args)
        engine_size = _engine_size(args.sglang_flags)
        placement = place(args, engine_size)
    engines = start_engines(args, placement, _server_arguments(args), log_dir, display.message)
    stack.callback(engines.stop)
    trainer = stored = None
    if not args.rollout_only:
        trainer = TrainerGroup(args, placement, log_dir, watch=engines.check, on_calls=trace.calls)
        stack.callback(trainer.stop)
        with display.phase("start Megatron"):
            stored = trainer.start()
            for line in trainer.describe():
                display.message(line)
    if args.rollout_engines:
        with display.phase("start SGLang"):
            engines.wait_until_ready()
    rollout_buffer = stored.pop("rollout_buffer") if stored else None
    state = RunState(**stored) if stored else RunState()
    if args.train_from:
        check_recorded(args, state.iteration)
    metrics = MetricsWriter(args.output_dir, state.iteration if stored else None)
    stack.callback(metrics.close)
    if stored:
        display.message(
            f"resumed at optimizer step {state.iteration}, {state.consumed_prompts} prompts consumed"
        )
    generates = args.rollout_engines > 0
    collector = _collector(args, engines, trace, task) if generates else None
    cursor = PromptCursor(task.prompts.prompts, args.seed, state.consumed_prompts) if generates else None
    scorer = _scorer(args, task, rewards) if rewards else None
    stream = None
    if generates:
        stream = _stream(args, stack, collector, scorer, cursor, task, state, rollout_buffer, trace)
    mode = Replay if args.train_from else RolloutOnly if args.rollout_only else Controller
    controller = mode(
        args=args,
        trainer=trainer,
        collector=collector,
        scorer=scorer,
        cursor=cursor,
        heldout=task.heldout,
        sampling=task.sampling,
        display=display,
        metrics=metrics,
        state=state,
        # what the alarms compare with survives a resume into the same folder
        history=batch_records(read_metrics(args.output_dir / "metrics.jsonl")),
        record=Recorder(args, state.iteration) if args.save_rollouts else None,
        stream=stream,
        engine_sync=EngineSync(engines, trainer, engine_size),
    )
    if collector is not None:
        collector.meanwhile = partial(controller.heal, while_others_serve=False)
    if stream is not None:
        stream.meanwhile = partial(controller.heal, while_others_serve=True)
    return controller


def _collector(args: Namespace, engines: EngineGroup, trace: Trace, task: Task) -> Collector:
    return Collector(
        engines.urls,
        num_layers=args.num_layers,
        topk=args.moe_router_topk if args.num_experts else None,
        request_timeout_s=args.generate_timeout,
        max_dispatches=args.max_dispatches,
        check=engines.check,
        on_requests=trace.requests,
        lost=engines.lost,
        generate_function=task.generate,
    )


def _scorer(args: Namespace, task: Task, rewards: RewardPool) -> Scorer:
    return Scorer(
        task.tokenizer, rewards, args.max_completion_tokens, args.overlong_buffer, args.overlong_penalty
    )


def _stream(
    args: Namespace,
    stack: ExitStack,
    collector: Collector,
    scorer: Scorer,
    cursor: PromptCursor,
    task: Task,
    state: RunState,
    rollout_buffer: bytes | None,
    trace: Trace,
) -> AsyncCollector | None:
    """What generates in the background; None in synchronous runs."""
    by_id = {prompt.prompt_id: prompt for prompt in task.prompts.prompts}
    pending = unpack_pending(rollout_buffer, by_id) if rollout_buffer else []
    if args.max_staleness == 0:
        if pending:
            raise ValueError(
                f"--load {args.load}: {len(pending)} prompts were in flight when this asynchronous run was "
                "saved: go on with --max-staleness above 0"
            )
        return None
    size = args.rollout_batch_size
    buffer = RolloutBuffer(
        lambda: cursor.take(1)[0],
        batch_size=size,
        mini_batches=args.mini_batches,
        max_staleness=args.max_staleness,
        requeue=args.stale_groups == "requeue",
        max_dispatches=args.max_dispatches,
        version=state.iteration,
        serial=state.consumed_prompts,
        max_held=args.over_subscription and int(args.over_subscription * size),
        teaches=teaches,
        max_left_out=(args.dynamic_sampling_max_batches - 1) * size if args.dynamic_sampling else 0,
    )
    buffer.restore(pending)

    def score(group: list[Completion]) -> Sequence[RewardResult]:
        start = time.time_ns()
        try:
            return scorer.score(group)
        finally:
            trace.phase("score", start, time.time_ns())

    stream = AsyncCollector(
        collector,
        buffer,
        task.sampling,
        score,
        num_completions=args.num_completions,
        seed=args.seed,
        on_change=lambda buffer: trace.count(
            "groups", in_flight=buffer.num_in_flight, finished=buffer.num_finished
        ),
    )
    stack.callback(stream.stop, STREAM_STOP_TIMEOUT_S)
    return stream


def _server_arguments(args: Namespace) -> list[str]:
    return server_arguments(
        args.sglang_flags,
        device="cuda" if args.distributed_backend == "nccl" else "cpu",
        is_moe=args.num_experts is not None,
        dtype="bfloat16" if args.bf16 else "float32",
        seed=args.seed,
        # prefixes in the cache would be older than the request that meets them knows
        prefix_cache=not (args.max_staleness and args.on_weight_update == "in-place"),
    )


def _engine_size(sglang_flags: list[str]) -> int:
    """Ranks of one engine that take part in a weight sync: its tensor-parallel size."""
    for name in ("--tensor-parallel-size", "--tp-size", "--tp"):
        if name in sglang_flags:
            return int(sglang_flags[sglang_flags.index(name) + 1])
    return 1


def _draw(args: Namespace) -> Path:
    picture = args.output_dir / "curves.png"
    plot_curves(read_metrics(args.output_dir / "metrics.jsonl"), picture, f"VESPO, N = {args.mini_batches}")
    return picture


def _report(
    args: Namespace, state: RunState, num_heldout: int, setup_seconds: float, idle: dict[str, dict]
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
        "heldout_accuracy_before": state.heldout_before,
        "heldout_accuracy_after": state.heldout_after,
        "heldout_prompts": num_heldout,
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
