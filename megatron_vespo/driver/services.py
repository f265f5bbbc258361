"""Starts Ray, engines and rewards, which live as long as the run, also when its trainer is restarted."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Any

from megatron_vespo.arguments.resume import resumed_folder
from megatron_vespo.arguments.rollout import RolloutSettings
from megatron_vespo.arguments.time_limits import longest_engine_step_s
from megatron_vespo.arguments.train_settings import TrainSettings
from megatron_vespo.checkpoints.fp8_report import fp8_lines
from megatron_vespo.checkpoints.prompt_record import PromptRecord, read_record
from megatron_vespo.checkpoints.sources import check_served
from megatron_vespo.cluster.start import Sharing, TeacherServers, start_fleet
from megatron_vespo.data.prompts import PromptSet
from megatron_vespo.data.stop_tokens import stop_token_ids
from megatron_vespo.data.tokenizer import load_tokenizer
from megatron_vespo.driver.debug_modes import NullEngineSync
from megatron_vespo.driver.prompt_data import chat_format, eval_data, prompt_data
from megatron_vespo.driver.responses import make_maker, with_tools
from megatron_vespo.driver.teachers import check_teachers, teacher_servers, teachers_of_run
from megatron_vespo.driver.tracking import Tracking
from megatron_vespo.models.family import family_of, shape_of
from megatron_vespo.models.hf_config import read_hf_config
from megatron_vespo.observability.progress import RunDisplay
from megatron_vespo.observability.tracing import Trace
from megatron_vespo.rewards.loading import load_rewards, reward_remarks
from megatron_vespo.rewards.pool import RewardPool
from megatron_vespo.rewards.worker import RewardFunction
from megatron_vespo.rollout.fp8_engines import DTYPE, fp8_arguments
from megatron_vespo.rollout.router import LostRequests
from megatron_vespo.rollout.sampled_distribution import truncation_remarks
from megatron_vespo.rollout.sampler import Maker
from megatron_vespo.rollout.scoring import Scorer
from megatron_vespo.rollout.server_arguments import server_arguments
from megatron_vespo.rollout.teachers import Teachers
from megatron_vespo.system.hardware import runs_on_gpus
from megatron_vespo.system.preemption import Preemption
from megatron_vespo.types import Prompt, SamplingParams


@dataclass(frozen=True)
class Task:
    """What a run generates and how its completions are scored; empty with --train-from."""

    tokenizer: Any = None
    sampling: SamplingParams | None = None
    prompts: PromptSet | None = None
    eval_prompts: list[Prompt] = field(default_factory=list)
    reward: RewardFunction | None = None  # None: the environment gives the rewards
    maker: Maker | None = None  # None: one request gives one completion
    record: bytes | None = None  # identifies the prompts in checkpoints
    remarks: list[str] = field(default_factory=list)  # log lines about data and rewards


def load_task(settings: TrainSettings) -> Task:
    if settings.run.train_from:
        return Task()
    check_served(settings.engines.hf_checkpoint)
    folder = None if settings.run.rollout_only else resumed_folder(settings.save)
    saved = read_record(folder) if folder else None
    date = saved.date if saved else datetime.now().replace(microsecond=0)
    tokenizer = load_tokenizer(settings.engines.hf_checkpoint, "--hf-checkpoint")
    data = settings.data
    form = with_tools(chat_format(data, tokenizer, date), settings.responses)
    path, overlong = data.prompt_data, data.overlong_prompts
    assert path is not None, "required, but for --train-from"
    prompts = prompt_data(data, path, form, overlong=overlong, flag="--prompt-data")
    sets = [prompts, *([eval_data(data, settings.eval, form)] if settings.eval.data else [])]
    remarks = []
    for loaded in sets:
        _check_vocabulary(settings, loaded)
        remarks += loaded.remarks(settings.rollout.max_prompt_tokens)
    remarks += check_teachers(settings, tokenizer, prompts)
    eval_prompts = [prompt for loaded in sets[1:] for prompt in loaded.prompts[: settings.eval.prompts]]
    record = PromptRecord.of(prompts.prompts, settings.rollout.seed, date, eval_prompts)
    if folder and saved:
        remarks += saved.check_same(record, folder, path)
    elif folder:
        remarks.append(f"{folder} does not say which prompts its run has: they are not compared")
    stops = stop_token_ids(settings.engines.hf_checkpoint, tokenizer.eos_token_id)
    sampling = settings.rollout.sampling(stops, settings.engines.sglang_flags)
    remarks += truncation_remarks(sampling, settings.engines.sglang_flags)
    reward = load_rewards(settings.rewards.reward_function, settings.code_rewards.function())
    remarks += reward_remarks(reward)
    maker = make_maker(settings.responses, form, tokenizer, settings.engines.hf_checkpoint)
    return Task(tokenizer, sampling, prompts, eval_prompts, reward, maker, record.encode(), remarks)


def _check_vocabulary(settings: TrainSettings, loaded: PromptSet) -> None:
    largest = max(int(prompt.token_ids.max()) for prompt in loaded.prompts)
    if largest >= settings.trainer.vocab_size:  # SGLang's scheduler would die of it
        raise ValueError(
            f"--hf-checkpoint {settings.engines.hf_checkpoint}: its tokenizer makes token id {largest} of "
            f"{loaded.path}, but the model's vocabulary has {settings.trainer.vocab_size} entries"
        )


class Services:
    """Starts Ray, engines and rewards. Engines finish starting in the background. `stack` ends them all."""

    def __init__(
        self,
        settings: TrainSettings,
        task: Task,
        display: RunDisplay,
        trace: Trace,
        preemption: Preemption,
        stack: ExitStack,
        tracking: Tracking | None = None,
    ):
        self.tracking = tracking
        self.task, self.display, self.trace, self.preemption = task, display, trace, preemption
        self.log_dir = (settings.run.output_dir / "logs").resolve()
        self.scorer: Scorer | None = None
        if not settings.run.train_from:
            flags, rewards = settings.rewards, None
            if task.reward is not None:
                rewards = RewardPool(
                    task.reward, flags.reward_workers, flags.reward_timeout, flags.reward_memory_gb
                )
                stack.callback(rewards.close)
            lengths = flags.max_completion_tokens, flags.overlong_buffer, flags.overlong_penalty
            self.scorer = Scorer(task.tokenizer, rewards, *lengths, flags.turn_rewards)
        with display.phase("start Ray"):
            sharing = (
                Sharing(settings.sync.weight_sync_timeout, trace.phase) if settings.sync.colocate else None
            )
            generates = settings.engines.rollout_engines > 0
            started = start_fleet(
                settings.engines,
                _server_arguments(settings),
                on_gpus=runs_on_gpus(settings.trainer.distributed_backend),
                log_dir=self.log_dir,
                log=display.message,
                stack=stack,
                trainer=settings.trainer,
                sharing=sharing,
                teachers=_teacher_servers(settings) if generates else (),
            )
        if settings.engines.rollout_quantization is not None:
            for line in fp8_lines(_hf_tensors(settings)):
                display.message(line)
        self.placement, self.api_key = started.placement, started.api_key
        self.engines, self.replies = started.engines, started.replies
        self.engine_sync = NullEngineSync() if settings.run.train_from else started.sync
        self.gpu_sharing = started.gpu_sharing
        self.generates = generates
        self._teacher_fleets = started.teachers
        self.teachers: Teachers | None = None
        if generates and settings.distillation.teachers:
            lost = LostRequests(display.message)
            self.teachers = teachers_of_run(settings, started.teachers, started.api_key, lost)
        if tracking is not None:
            tracking.watch(lambda: display.current_phase, self.engines)

    def wait_for_engines(self) -> None:
        """Blocks until the engines have started."""
        if self.generates:
            with self.display.phase("start SGLang"):
                for fleet in (self.engines, *self._teacher_fleets):
                    fleet.wait_until_ready()


def _teacher_servers(settings: TrainSettings) -> list[TeacherServers]:
    return teacher_servers(settings.distillation, settings.engines, partial(_teacher_arguments, settings))


def _teacher_arguments(settings: TrainSettings, flags: Sequence[str]) -> list[str]:
    return server_arguments(
        flags,
        device=_device(settings),
        routes=False,
        dtype=_dtype(settings),
        seed=settings.rollout.seed,
        longest_step_s=settings.engines.engine_start_timeout,
    )


def _device(settings: TrainSettings) -> str:
    return "cuda" if runs_on_gpus(settings.trainer.distributed_backend) else "cpu"


def _dtype(settings: TrainSettings) -> str:
    return "bfloat16" if settings.trainer.bf16 else "float32"


def _server_arguments(settings: TrainSettings) -> list[str]:
    fp8 = settings.engines.rollout_quantization == "fp8"
    device = _device(settings)
    return server_arguments(
        settings.engines.sglang_flags,
        device=device,
        routes=settings.rollout.routing_replay == "R3",
        dtype=DTYPE if fp8 else _dtype(settings),
        seed=settings.rollout.seed,
        longest_step_s=longest_engine_step_s(
            settings.engines.engine_start_timeout, settings.sync.weight_check_timeout
        ),
        # a cached prefix could come from an older policy version than SGLang reports for the request
        prefix_cache=not (settings.rollout.max_staleness and settings.rollout.on_weight_update == "in-place"),
        memory_saver=settings.sync.colocate and device == "cuda",
        supports=RolloutSettings.sampling_of(settings.rollout).truncates,
        loading=fp8_arguments(_hf_tensors(settings)) if fp8 else (),
    )


def _hf_tensors(settings: TrainSettings) -> dict[str, tuple[int, ...]]:
    config = read_hf_config(settings.engines.hf_checkpoint)
    return family_of(config).hf_tensors(shape_of(config))
