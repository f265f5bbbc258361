"""Who wrote what in a response, as text."""

import numpy as np
import pytest

from megatron_vespo.data.transcript import Turn, answer_text, transcripts
from megatron_vespo.types import Completion, Prompt, Segments

END = 10  # a special token


class Characters:
    """Tokens are characters."""

    def batch_decode(self, tokens, skip_special_tokens):
        return ["".join(chr(t) for t in ids if not (skip_special_tokens and t == END)) for ids in tokens]


def response(*spans: tuple[str, str], segments: bool = True) -> Completion:
    ids = [ord(letter) for _, text in spans for letter in text]
    writers = Segments(tuple(writer for writer, _ in spans), tuple(len(text) for _, text in spans))
    n = writers.num_sampled
    return Completion(
        Prompt(0, [1], "7", "question"), ids, np.zeros(n, np.float32), [0] * n, None, "stop", 1.0,
        segments=writers if segments else None,
    )  # fmt: skip


SEARCHED = (("policy", "find\n"), ("tool", "it is 7\n"), ("environment", "go on"), ("policy", "seven\n"))


def test_each_segment_is_a_turn_without_special_tokens():
    plain, searched = transcripts(
        Characters(), [response(("policy", "7\n"), segments=False), response(*SEARCHED)]
    )
    assert plain == [Turn("policy", "7")]
    assert searched == [
        Turn("policy", "find"),
        Turn("tool", "it is 7"),
        Turn("environment", "go on"),
        Turn("policy", "seven"),
    ]


@pytest.mark.parametrize(
    ("spans", "text"),
    [
        (SEARCHED, "seven"),
        (SEARCHED[:2], "find"),  # ends with given tokens
        (SEARCHED[1:3], ""),
        ((), ""),
    ],
)
def test_the_answer_is_what_the_policy_wrote_last(spans, text):
    (turns,) = transcripts(Characters(), [response(*spans)])
    assert answer_text(turns) == text


def test_nothing_to_decode():
    assert transcripts(Characters(), []) == []
