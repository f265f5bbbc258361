"""The study's task: running sums modulo ten, one token a sum, judged by the last one alone.

    prompt      2 9 4 ... 7 =        LENGTH digits and an equals sign
    response    2 1 5 ... 3 <eos>    the sum so far after every digit; right if the last one is

One wrong sum spoils all that follow, so the reward of a long response hangs on many tokens.
"""

from __future__ import annotations

import numpy as np

from megatron_vespo.types import Prompt

LENGTH = 64  # digits
EQUALS, EOS, PAD = 10, 11, 12  # a digit is its own token id
VOCAB_SIZE = 16
MAX_RESPONSE = LENGTH + 4  # tokens; one that has not ended by then is wrong


def draw_digits(draw: np.random.Generator, num_prompts: int) -> np.ndarray:
    """[num_prompts, LENGTH] int64."""
    return draw.integers(0, 10, (num_prompts, LENGTH))


def prompt_tokens(digits: np.ndarray) -> np.ndarray:
    """[prompts, LENGTH + 1] int64."""
    return np.concatenate([digits, np.full((len(digits), 1), EQUALS)], axis=1)


def demonstrations(digits: np.ndarray, error_share: float, draw: np.random.Generator) -> np.ndarray:
    """Responses [prompts, LENGTH + 1] int64 that go wrong at a share of the sums, and on from there."""
    slips = (draw.random(digits.shape) < error_share) * draw.integers(1, 10, digits.shape)
    sums = (digits + slips).cumsum(axis=1) % 10
    return np.concatenate([sums, np.full((len(digits), 1), EOS)], axis=1)


def prompts(digits: np.ndarray) -> list[Prompt]:
    """One a row; the answer is the last sum."""
    return [
        Prompt(i, [*map(int, row), EQUALS], str(row.sum() % 10), "".join(map(str, row)) + "=")
        for i, row in enumerate(digits)
    ]


def reward(prompt: Prompt, token_ids: list[int]) -> float:
    """1 if the response ends and its last token before the end is the sum of all digits."""
    ended = len(token_ids) > 1 and token_ids[-1] == EOS
    return float(ended and str(token_ids[-2]) == prompt.answer)


def text_reward(response: str, answer: str, metadata: dict) -> float:
    """The same of a decoded response, which lacks its end; one that has none gets nothing anyway."""
    return float(response[-1:] == answer)
