"""Continues a conversation by the tokens that the chat template puts between two turns of the policy.

A conversation grows by appending tokens. Its earlier turns are never rendered again, because a template may
write them differently, and a tokenizer may cut their text differently. Then the trained tokens would not be
the sampled ones. The template renders a stand-in conversation instead, and the new turn is what it puts after
the stand-in's answer:

    sampled so far    ...<|im_start|>assistant\\n<think>..</think>Let me look.<|im_end|>
    next turn         \\n<|im_start|>user\\nIt is 7.<|im_end|>\\n<|im_start|>assistant\\n
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from megatron_vespo.data.tokenizer import ChatFormat
from megatron_vespo.types import token_array

Message = dict[str, str]  # of "role" and "content"

_QUESTION, _ANSWER = "Stand-in question {}.", "Stand-in answer {}."
_SAMPLE = "Stand-in observation."
# how templates of thinking models begin an answer: earlier answers do not have it
_THINKING = re.compile(r"<think>\s*(</think>\s*)?$")


class TurnTemplate:
    """Makes the tokens of new messages in a conversation.

    The constructor checks that the chat template only appends when messages of `roles` follow an answer.
    """

    def __init__(self, form: ChatFormat, name: str, roles: Sequence[str] = ("user",)):
        """`name` says whose template it is, for messages. ValueError if it rewrites earlier turns."""
        if not form.apply_template:
            raise ValueError(
                "a conversation of several turns needs a chat template: leave out --no-chat-template"
            )
        self._form, self._name = form, name
        for role in roles:
            self._check_appends(role)

    def next_turn(self, messages: Sequence[Message], last_token: int) -> np.ndarray:
        """Return the tokens that `messages` and the start of an answer append, int32 [n].

        They follow `last_token`, the last one of an answer. If it is the template's own end of an answer, it
        is not repeated. ValueError if the template refuses the messages.
        """
        after = self._after_answer(1, messages)
        end = self._form.tokenizer.decode([last_token], skip_special_tokens=False)
        if end and after.lstrip().startswith(end):
            after = after.lstrip().removeprefix(end)
        return token_array(self._form.tokenizer.encode(after, add_special_tokens=False))

    def _after_answer(self, rounds: int, messages: Sequence[Message]) -> str:
        return self._split(rounds, messages)[1]

    def _split(self, rounds: int, messages: Sequence[Message]) -> tuple[str, str]:
        """Return what the template writes before and after the last of `rounds` stand-in answers."""
        history = [
            {"role": role, "content": content.format(number)}
            for number in range(rounds)
            for role, content in (("user", _QUESTION), ("assistant", _ANSWER))
        ]
        text = self._form.text([*history, *messages])
        answer = _ANSWER.format(rounds - 1)
        if text.count(answer) != 1:
            raise ValueError(
                f"{self._name}: its chat template writes an earlier answer {text.count(answer)} times"
            )
        before, _, after = text.partition(answer)
        return before, after

    def _check_appends(self, role: str) -> None:
        new = [{"role": role, "content": _SAMPLE}]
        prompt = self._form.text([{"role": "user", "content": _QUESTION.format(0)}])
        before, after = self._split(1, new)
        longer_before, longer_after = self._split(2, new)
        same_prompt = _THINKING.sub("", prompt) == before and longer_before.startswith(before)
        if not same_prompt or longer_after != after:
            raise ValueError(
                f"{self._name}: its chat template rewrites earlier turns when a message of role {role!r} "
                "follows. A conversation of several turns only grows: use a template that appends"
            )
