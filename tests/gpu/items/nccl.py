"""NCCL on one GPU: what a communicator costs, with and without cuMem, and that two ranks are refused."""

from __future__ import annotations

import os
from pathlib import Path

from tests.gpu.items.context import Context, Figures
from tests.support.launch import launch

PROGRAM = Path(__file__).parents[1] / "programs/nccl_rank.py"
TIMEOUT_S = 40


def one_rank(context: Context) -> Figures:
    figures: Figures = {}
    for cumem in ("0", "1"):
        os.environ["NCCL_CUMEM_ENABLE"] = cumem
        [result] = launch(PROGRAM, 1, [], TIMEOUT_S, context.folder / f"nccl-{cumem}", preloaded=False)
        assert result["right"], "the sum of one rank is not what it was"
        measured = {key: value.item() for key, value in result.items() if key != "right"}
        figures |= {f"NCCL_CUMEM_ENABLE={cumem}: {key}": value for key, value in measured.items()}
    return figures


def two_ranks(context: Context) -> Figures:
    """Why colocated weights do not travel by NCCL; the message is what a user would see. A figure only."""
    os.environ["NCCL_DEBUG"] = "WARN"
    try:
        launch(PROGRAM, 2, [], TIMEOUT_S, context.folder / "nccl-two", preloaded=False)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        found = [line for line in lines if "NCCL" in line or "Duplicate" in line]
        return {"refused": bool(found), "message": " | ".join(found[:6])[:1000] or lines[-1]}
    return {"refused": False, "message": ""}
