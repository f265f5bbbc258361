"""Word problems of the MAWPS collection, and the reward: the value of the calculation that the model writes.

    python word_problems.py --source FILE --output DIR [--seed 0]

FILE has a line {"input": problem, "target": number} for each problem, see README.md. Writes DIR/train.jsonl
and DIR/heldout.jsonl. No story is in both, whatever its spelling and its numbers.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import re
from fractions import Fraction
from pathlib import Path

NUM_HELD_OUT = 160
NUMBER = re.compile(r"\d+(?:\.\d+)?")
_CALCULATION = re.compile(r"[\d.+\-*/() ]{1,60}")


def value(calculation: str) -> Fraction | None:
    """The exact value of numbers, + - * / and brackets; None if it is anything else, or divides by 0."""
    if not _CALCULATION.fullmatch(calculation):
        return None
    try:
        return _evaluate(ast.parse(calculation.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None


def _evaluate(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant():
            return Fraction(str(node.value))
        case ast.UnaryOp(op=ast.USub()):
            return -_evaluate(node.operand)
        case ast.BinOp(op=ast.Add()):
            return _evaluate(node.left) + _evaluate(node.right)
        case ast.BinOp(op=ast.Sub()):
            return _evaluate(node.left) - _evaluate(node.right)
        case ast.BinOp(op=ast.Mult()):
            return _evaluate(node.left) * _evaluate(node.right)
        case ast.BinOp(op=ast.Div()):
            return _evaluate(node.left) / _evaluate(node.right)
    raise ValueError(f"{type(node).__name__} is no arithmetic")


def reward(response: str, answer: str, metadata: dict) -> float:
    """1 if the response is a calculation whose value is the answer, to five digits; else 0."""
    found, wanted = value(response), Fraction(answer)
    return float(found is not None and abs(found - wanted) <= abs(wanted) / 10**5)


def spelling(problem: str) -> str:
    """A problem's words. Numbers are left out: the same story with other numbers is no other problem."""
    return " ".join(re.findall(r"[a-z]+", problem.lower()))


def read_problems(path: Path) -> list[dict]:
    """Rows {question, answer} of a file, every story once."""
    rows = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        problem = " ".join(row["input"].split())
        answer = str(Fraction(str(row["target"])))
        rows.setdefault(spelling(problem), {"question": problem, "answer": answer})
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not args.source.is_file():
        raise SystemExit(f"word_problems.py: there is no {args.source}; see README.md for it")
    rows = read_problems(args.source)
    random.Random(args.seed).shuffle(rows)
    args.output.mkdir(parents=True, exist_ok=True)
    for name, part in {"heldout": rows[:NUM_HELD_OUT], "train": rows[NUM_HELD_OUT:]}.items():
        text = "".join(json.dumps(row) + "\n" for row in part)
        (args.output / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{args.output}/{name}.jsonl: {len(part)} problems")


if __name__ == "__main__":
    main()
