"""How long prompts and responses are, group by group."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class Lengths(Protocol):
    def prompt(self, random: np.random.Generator) -> tuple[int, float]:
        """Tokens of a new prompt, and what its responses have in common."""
        ...

    def responses(self, random: np.random.Generator, common: float, number: int) -> list[int]:
        """Tokens of each."""
        ...


@dataclass(frozen=True)
class LogNormal:
    """Responses of mean `mean` tokens, cut off at `maximum` (which lowers the mean); prompts of one length.

    log length is normal with standard deviation `sigma`, `prompt_share` of the variance the prompt's own:
    a hard question makes all its responses long.
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
    """Groups as they were recorded, each as likely; of another size, they are drawn from its responses."""

    prompts: np.ndarray  # [G] tokens
    completions: np.ndarray  # [G, n] tokens

    def prompt(self, random: np.random.Generator) -> tuple[int, float]:
        group = int(random.integers(len(self.prompts)))
        return int(self.prompts[group]), group

    def responses(self, random: np.random.Generator, common: float, number: int) -> list[int]:
        lengths = self.completions[int(common)]
        return (lengths if number == len(lengths) else random.choice(lengths, number)).tolist()
