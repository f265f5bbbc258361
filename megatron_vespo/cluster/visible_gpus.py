"""Checks which GPUs a trainer rank sees: the one of its assignment, or none in a run on CPUs."""

from __future__ import annotations

import os
import socket

import torch


def check_visible_gpus(rank: int, expected: int) -> None:
    """ValueError unless this process sees `expected` GPUs: with more, all ranks would take the first one."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == expected:
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    shown = "no CUDA_VISIBLE_DEVICES" if visible is None else f"CUDA_VISIBLE_DEVICES={visible!r}"
    why = (
        "torch finds no CUDA device there: see megatron-vespo doctor"
        if count < expected
        else "something on that node has changed what Ray and this program set"
        if expected
        else "Ray was started there without its GPUs (--num-gpus), or leave --distributed-backend gloo out"
    )
    where = f"trainer rank {rank} on {socket.gethostname()}"
    raise ValueError(f"{where} sees {count} GPUs with {shown}, must see {expected}: {why}")
