"""Public prompt sets: where they are on the Hugging Face hub and what their rows look like.

Columns may be dotted paths. Copies of a set name columns differently: the first one that a row has is used.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KnownSet:
    """`files` is a pattern of paths in the repository, for one split: "train" or "test"."""

    repo: str
    split: str
    files: str
    question: tuple[str, ...] = ()  # text or chat messages, of which the user's last one is taken
    answer: tuple[str, ...] = ()
    identity: tuple[str, ...] = ()  # the row's own id; (): its number
    question_pattern: str | None = None  # its group 1 is the problem without the set's instructions
    answer_pattern: str | None = None  # its group 1 is the answer inside the cell
    num_problems: int | None = None  # distinct problems, if well known
    code_format: str | None = None  # of a code set, in rewards/code_formats.py: the answer is the tests
    only: tuple[str, str] | None = None  # column and value of the rows that belong to the set


# the set has every problem a hundred times, between two sentences about how to answer
_DAPO_PROBLEM = (
    r"(?s)\A(?:Solve the following math problem step by step\. .*?\n\n)?(.+?)"
    r"(?:\n\nRemember to put your answer on its own line after \"Answer:\"\.)?\s*\Z"
)
_PROBLEM = ("problem", "question", "Problem", "Question")
_ANSWER = ("answer", "Answer")

KNOWN_SETS = {
    "dapo-math-17k": KnownSet(
        "BytedTsinghua-SIA/DAPO-Math-17k",
        "train",
        "data/dapo-math-17k.parquet",
        ("prompt",),
        ("reward_model.ground_truth",),
        ("extra_info.index",),
        question_pattern=_DAPO_PROBLEM,
    ),
    "deepscaler": KnownSet(
        "agentica-org/DeepScaleR-Preview-Dataset", "train", "deepscaler.json", _PROBLEM, _ANSWER
    ),
    "aime24": KnownSet(
        "HuggingFaceH4/aime_2024", "train", "data/train*", _PROBLEM, _ANSWER, ("id", "ID"), num_problems=30
    ),
    "aime25": KnownSet("math-ai/aime25", "test", "*test*", _PROBLEM, _ANSWER, ("id",), num_problems=30),
    "amc23": KnownSet("math-ai/amc23", "test", "*test*", _PROBLEM, _ANSWER, ("id",), num_problems=40),
    "math-500": KnownSet(
        "HuggingFaceH4/MATH-500", "test", "test.jsonl", _PROBLEM, _ANSWER, ("unique_id",), num_problems=500
    ),
    "gsm8k": KnownSet(
        "openai/gsm8k", "train", "main/train*", _PROBLEM, _ANSWER, answer_pattern=r"####\s*(.+)"
    ),
    "gsm8k-test": KnownSet(
        "openai/gsm8k", "test", "main/test*", _PROBLEM, _ANSWER, answer_pattern=r"####\s*(.+)",
        num_problems=1319,
    ),
    "humaneval-plus": KnownSet(
        "evalplus/humanevalplus", "test", "*test*", identity=("task_id",), num_problems=164,
        code_format="humaneval",
    ),
    "mbpp-plus": KnownSet(
        "evalplus/mbppplus", "test", "*test*", identity=("task_id",), num_problems=378, code_format="mbpp"
    ),
    "livecodebench-v6": KnownSet(
        "livecodebench/code_generation_lite", "test", "test6.jsonl", identity=("question_id",),
        num_problems=175, code_format="livecodebench",
    ),
    "eurus-2-code": KnownSet(
        "PRIME-RL/Eurus-2-RL-Data", "train", "*train*", identity=("extra_info.index",),
        code_format="eurus", only=("ability", "code"),
    ),
}  # fmt: skip
