"""The math reward, but sometimes it hangs, eats memory, crashes or kills its process."""

from __future__ import annotations

import os
import random
import signal

from megatron_vespo.rewards.math import math_reward

ONE_IN = 400


def with_faults(response: str, answer: str, metadata: dict) -> float:
    fault = random.randrange(4 * ONE_IN)
    if fault == 0:
        while True:
            pass
    if fault == 1:
        return float(len(bytearray(2**40)))
    if fault == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == 3:
        raise RuntimeError("a fault of the soak test")
    return math_reward(response, answer, metadata)
