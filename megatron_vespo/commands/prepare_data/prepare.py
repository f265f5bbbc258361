"""Converts rows of a public set to question, answer, source: every problem once, no held-out ones."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_vespo.commands.prepare_data.known_sets import KnownSet
from megatron_vespo.commands.prepare_data.same_question import HeldOut, normalised
from megatron_vespo.data.rows import Absent, answer_text, lookup, messages_of, user_text
from megatron_vespo.rewards.code_formats import CODE_FORMATS
from megatron_vespo.rewards.code_tests import parse_tests

# pairs of answers that are written differently -> for each, whether they mean the same
SameAnswers = Callable[[Sequence[tuple[str, str]]], list[bool]]


@dataclass
class Counts:
    """Counts of the rows read, by their fate."""

    read: int = 0
    unusable: int = 0
    repeated: int = 0  # question and answer are identical to an earlier row's
    respelled: int = 0  # the question is an earlier one, written differently
    contradicting: int = 0  # the same question with different answers: all such rows
    same_as_held_out: int = 0
    near_held_out: int = 0
    written: int = 0
    first_unusable: str = ""  # where, and why
    near_examples: list[tuple[str, str]] = field(default_factory=list)  # (ours, the held-out one)


@dataclass(frozen=True)
class Problem:
    question: str
    answer: str
    source: str


def prepare(
    rows: Iterable[tuple[str, dict]],
    name: str,
    known: KnownSet,
    held_out: HeldOut,
    same_answers: SameAnswers,
) -> tuple[list[Problem], Counts]:
    """`rows` are (where, row). Keeps the order, and the first of equal problems."""
    counts = Counts()
    groups: dict[str, list[Problem]] = {}
    seen: set[tuple[str, str]] = set()
    for where, row in rows:
        if known.only is not None and _cell(row, known.only[0]) != known.only[1]:
            continue
        number, counts.read = counts.read, counts.read + 1
        try:
            problem = _problem(row, where, name, known, number)
        except ValueError as error:
            counts.unusable += 1
            counts.first_unusable = counts.first_unusable or str(error)
            continue
        if (problem.question, problem.answer) in seen:
            counts.repeated += 1
            continue
        seen.add((problem.question, problem.answer))
        groups.setdefault(normalised(problem.question), []).append(problem)
    problems = _once_each(list(groups.values()), same_answers, counts)
    kept = [problem for problem in problems if not _is_held_out(problem, held_out, counts)]
    counts.written = len(kept)
    return kept, counts


def check_usable(counts: Counts, max_share: float, where: str) -> None:
    """ValueError if too many rows are unusable: the file is probably another set."""
    if counts.read == 0:
        raise ValueError(f"{where}: no rows there")
    if counts.unusable > max_share * counts.read:
        raise ValueError(
            f"{where}: {counts.unusable} of {counts.read} rows have no usable question or answer, more than "
            f"--max-unusable {max_share:g}; the first one: {counts.first_unusable}"
        )
    if counts.written == 0:
        raise ValueError(f"{where}: none of its {counts.read} rows is left")


def question_of(row: dict, columns: Sequence[str], where: str) -> str:
    """The text of the first of `columns` that the row has."""
    column, cell = _first(row, columns, where)
    return user_text(messages_of(cell, column, where)).strip()


def _problem(row: dict, where: str, name: str, known: KnownSet, number: int) -> Problem:
    identity = next(
        (_cell(row, column) for column in known.identity if _cell(row, column) is not None), number
    )
    code = known.code_format is not None
    question, answer = _code(row, where, known) if code else _question_and_answer(row, where, known)
    return Problem(question, answer, f"{name}/{identity}")


def _code(row: dict, where: str, known: KnownSet) -> tuple[str, str]:
    """The question and its tests as JSON."""
    layout = CODE_FORMATS[str(known.code_format)]
    try:
        question, answer = layout.question(row), json.dumps(layout.tests(row))
        parse_tests(answer)
    except KeyError as error:
        raise ValueError(f"{where}: no column or field {error}, it has {', '.join(row)}") from error
    except (ValueError, TypeError, AttributeError, IndexError, StopIteration) as error:
        raise ValueError(f"{where}: no usable tests: {error}") from error
    return question, answer


def _question_and_answer(row: dict, where: str, known: KnownSet) -> tuple[str, str]:
    question = question_of(row, known.question, where)
    if known.question_pattern is not None:
        question = _part(question, known.question_pattern, f"{where}: no problem")
    column, cell = _first(row, known.answer, where)
    answer = answer_text(cell, column, None, where)
    if known.answer_pattern is not None:
        answer = _part(answer, known.answer_pattern, f"{where}: no answer")
    return question, answer


def _part(text: str, pattern: str, missing: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"{missing} in {text[-60:]!r}")
    return match.group(1).strip()


def _first(row: dict, columns: Sequence[str], where: str) -> tuple[str, Any]:
    for column in columns:
        if (cell := _cell(row, column)) is not None:
            return column, cell
    raise ValueError(f"{where}: none of the columns {', '.join(columns)} there, it has {', '.join(row)}")


def _cell(row: dict, column: str) -> Any:
    try:
        return lookup(row, column, "column", "")
    except Absent:
        return None


def _once_each(groups: list[list[Problem]], same_answers: SameAnswers, counts: Counts) -> list[Problem]:
    """One problem per group of the same question; none if its answers differ."""
    doubtful = {
        (group[0].answer, other.answer)
        for group in groups
        for other in group[1:]
        if other.answer != group[0].answer
    }
    pairs = sorted(doubtful)
    equal = dict(zip(pairs, same_answers(pairs) if pairs else [], strict=True))
    problems = []
    for first, *others in groups:
        if all(other.answer == first.answer or equal[first.answer, other.answer] for other in others):
            problems.append(first)
            counts.respelled += len(others)
        else:
            counts.contradicting += 1 + len(others)
    return problems


def _is_held_out(problem: Problem, held_out: HeldOut, counts: Counts) -> bool:
    if held_out.same(problem.question) is not None:
        counts.same_as_held_out += 1
        return True
    near = held_out.near(problem.question)
    if near is not None:
        counts.near_held_out += 1
        counts.near_examples.append((problem.question, near))
    return near is not None
