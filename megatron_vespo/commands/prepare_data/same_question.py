"""Decides whether two questions are the same apart from their spelling, or nearly the same."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable

NGRAM_WORDS = 8
MIN_NGRAMS = 8  # shorter questions consist of common phrases
NEAR_SHARE = 0.5  # share of a held-out question's n-grams
_SPACING = re.compile(r"\s|\$|\\[,;:! ]|\\left\b|\\right\b|\\displaystyle\b|~")
_SPELLINGS = (
    (re.compile(r"\\[dt]frac\b"), r"\\frac"),
    (re.compile(r"\\text(?:bf|it|rm)?\{([^{}]*)\}"), r"\1"),
)
_WORD = re.compile(r"[^\W_]+")


def normalised(question: str) -> str:
    """`question` without case, spacing, dollar signs, LaTeX of pure layout, and a full stop at the end.

    Digits, signs and all other characters stay: problems that differ in a number are two problems.
    """
    text = unicodedata.normalize("NFKC", question).casefold()
    for pattern, spelling in _SPELLINGS:
        text = pattern.sub(spelling, text)
    return _SPACING.sub("", text).rstrip(".?!:")


class HeldOut:
    """Questions that must not be trained on."""

    def __init__(self, questions: Iterable[str]):
        self._exact: dict[str, str] = {}
        self._grams: dict[tuple[str, ...], list[int]] = defaultdict(list)
        self._long: list[tuple[str, int]] = []  # (question, number of its n-grams)
        for question in questions:
            self._exact.setdefault(normalised(question), question)
            grams = _ngrams(question)
            if len(grams) >= MIN_NGRAMS:
                for gram in grams:
                    self._grams[gram].append(len(self._long))
                self._long.append((question, len(grams)))

    def __len__(self) -> int:
        return len(self._exact)

    def same(self, question: str) -> str | None:
        """The held-out question that is the same as `question`, or None."""
        return self._exact.get(normalised(question))

    def near(self, question: str) -> str | None:
        """A held-out question of whose NGRAM_WORDS-grams `question` has at least NEAR_SHARE, or None."""
        shared = Counter(number for gram in _ngrams(question) for number in self._grams.get(gram, ()))
        for number, count in shared.most_common():
            text, total = self._long[number]
            if count >= NEAR_SHARE * total:
                return text
        return None


def _ngrams(question: str) -> set[tuple[str, ...]]:
    words = _WORD.findall(question.casefold())
    return {tuple(words[start : start + NGRAM_WORDS]) for start in range(len(words) - NGRAM_WORDS + 1)}
