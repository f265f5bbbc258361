"""Draws the lengths of prompts and responses, group by group."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class Lengths(Protocol):
    def prompt(self, random: np.random.Generator) -> tuple[int, float]:
        """Tokens of a new prompt, and the common factor of its responses' lengths."""
        ...

    def responses(self, random: np.random.Generator, common: float, number: int) -> list[int]:
        """Tokens of each response."""
        ...


@dataclass(frozen=True)
class LogNormal:
    """Log-normal responses of mean `mean` tokens, cut at `maximum` (which lowers the mean); equal prompts.

    log length is normal with standard deviation `sigma`. The prompt contributes `prompt_share` of the
    variance: a hard question makes all its responses long.
    """

    mean: float
    sigma: float
    maximum: int
    prompt_tokens: int
    prompt_share: float = 0.0

    def prompt(self, random: np.random.Generator) -> tuple[int, float]:
        return self.prompt_tokens, math.sqrt(self.prompt_share) * random.standard_normal()

    def responses(self, random: np.random.Generator, common: float, number: int) -> list[int]:
        own = math.sqrt(1 - self.prompt_share) * random.standard_normal(number)
        location = math.log(self.mean) - self.sigma**2 / 2
        lengths = np.exp(location + self.sigma * (common + own)).round()
        return np.clip(lengths, 1, self.maximum).astype(int).tolist()


@dataclass(frozen=True)
class Recorded:
    """Recorded groups, equally likely. For another group size, responses are drawn from the group's."""

    prompts: np.ndarray  # [G] tokens
    completions: np.ndarray  # [G, n] tokens

    def prompt(self, random: np.random.Generator) -> tuple[int, float]:
        group = int(random.integers(len(self.prompts)))
        return int(self.prompts[group]), group

    def responses(self, random: np.random.Generator, common: float, number: int) -> list[int]:
        lengths = self.completions[int(common)]
        return (lengths if number == len(lengths) else random.choice(lengths, number)).tolist()
