"""Environments as users write them, for whole runs."""

from __future__ import annotations

from megatron_vespo.rollout.tool_environment import ToolEnvironment
from megatron_vespo.types import Prompt

TURNS = 3


class CountsLetters:
    """Three turns. Each is told how long it was, and rewarded for an even length."""

    replayable = True

    async def reset(self, prompt: Prompt) -> None:
        self.turns = 0

    async def step(self, text: str) -> tuple[str, float, bool]:
        self.turns += 1
        return f" {len(text)} letters. ", float(len(text) % 2 == 0), self.turns == TURNS


class CountsLettersAnew(CountsLetters):
    """The same, but a resumed run begins its episodes anew."""

    replayable = False


class RewardsTurns(CountsLetters):
    """The n-th turn earns n."""

    async def step(self, text: str) -> tuple[str, float, bool]:
        observation, _, done = await super().step(text)
        return observation, float(self.turns), done


class FailsSometimes(CountsLetters):
    async def step(self, text: str) -> tuple[str, float, bool]:
        if len(text.split()) % 4 == 3:
            raise RuntimeError("a quarter of all lengths")
        return await super().step(text)


def multiply(a: int, b: int) -> int:
    """Multiply two integers.

    Args:
        a: the first factor
        b: the second factor
    """
    return a * b


class Multiplies(ToolEnvironment):
    functions = (multiply,)
    replayable = True
