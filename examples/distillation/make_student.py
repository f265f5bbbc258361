"""Make the students' start: the tiny example's model, but one that shows its work in 2 answers of 100.

    PYTHONPATH=examples/tiny python make_student.py --output DIR [--seed 0]

writes what make_base_model.py writes. Rewards alone teach such a model slowly: right answers, which
they could reinforce, are rare. More supervised steps make up for the seldom shown work.
"""

from __future__ import annotations

from dataclasses import dataclass

import make_base_model as tiny


@dataclass(frozen=True)
class Recipe(tiny.Recipe):
    steps: int = 350
    direct_share: float = 0.98


if __name__ == "__main__":
    tiny.main(__doc__ or "", Recipe)
