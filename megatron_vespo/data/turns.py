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
# Templates of thinking models begin an answer so, but write it in few or none of the earlier answers.
_THINKING = re.compile(r"\s*(<think>\s*(</think>\s*)?)?\Z")


class TurnTemplate:
    """Makes the tokens of new messages in a conversation.

    The text of a message never becomes a control token of the template: an observation that contains
    "<|im_end|>" ends no turn. Control tokens are the tokenizer's special ones, and the added ones that the
    template itself writes into a conversation with messages of the same role.
    """

    def __init__(self, form: ChatFormat, name: str, roles: Sequence[str] = ("user",)):
        """`name` says whose template it is, for messages.

        ValueError if it does not only append when messages of `roles` follow an answer.
        """
        if not form.apply_template:
            raise ValueError(
                "a conversation of several turns needs a chat template: leave out --no-chat-template"
            )
        self._form, self._name = form, name
        # of the roles that were checked; the second: the template's first token after an answer, or none
        self._control_texts: dict[str, list[str]] = {}
        self._end_tokens: dict[str, list[int]] = {}
        for role in roles:
            self._check(role)

    def next_turn(self, messages: Sequence[Message], last_token: int) -> np.ndarray:
        """Return the tokens that `messages` and the start of an answer append, int32 [n].

        They follow `last_token`, the last one of an answer. If it is the template's own end of an answer, it
        is not repeated. ValueError if the template refuses the messages or rewrites earlier turns.
        """
        for role in {message["role"] for message in messages} - self._control_texts.keys():
            self._check(role)
        cut = _unused_text(messages)
        first, *others = self._split(1, [self._without_control(m, cut) for m in messages])[1].split(cut)
        token_ids = self._encode(first.lstrip())
        is_there = token_ids[:1] == [last_token] == self._end_tokens[messages[0]["role"]]
        token_ids = token_ids[1:] if is_there else self._encode(first)
        for other in others:
            token_ids += self._encode(other)
        return token_array(token_ids)

    def _encode(self, text: str) -> list[int]:
        return self._form.tokenizer.encode(text, add_special_tokens=False)

    def _without_control(self, message: Message, cut: str) -> Message:
        """Return the message with `cut` in the middle of each control token: parts are tokenised alone."""
        content = message["content"]
        for control in self._control_texts[message["role"]]:
            content = content.replace(control, control[:1] + cut + control[1:])
        return {**message, "content": content}

    def _split(self, rounds: int, messages: Sequence[Message]) -> tuple[str, str]:
        """Return what the template writes before and after the last of `rounds` stand-in answers."""
        history = [
            {"role": role, "content": content.format(number)}
            for number in range(rounds)
            for role, content in (("user", _QUESTION), ("assistant", _ANSWER))
        ]
        text = self._form.text([*history, *messages])
        before, answer, after = text.partition(_ANSWER.format(rounds - 1))
        if not answer:
            raise ValueError(f"{self._name}: its chat template leaves out an earlier answer")
        return before, after

    def _check(self, role: str) -> None:
        new = [{"role": role, "content": _SAMPLE}]
        prompt = self._form.text([{"role": "user", "content": _QUESTION.format(0)}])
        before, after = self._split(1, new)
        longer_before, longer_after = self._split(2, new)
        begin = _THINKING.sub("", before)
        if _THINKING.sub("", prompt) != begin or not longer_before.startswith(begin) or longer_after != after:
            raise ValueError(
                f"{self._name}: its chat template rewrites earlier turns when a message of role {role!r} "
                "follows. A conversation of several turns only grows: use a template that appends"
            )
        if _SAMPLE not in after:
            raise ValueError(
                f"{self._name}: its chat template leaves out messages of role {role!r} that follow an answer"
            )
        self._control_texts[role] = self._control_texts_in(before + after)
        self._end_tokens[role] = self._encode(after.partition(_SAMPLE)[0].lstrip())[:1]

    def _control_texts_in(self, text: str) -> list[str]:
        """Return the control tokens' texts, `text` being what the template makes of a conversation."""
        written = {*self._encode(text)}
        added = self._form.tokenizer.added_tokens_decoder.items()
        texts = {token.content for token_id, token in added if token.special or token_id in written}
        return sorted(text for text in texts if len(text) > 1)  # in an order that every process has


def _unused_text(messages: Sequence[Message]) -> str:
    """Return letters and digits that are in no message, which every template leaves as they are."""
    text = "7cut7"
    while any(text in message["content"] for message in messages):
        text += "7"
    return text
