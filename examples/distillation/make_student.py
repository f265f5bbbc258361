"""Make the student of the distillation example: the tiny example's model after fewer supervised steps.

    PYTHONPATH=examples/tiny python make_student.py --output DIR [--seed 1]

writes DIR/base, DIR/train.jsonl and DIR/heldout.jsonl like make_base_model.py. Other weights, another order
of the demonstrations, and 150 steps instead of 250: its worked answers are often wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

import make_base_model as tiny


@dataclass(frozen=True)
class Recipe(tiny.Recipe):
    seed: int = 1
    steps: int = 150


if __name__ == "__main__":
    tiny.main(__doc__ or "", Recipe)
