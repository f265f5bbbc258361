"""`megatron-vespo evaluate`: measures avg@k and pass@k of a checkpoint; a stopped job can be resumed."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

from megatron_vespo.arguments.checks import check_folder
from megatron_vespo.arguments.code_rewards import CodeRewardSettings
from megatron_vespo.arguments.data import PromptSettings
from megatron_vespo.arguments.environment import EnvironmentSettings
from megatron_vespo.commands.evaluate.flags import make_parser, parse_args
from megatron_vespo.commands.evaluate.options import EvaluateOptions
from megatron_vespo.commands.evaluate.report import (
    Progress,
    format_table,
    prompt_set_summary,
    reservations,
)
from megatron_vespo.commands.evaluate.result_file import ResultFile
from megatron_vespo.commands.evaluate.serving import Serving, serving
from megatron_vespo.commands.evaluate.settings import (
    comparable,
    evaluation_settings,
    start_date,
    tokenizer_folder,
)
from megatron_vespo.data.response_records import response_records
from megatron_vespo.data.stop_tokens import stop_token_ids
from megatron_vespo.data.tokenizer import ChatFormat, load_tokenizer
from megatron_vespo.driver.prompt_data import chat_format, prompt_data
from megatron_vespo.driver.responses import make_maker, with_tools
from megatron_vespo.driver.run_record import RunRecord, describe_run
from megatron_vespo.observability.report import write_summary
from megatron_vespo.rewards.loading import load_rewards, reward_remarks
from megatron_vespo.rewards.pool import RewardPool
from megatron_vespo.rewards.worker import RewardFunction
from megatron_vespo.rollout.collector import Collector
from megatron_vespo.rollout.evaluation_stream import stream_groups
from megatron_vespo.rollout.sampler import Maker
from megatron_vespo.rollout.scoring import Scorer, check_some_worked, describe_failures, reward_statuses
from megatron_vespo.system.preemption import EXIT_RESUME, EndedBySignal, Preempted, Preemption
from megatron_vespo.types import Completion, Prompt, SamplingParams

RESULTS_NAME, SUMMARY_NAME = "prompts.jsonl", "summary.json"
INTERVALS = "intervals: 95%, over prompts"


def main(argv: list[str]) -> int:
    started = time.monotonic()
    options = parse_args(argv)
    preemption = Preemption()
    preemption.listen()
    check_folder("--output-dir", options.output_dir, writable=True)
    folder = tokenizer_folder(options)
    tokenizer = load_tokenizer(folder, "--checkpoint")
    stops = stop_token_ids(folder, tokenizer.eos_token_id)
    sampling = SamplingParams(
        options.temperature, options.max_completion_tokens, stops, options.top_p, options.top_k
    )
    results_path = options.output_dir / RESULTS_NAME
    date = start_date(results_path)
    responses = EnvironmentSettings.of(options)
    form = with_tools(chat_format(PromptSettings.of(options), tokenizer, date), responses)
    maker = make_maker(responses, form, tokenizer, folder)
    sets = {name: _prompts(options, path, form) for name, path in options.data.items()}
    reward = load_rewards(options.reward_function, CodeRewardSettings.of(options).function())
    for remark in reward_remarks(reward):
        print(remark, file=sys.stderr)
    settings = comparable(evaluation_settings(options, stops, sets, date), results_path)
    with ResultFile(results_path, settings) as results:
        evaluation = _Evaluation(options, sets, results, tokenizer)
        if evaluation.left:
            RunRecord(options.output_dir, describe_run(vars(options), make_parser()))
            evaluation.run(sampling, reward, maker, preemption)
        _report(options, evaluation, settings, time.monotonic() - started)
    return 0


def _prompts(options: EvaluateOptions, path: Path, form: ChatFormat) -> list[Prompt]:
    # without its longest prompts it would be another set
    loaded = prompt_data(PromptSettings.of(options), path, form, overlong="error", flag="--data")
    for remark in loaded.remarks(options.max_prompt_tokens):
        print(remark, file=sys.stderr)
    return loaded.prompts[: options.num_prompts]


class _Evaluation:
    """Keeps which prompts are left, and records every finished prompt."""

    def __init__(
        self, options: EvaluateOptions, sets: dict[str, list[Prompt]], results: ResultFile, tokenizer: Any
    ):
        self._options, self._results, self._tokenizer = options, results, tokenizer
        self._total = sum(map(len, sets.values()))
        done = {(record["set"], record["prompt"]) for record in results.records}
        self.left = [
            (name, prompt)
            for name, prompts in sets.items()
            for prompt in prompts
            if (name, prompt.prompt_id) not in done
        ]

    def run(
        self,
        sampling: SamplingParams,
        reward: RewardFunction | None,
        maker: Maker | None,
        preemption: Preemption,
    ) -> None:
        """Runs until no prompt is left. Everything that it starts ends with it, whatever happens."""
        with ExitStack() as stack:
            try:
                self._run(sampling, reward, maker, stack)
            except EndedBySignal:
                preemption.conclude(EXIT_RESUME)  # before the stack ends everything, which takes seconds
                raise Preempted(f"ended by {preemption.signal}: {self._kept()}") from None
            except KeyboardInterrupt:
                raise KeyboardInterrupt(f"interrupted: {self._kept()}") from None

    def _run(
        self, sampling: SamplingParams, reward: RewardFunction | None, maker: Maker | None, stack: ExitStack
    ) -> None:
        options = self._options
        progress = Progress(self._total, self._total - len(self.left))
        stack.callback(progress.close)
        if progress.done:
            progress.message(f"{progress.done} of {self._total} prompts were finished before")
        scorer = self._scorer(reward, stack)
        served = stack.enter_context(serving(options, progress.message))

        statuses: list[str] = []
        held: list[dict[str, Any]] = []  # until one reward has worked: zeros of failed rewards are no results

        def keep() -> None:
            while held:
                self._results.append(held.pop(0))

        def finish(index: int, group: list[Completion]) -> None:
            if failures := scorer.score(group):
                progress.message(describe_failures(failures))
            held.append(self._record(*self.left[index], group))
            progress.finished([cast(float, completion.reward) for completion in group])
            statuses.extend(reward_statuses(group))
            if "ok" in statuses:
                keep()

        prompts = [prompt for _, prompt in self.left]
        progress.start()
        stream_groups(
            _collector(options, served, maker), prompts, sampling, finish,
            num_completions=options.num_completions, seed=options.seed,
        )  # fmt: skip
        check_some_worked(statuses)
        keep()  # if all responses were truncated, no reward function has judged any

    def _scorer(self, reward: RewardFunction | None, stack: ExitStack) -> Scorer:
        options, pool = self._options, None
        if reward is not None:
            limits = options.reward_timeout, options.reward_memory_gb
            pool = RewardPool(reward, options.reward_workers, *limits)
            stack.callback(pool.close)
        lengths = options.max_completion_tokens, 0, 1.0
        return Scorer(self._tokenizer, pool, *lengths, options.turn_rewards)

    def by_set(self) -> dict[str, list[dict]]:
        return {
            name: [record for record in self._results.records if record["set"] == name]
            for name in self._options.data
        }

    def _kept(self) -> str:
        number = len(self._results.records)
        return f"{number} of {self._total} prompts are finished and kept: the same command goes on"

    def _record(self, name: str, prompt: Prompt, group: Sequence[Completion]) -> dict[str, Any]:
        versions = [version for completion in group for version in completion.policy_versions.versions]
        record = {
            "set": name,
            "prompt": prompt.prompt_id,
            "rewards": [completion.reward for completion in group],
            "lengths": [completion.num_sampled for completion in group],
            "finish_reasons": [completion.finish_reason for completion in group],
            "statuses": [completion.reward_status for completion in group],
            "policy_versions": [min(versions), max(versions)],
            "drawn_anew": sum(len(completion.rejections) for completion in group),
        }
        if self._options.save_responses:
            record["responses"] = self._responses(group)
        return record

    def _responses(self, group: Sequence[Completion]) -> list[str] | list[dict[str, Any]]:
        """Return text, or where a response may have turns, records."""
        if self._options.environment or self._options.generate_function:
            return response_records(self._tokenizer, group)
        tokens = [completion.token_ids for completion in group]
        return self._tokenizer.batch_decode(tokens, skip_special_tokens=True)


def _collector(options: EvaluateOptions, served: Serving, maker: Maker | None) -> Collector:
    return Collector(
        served.urls,
        request_timeout_s=options.generate_timeout,
        max_attempts=1 + options.max_request_retries,
        check=served.check,
        api_key=served.api_key,
        lost=served.lost,
        on_wait=served.on_wait,
        remote=served.remote,
        maker=maker,
    )


def _report(
    options: EvaluateOptions, evaluation: _Evaluation, settings: dict[str, Any], seconds: float
) -> None:
    found = {
        name: prompt_set_summary(records, options.pass_reward)
        for name, records in evaluation.by_set().items()
    }
    path = options.output_dir / SUMMARY_NAME
    write_summary(path, {"settings": settings, "sets": found, "seconds": seconds})
    print(format_table(found))
    print("\n".join([INTERVALS, *reservations(found), f"summary: {path}"]))
