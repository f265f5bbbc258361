"""Ray, engines and rewards: they live as long as the run, also when its trainer is restarted."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from megatron_vespo.arguments.resume import resumed_folder
from megatron_vespo.arguments.time_limits import longest_engine_step_s
from megatron_vespo.checkpoints.prompt_record import PromptRecord, read_record
from megatron_vespo.checkpoints.sources import check_served
from megatron_vespo.cluster.start import start_fleet
from megatron_vespo.data.prompts import PromptSet
from megatron_vespo.data.stop_tokens import stop_token_ids
from megatron_vespo.data.tokenizer import load_tokenizer
from megatron_vespo.driver.debug_modes import NullEngineSync
from megatron_vespo.driver.prompt_data import chat_format, eval_data, prompt_data
from megatron_vespo.observability.progress import RunDisplay
from megatron_vespo.observability.tracing import Trace
from megatron_vespo.rewards.pool import RewardPool, load_reward_function
from megatron_vespo.rollout.generate_function import GenerateFunction, load_generate_function
from megatron_vespo.rollout.scoring import Scorer
from megatron_vespo.rollout.server_arguments import server_arguments
from megatron_vespo.system.hardware import runs_on_gpus
from megatron_vespo.system.preemption import Preemption
from megatron_vespo.types import Prompt, SamplingParams


@dataclass(frozen=True)
class Task:
    """What is generated and how it is judged; empty for a run that does not generate."""

    tokenizer: Any = None
    sampling: SamplingParams | None = None
    prompts: PromptSet | None = None
    eval_prompts: list[Prompt] = field(default_factory=list)
    reward: Callable[..., float] | None = None
    generate: GenerateFunction | None = None  # None: one request is one completion
    record: bytes | None = None  # which prompts these are, for checkpoints
    remarks: list[str] = field(default_factory=list)  # what people should know of the data


def load_task(args: Namespace) -> Task:
    if args.train_from:
        return Task()
    check_served(args.hf_checkpoint)
    folder = None if args.rollout_only else resumed_folder(args)
    saved = folder and read_record(folder)
    date = saved.date if saved else datetime.now().replace(microsecond=0)
    tokenizer = load_tokenizer(args.hf_checkpoint, "--hf-checkpoint")
    form = chat_format(args, tokenizer, date)
    prompts = prompt_data(args, args.prompt_data, form, overlong=args.overlong_prompts, flag="--prompt-data")
    sets = [prompts, *([eval_data(args, form)] if args.eval_data else [])]
    remarks = []
    for loaded in sets:
        _check_vocabulary(args, loaded)
        remarks += loaded.remarks(args.max_prompt_tokens)
    eval_prompts = [prompt for loaded in sets[1:] for prompt in loaded.prompts[: args.eval_prompts]]
    record = PromptRecord.of(prompts.prompts, args.seed, date, eval_prompts)
    if saved:
        remarks += saved.check_same(record, folder, args.prompt_data)
    elif folder:
        remarks.append(f"{folder} does not say which prompts its run has: they are not compared")
    stops = stop_token_ids(args.hf_checkpoint, tokenizer.eos_token_id)
    sampling = SamplingParams(args.rollout_temperature, args.max_completion_tokens, stops)
    reward = load_reward_function(args.reward_function)
    generate = load_generate_function(args.generate_function) if args.generate_function else None
    return Task(tokenizer, sampling, prompts, eval_prompts, reward, generate, record.encode(), remarks)


def _check_vocabulary(args: Namespace, loaded: PromptSet) -> None:
    largest = max(max(prompt.token_ids) for prompt in loaded.prompts)
    if largest >= args.vocab_size:  # SGLang's scheduler would die of it
        raise ValueError(
            f"--hf-checkpoint {args.hf_checkpoint}: its tokenizer makes token id {largest} of {loaded.path}, "
            f"but the model's vocabulary has {args.vocab_size} entries"
        )


class Services:
    """Starts Ray, engines and rewards; engines go on starting in the background. `stack` ends everything."""

    def __init__(
        self,
        args: Namespace,
        task: Task,
        display: RunDisplay,
        trace: Trace,
        preemption: Preemption,
        stack: ExitStack,
    ):
        self.task, self.display, self.trace, self.preemption = task, display, trace, preemption
        self.log_dir = (args.output_dir / "logs").resolve()
        self.scorer: Scorer | None = None
        if task.reward is not None:
            limits = args.reward_workers, args.reward_timeout, args.reward_memory_gb
            rewards = RewardPool(task.reward, *limits)
            stack.callback(rewards.close)
            lengths = args.max_completion_tokens, args.overlong_buffer, args.overlong_penalty
            self.scorer = Scorer(task.tokenizer, rewards, *lengths)
        with display.phase("start Ray"):
            started = start_fleet(
                args,
                _server_arguments(args),
                on_gpus=runs_on_gpus(args),
                key_choice=args.engine_api_key,
                log_dir=self.log_dir,
                log=display.message,
                stack=stack,
                trace=trace.phase if args.colocate else None,
            )
        self.placement, self.api_key = started.placement, started.api_key
        self.engines = started.engines
        self.engine_sync = NullEngineSync() if args.train_from else started.sync
        self.gpu_sharing = started.gpu_sharing
        self.generates = args.rollout_engines > 0

    def wait_for_engines(self) -> None:
        """Until they have started, once."""
        if self.generates:
            with self.display.phase("start SGLang"):
                self.engines.wait_until_ready()


def _server_arguments(args: Namespace) -> list[str]:
    device = "cuda" if runs_on_gpus(args) else "cpu"
    return server_arguments(
        args.sglang_flags,
        device=device,
        routes=args.routing_replay == "R3",
        dtype="bfloat16" if args.bf16 else "float32",
        seed=args.seed,
        longest_step_s=longest_engine_step_s(args.engine_start_timeout, args.weight_check_timeout),
        # prefixes in the cache would be older than the request that meets them knows
        prefix_cache=not (args.max_staleness and args.on_weight_update == "in-place"),
        memory_saver=args.colocate and device == "cuda",
    )
