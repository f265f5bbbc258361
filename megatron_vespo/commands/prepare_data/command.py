"""`megatron-vespo prepare-data`: turns a public prompt set into clean JSONL without held-out questions."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from megatron_vespo.arguments.checks import check_output_file
from megatron_vespo.arguments.parser import FlagParser
from megatron_vespo.commands.prepare_data.known_files import download, rows_of, source_files
from megatron_vespo.commands.prepare_data.known_sets import KNOWN_SETS
from megatron_vespo.commands.prepare_data.prepare import Counts, Problem, check_usable, prepare, question_of
from megatron_vespo.commands.prepare_data.same_question import HeldOut
from megatron_vespo.rewards.loading import load_reward_function
from megatron_vespo.rewards.pool import RewardItem, RewardPool
from megatron_vespo.system.disk import write_atomically
from megatron_vespo.system.paths import user_path
from megatron_vespo.system.settings import Settings

QUESTION_COLUMNS = ("question", "problem", "Problem", "Question", "prompt")  # of held-out files
SHOWN_EXAMPLES = 3
REWARD_TIMEOUT_S, REWARD_MEMORY_GB = 10.0, 4.0
_DESCRIPTION = """\
Writes OUT: a JSON line a problem, with question, answer and source, for --prompt-data and evaluate --data.

From the Hugging Face hub, or from a local copy. Problems that are there twice are written once, those of
--exclude not at all.
"""


@dataclass(frozen=True)
class PrepareOptions(Settings):
    name: str  # of the set
    out: Path
    source: Path | None  # None: the hub
    revision: str | None  # None: the newest
    exclude: tuple[Path, ...]  # held-out files
    instruction: str | None
    max_unusable: float  # share of the rows
    force: bool


def main(argv: list[str]) -> int:
    options = PrepareOptions.of(_parser().parse_args(argv))
    if options.name not in KNOWN_SETS:
        raise ValueError(f"no set {options.name!r}; there are {', '.join(KNOWN_SETS)}")
    if not 0 <= options.max_unusable <= 1:
        raise ValueError(f"--max-unusable {options.max_unusable:g}: must be between 0 and 1")
    if options.out.suffix != ".jsonl":
        raise ValueError(f"{options.out}: must end in .jsonl")
    if options.out.exists() and not options.force:
        raise ValueError(f"{options.out} is already there; --force replaces it")
    check_output_file("OUT", options.out)
    known = KNOWN_SETS[options.name]
    held_out = HeldOut(chain.from_iterable(_questions(path, options.instruction) for path in options.exclude))
    if options.source is not None and options.revision is not None:
        raise ValueError("--revision is of the hub, --source is not from there: leave one out")
    files = source_files(known, options.source or download(known, options.revision))
    rows = chain.from_iterable(rows_of(path) for path in files)
    same = _same_answers if known.code_format is None else _no_answer_contradicts
    problems, counts = prepare(rows, options.name, known, held_out, same)
    check_usable(counts, options.max_unusable, ", ".join(map(str, files)))
    write_atomically(options.out, "".join(_line(problem, options.instruction) for problem in problems))
    print("\n".join(_report(options, counts, len(held_out))))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = FlagParser(
        prog="megatron-vespo prepare-data",
        description=_DESCRIPTION,
    )
    add = parser.add_argument
    add("name", metavar="NAME", help=", ".join(KNOWN_SETS))
    add("out", type=user_path, metavar="OUT")
    add(
        "--source",
        type=user_path,
        metavar="PATH",
        help="a local file, or a folder with the repository's files",
    )
    add("--revision", metavar="COMMIT", help="of the repository on the hub; default: the newest")
    add("--exclude", type=user_path, nargs="+", default=[], metavar="FILE",
        help="held-out JSONL or parquet: their questions, and near ones, are left out")  # fmt: skip
    add("--instruction", metavar="TEXT",
        help=r"a line after every question: Put the answer in \boxed{}.")  # fmt: skip
    add("--max-unusable", type=float, default=0.01, metavar="SHARE",
        help="of rows without a question or an answer; more are an error (default: 0.01)")  # fmt: skip
    add("--force", action="store_true", help="replace OUT")
    return parser


def _questions(path: Path, instruction: str | None) -> Iterator[str]:
    if not path.is_file():
        raise ValueError(f"--exclude {path}: no such file")
    empty = True
    for where, row in rows_of(path):
        question = question_of(row, QUESTION_COLUMNS, where)
        empty = False
        yield question.removesuffix(_ending(instruction))  # the file may have been prepared in the same way
    if empty:
        raise ValueError(f"--exclude {path}: the file is empty")


def _ending(instruction: str | None) -> str:
    return f"\n{instruction}" if instruction else ""


def _line(problem: Problem, instruction: str | None) -> str:
    question = problem.question + _ending(instruction)
    row = {"question": question, "answer": problem.answer, "source": problem.source}
    return json.dumps(row) + "\n"  # ASCII, because U+2028 ends a line for some readers


def _no_answer_contradicts(pairs: Sequence[tuple[str, str]]) -> list[bool]:
    """Other tests of the same code problem may be right as well: the first ones are kept."""
    return [True] * len(pairs)


def _same_answers(pairs: Sequence[tuple[str, str]]) -> list[bool]:
    """Uses training's grader, in a process that can be killed."""
    pool = RewardPool(load_reward_function("math"), 1, REWARD_TIMEOUT_S, REWARD_MEMORY_GB)
    try:
        results = pool.score([RewardItem(f"\\boxed{{{b}}}", a, {}, ended=True) for a, b in pairs])
    finally:
        pool.close()
    return [result.value == 1.0 for result in results]


def _report(options: PrepareOptions, counts: Counts, num_held_out: int) -> list[str]:
    lines = [
        ("rows read", counts.read),
        ("without a usable question or answer", counts.unusable),
        ("repeated to the letter", counts.repeated),
        ("repeated in another spelling", counts.respelled),
        ("same question, different answers", counts.contradicting),
    ]
    if options.exclude:
        lines += [
            (f"same as one of {num_held_out} held-out questions", counts.same_as_held_out),
            ("nearly the same", counts.near_held_out),
        ]
    lines.append(("written", counts.written))
    report = [f"{label:45s}{number:10,d}" for label, number in lines]
    if counts.unusable:
        report.append(f"the first unusable row: {counts.first_unusable}")
    for ours, theirs in counts.near_examples[:SHOWN_EXAMPLES]:
        report.append(f"nearly the same: {_short(ours)} | held out: {_short(theirs)}")
    expected = KNOWN_SETS[options.name].num_problems
    if expected is not None and counts.written != expected and not options.exclude:
        report.append(f"WARNING: {options.name} is known to have {expected} problems")
    return [*report, f"{options.out}"]


def _short(text: str) -> str:
    plain = " ".join(text.split())
    return plain if len(plain) <= 80 else plain[:77] + "..."
