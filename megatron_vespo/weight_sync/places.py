"""Where a process runs: on which host, and with which memory that others may open."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True, order=True)
class Place:
    """Processes with the same `memory` can open each other's: that of one GPU, or of the host for CPUs."""

    host: str
    memory: str


def place_of(device: torch.device) -> Place:
    """Of this process, which computes on `device`.

    Two containers on one host have different process ids and are two hosts here.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    host = f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    if device.type == "cpu":
        return Place(host, host)
    return Place(host, str(torch.cuda.get_device_properties(device).uuid))
