"""Flags of on-policy distillation: the teachers, whom they teach, and how much each signal counts."""

from __future__ import annotations

import argparse
import math
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from megatron_vespo.system.http import is_http_url
from megatron_vespo.system.paths import path_word
from megatron_vespo.system.settings import Settings
from megatron_vespo.types import SamplingParams


@dataclass(frozen=True)
class Teacher:
    """Scores the responses to prompts of `source`, None: to all prompts. It has a checkpoint or a url."""

    source: str | None
    checkpoint: Path | None = None
    url: str | None = None

    @property
    def name(self) -> str:
        return "teacher" if self.source is None else f"teacher {self.source}"


def add_distillation_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "distillation",
        "--teacher-checkpoint [SOURCE=]DIR: a teacher scores the responses: see docs/guides/distillation.md",
    )
    add = group.add_argument
    add("--teacher-checkpoint", nargs="+", action="extend", type=sourced_path, metavar="[SOURCE=]DIR",
        help="HF folder of a teacher, for all prompts or for those of one source")  # fmt: skip
    add("--teacher-url", nargs="+", action="extend", metavar="[SOURCE=]URL",
        help="the same for a teacher that an SGLang server elsewhere runs")  # fmt: skip
    add("--teacher-key", default="data_source", metavar="COLUMN",
        help="column of the prompt file that names a prompt's source")  # fmt: skip
    add("--teacher-engines", type=int, default=1, metavar="N", help="SGLang engines per teacher checkpoint")
    add("--teacher-tp-size", type=int, metavar="N",
        help="GPUs per teacher engine; default: --sglang-tp-size")  # fmt: skip
    add("--distillation-coefficient", type=float, default=1.0, metavar="C",
        help="weight of log(teacher / sampler) in the advantage of each token")  # fmt: skip
    add("--distillation-clip", type=float, metavar="NATS",
        help="clip that log ratio to +-NATS per token; default: no clip")  # fmt: skip
    add("--reward-coefficient", type=float, default=1.0, metavar="C",
        help="weight of the rewards' advantage beside a teacher; 0: the teacher alone")  # fmt: skip


def sourced_path(text: str) -> str:
    """The argparse type of [SOURCE=]DIR, with the folder expanded."""
    source, folder = _parts(text)
    return path_word(folder) if source is None else f"{source}={path_word(folder)}"


def _parts(text: str) -> tuple[str | None, str]:
    """Source and value; a URL may have "=" behind "?", and a folder behind "/"."""
    head, equals, tail = text.partition("=")
    return (head, tail) if equals and "/" not in head else (None, text)


def teachers_of(checkpoints: Sequence[str] | None, urls: Sequence[str] | None) -> tuple[Teacher, ...]:
    """The teachers that the two flags name. ValueError for a wrong name, folder or URL."""
    found = [
        *(_teacher("--teacher-checkpoint", text) for text in checkpoints or ()),
        *(_teacher("--teacher-url", text) for text in urls or ()),
    ]
    sources = [teacher.source for teacher in found]
    for source in sources:
        if sources.count(source) > 1:
            whom = "all prompts" if source is None else f"source {source}"
            raise ValueError(f"--teacher-checkpoint and --teacher-url name two teachers of {whom}: keep one")
    if None in sources and len(found) > 1:
        other = next(source for source in sources if source is not None)
        raise ValueError(
            f"one teacher is of all prompts and one of source {other}: name the source of every teacher, "
            "SOURCE=..."
        )
    return tuple(found)


def _teacher(flag: str, text: str) -> Teacher:
    source, value = _parts(text)
    if not value or source == "":
        raise ValueError(f"{flag} {text!r}: must be [SOURCE=]{'URL' if flag.endswith('url') else 'DIR'}")
    if flag == "--teacher-url":
        if not is_http_url(value):
            raise ValueError(f"{flag} {value}: must be http://HOST:PORT")
        return Teacher(source, url=value.rstrip("/"))
    return Teacher(source, checkpoint=Path(value).resolve())  # workers have other working directories


