"""The teachers of a run: checks that they fit the student, and what starts and asks them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_vespo.arguments.distillation import DistillationSettings, Teacher
from megatron_vespo.arguments.engines import EngineSettings
from megatron_vespo.arguments.train_settings import TrainSettings
from megatron_vespo.cluster.engine_fleet import EngineFleet
from megatron_vespo.cluster.start import TeacherServers
from megatron_vespo.data.prompts import PromptSet
from megatron_vespo.data.tokenizer import load_tokenizer
from megatron_vespo.models.hf_config import read_unchecked
from megatron_vespo.rollout.router import LostRequests
from megatron_vespo.rollout.server_arguments import engine_size, flag_value
from megatron_vespo.rollout.teacher_flags import teacher_flags
from megatron_vespo.rollout.teachers import TeacherEngines, Teachers, prompt_without_teacher, source_of
from megatron_vespo.system.http import EngineRequestError, get_json

ANSWER_TIMEOUT_S = 30.0  # of a teacher elsewhere, when the run starts


def check_teachers(settings: TrainSettings, tokenizer: Any, prompts: PromptSet) -> list[str]:
    """ValueError unless every prompt has a teacher with the student's vocabulary; returns log lines."""
    distillation = settings.distillation
    if not distillation.teachers:
        return []
    _check_sources(distillation, prompts)
    vocabulary: Mapping[str, int] = tokenizer.get_vocab()
    remarks = []
    for teacher in distillation.teachers:
        folder = teacher.checkpoint or _served_tokenizer(teacher)
        if folder is None:
            remarks.append(
                f"--teacher-url {teacher.url}: its tokenizer is not on this machine and is not compared; it "
                "must be the student's"
            )
            continue
        flag = f"--teacher-{'url' if teacher.url else 'checkpoint'}"
        theirs = load_tokenizer(folder, flag).get_vocab()
        if problem := different_vocabulary(vocabulary, theirs):
            raise ValueError(f"{flag} {folder}: its tokenizer is not the student's: {problem}")
        flags = settings.engines.sglang_flags if teacher.url is None else ()  # not of engines elsewhere
        _check_sizes(settings, read_unchecked(folder), flags, f"{flag} {folder}")
    return remarks


def _check_sizes(
    settings: TrainSettings, config: Mapping[str, Any], sglang_flags: Sequence[str], where: str
) -> None:
    """ValueError if a teacher cannot read every token id, or the longest prompt and response."""
    size = config.get("vocab_size", settings.trainer.vocab_size)
    if size < settings.trainer.vocab_size:  # SGLang's scheduler would die of a larger token id
        raise ValueError(
            f"{where}: it has {size} token ids, the student --hf-checkpoint "
            f"{settings.engines.hf_checkpoint} has {settings.trainer.vocab_size}"
        )
    longest = settings.rollout.max_prompt_tokens + settings.rollout.max_completion_tokens
    given = flag_value(sglang_flags, "--context-length")
    context = int(given or config.get("max_position_embeddings") or longest + 1)
    if context <= longest:  # SGLang wants room for one token more
        raise ValueError(
            f"{where}: it reads at most {context - 1} tokens, --max-prompt-tokens and "
            f"--max-completion-tokens allow {longest}"
        )


def different_vocabulary(student: Mapping[str, int], teacher: Mapping[str, int]) -> str | None:
    """What a teacher's vocabulary lacks of the student's: it scores the student's ids; None: nothing."""
    for token, number in sorted(student.items(), key=lambda item: item[1]):
        other = teacher.get(token)
        if other != number:
            there = "does not exist there" if other is None else f"is {other} there"
            return f"token {token!r}, the student's {number}, {there}"
    return None


def _check_sources(settings: DistillationSettings, prompts: PromptSet) -> None:
    sources = [teacher.source for teacher in settings.teachers]
    prompt = prompt_without_teacher(prompts.prompts, sources, settings.teacher_key)
    if prompt is None:
        return
    source, key = source_of(prompt, settings.teacher_key), settings.teacher_key
    has = f"has no {key!r} (--teacher-key)" if source is None else f"is of {key} {source!r}"
    raise ValueError(
        f"{prompts.path}: prompt {prompt.prompt_id} {has}; the teachers are of {', '.join(map(str, sources))}"
    )


def _served_tokenizer(teacher: Teacher) -> Path | None:
    """The folder of a running teacher's tokenizer, if this machine has it. ValueError if none answers."""
    assert teacher.url is not None
    try:
        told = get_json(teacher.url, "/model_info", ANSWER_TIMEOUT_S)
    except EngineRequestError as error:
        raise ValueError(f"--teacher-url {teacher.url}: {error.reason}") from error
    path = told.get("tokenizer_path")
    return Path(path) if path and (Path(path) / "config.json").is_file() else None


def teacher_servers(
    settings: DistillationSettings,
    engines: EngineSettings,
    server_arguments: Callable[[Sequence[str]], list[str]],
) -> list[TeacherServers]:
    """What starts the teachers with a checkpoint; `server_arguments` completes an engine's flags."""
    size = settings.engine_size(engine_size(engines.sglang_flags))
    flags = tuple(teacher_flags(engines.sglang_flags, size))
    return [
        TeacherServers(
            teacher.name,
            replace(
                engines,
                hf_checkpoint=teacher.checkpoint,
                rollout_engines=settings.teacher_engines,
                min_engines=1,
                sglang_flags=flags,
            ),
            server_arguments(flags),
        )
        for teacher in settings.served
    ]


def teachers_of_run(
    settings: TrainSettings, fleets: Sequence[EngineFleet], api_key: str | None, lost: LostRequests
) -> Teachers:
    """The teachers; `fleets` are those of `settings.distillation.served`, `lost` counts for the others."""
    distillation, waiting = settings.distillation, iter(fleets)
    engines = []
    for teacher in distillation.teachers:
        if teacher.url is not None:
            engines.append(TeacherEngines(teacher.name, teacher.source, [teacher.url], lost))
            continue
        fleet = next(waiting)
        engines.append(
            TeacherEngines(teacher.name, teacher.source, fleet.urls, fleet.lost, fleet.check, api_key)
        )
    return Teachers(
        engines,
        distillation.teacher_key,
        timeout_s=settings.rollout.generate_timeout,
        max_attempts=1 + settings.rollout.max_request_retries,
    )
