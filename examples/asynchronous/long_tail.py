"""An artificial long tail: one completion in eight takes eight times as long as it would.

As a generate function for --generate-function; the tiny example's own answers are all about as long. The
others wait for it where generation and training take turns.
"""

from __future__ import annotations

ONE_IN = 8
TIMES = 8


async def generate(draw, prompt, sampling, seed):
    """The engine works all that time: it answers again and again, and the last answer counts."""
    for attempt in range(TIMES if seed % ONE_IN == 0 else 1):
        completion = await draw(prompt, sampling, seed + attempt)
    return completion