def check_distillation(args: Namespace) -> None:
    """All checks that need no model."""
    teachers = teachers_of(args.teacher_checkpoint, args.teacher_url)
    if not teachers:
        _refuse_without_teacher(args)
        return
    for teacher in () if args.train_from else teachers:  # recorded batches have the scores
        if teacher.checkpoint is not None and not (teacher.checkpoint / "config.json").is_file():
            raise ValueError(f"--teacher-checkpoint {teacher.checkpoint}: not an HF folder, no config.json")
    _refuse_without_effect(args, teachers)
    for name in ("distillation_coefficient", "reward_coefficient"):
        value = getattr(args, name)
        if not 0 <= value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} is {value:g}, must be 0 or more, and finite")
    if args.distillation_coefficient == 0:
        raise ValueError("--distillation-coefficient is 0: leave the teacher out")
    if args.rollout_temperature != 1.0:
        raise ValueError(
            f"--rollout-temperature {args.rollout_temperature:g} with a teacher: SGLang scores given "
            "tokens at temperature 1, so the responses must be drawn at 1 too: leave it out"
        )
    for name in ("top_p", "top_k", "min_p"):
        value = getattr(args, f"rollout_{name}")
        if value != getattr(SamplingParams, name):  # the default leaves out no token
            raise ValueError(
                f"--rollout-{name.replace('_', '-')} {value:g} with a teacher: its log-probs are of the "
                "whole vocabulary, those of the responses would not be: leave it out"
            )
    if args.dynamic_sampling and args.reward_coefficient == 0:
        raise ValueError(
            "--dynamic-sampling chooses groups by their rewards, which --reward-coefficient 0 ignores: leave "
            "it out"
        )
    if args.kl_coef is not None and args.reward_coefficient == 0:
        raise ValueError(
            f"--kl-coef {args.kl_coef:g} changes the rewards, which --reward-coefficient 0 ignores: use "
            "--kl-loss-coef, or leave it out"
        )
    if args.overlong_buffer and args.reward_coefficient == 0:
        raise ValueError(
            f"--overlong-buffer {args.overlong_buffer} changes the rewards, which --reward-coefficient 0 "
            "ignores: leave it out"
        )


def _given(args: Namespace) -> dict[str, str]:
    """The flags that do not have their default, like {"teacher_engines": "--teacher-engines 2"}."""
    parser = argparse.ArgumentParser(add_help=False)
    add_distillation_arguments(parser)
    found = {}
    for action in parser._actions:
        value = getattr(args, action.dest)
        if value != action.default:
            shown = f"{value:g}" if isinstance(value, float) else value
            found[action.dest] = f"{action.option_strings[0]} {shown}"
    return found


def _refuse_without_teacher(args: Namespace) -> None:
    for flag in _given(args).values():
        raise ValueError(f"{flag} has no effect without a teacher: leave it out, or add --teacher-checkpoint")


def _refuse_without_effect(args: Namespace, teachers: Sequence[Teacher]) -> None:
    """ValueError for flags of other kinds of teachers than the run has."""
    given = _given(args)
    of_engines = [given[name] for name in ("teacher_engines", "teacher_tp_size") if name in given]
    if of_engines and all(teacher.checkpoint is None for teacher in teachers):
        raise ValueError(
            f"{of_engines[0]} has no effect without --teacher-checkpoint: the teachers of --teacher-url run "
            "elsewhere; leave it out"
        )
    if "teacher_key" in given and teachers[0].source is None:
        raise ValueError(
            f"{given['teacher_key']} has no effect: one teacher scores all prompts; leave it out, or name "
            "the sources, SOURCE=..."
        )


@dataclass(frozen=True)
class DistillationSettings(Settings):
    """Without teachers, the other fields have no effect."""

    teachers: tuple[Teacher, ...]
    teacher_key: str
    teacher_engines: int  # per teacher with a checkpoint
    teacher_tp_size: int | None  # GPUs per engine; None: as the rollout engines
    distillation_coefficient: float
    distillation_clip: float | None  # nats
    reward_coefficient: float

    @classmethod
    def of(cls, args: Any, **others: Any) -> Self:
        teachers = teachers_of(args.teacher_checkpoint, args.teacher_url)
        return super().of(args, teachers=teachers, **others)

    @property
    def served(self) -> tuple[Teacher, ...]:
        """The teachers whose engines the run starts."""
        return tuple(teacher for teacher in self.teachers if teacher.checkpoint is not None)

    @property
    def num_engines(self) -> int:
        return len(self.served) * self.teacher_engines

    def engine_size(self, rollout_engine_size: int) -> int:
        """GPUs per teacher engine."""
        return self.teacher_tp_size or rollout_engine_size
