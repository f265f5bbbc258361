"""Gives the bytes that each token stands for: joined, those of a response's tokens are its text in UTF-8.

A tokenizer's `decode` cannot tell them. A token may be a part of a letter, which decodes to a replacement
character alone. So the steps of the decoder in tokenizer.json are applied to one token at a time, as bytes.
Steps that only trim the beginning of a whole text are left out: a response goes on from its prompt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
Step = Callable[[str], str | bytes]  # bytes are final


class TokenPieces:
    """The pieces of one tokenizer of transformers. Each token is looked up once.

    Example:
        TokenPieces(tokenizer)[220] == b" "
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._steps = None if backend is None else _steps(backend.decoder)
        self._anchor: tuple[int, str] | None = None
        self._pieces: dict[int, bytes] = {}

    def __getitem__(self, token_id: int) -> bytes:
        """Return the token's bytes; none for an id without a token, as in a padded vocabulary."""
        if token_id not in self._pieces:
            self._pieces[token_id] = self._piece(token_id)
        return self._pieces[token_id]

    def of(self, token_ids: np.ndarray) -> dict[int, bytes]:
        """Return the pieces of the distinct tokens of an array of ids, in ascending order of ids."""
        # `np.unique` would sort millions of tokens
        there = np.zeros(int(token_ids.max(initial=0)) + 1, bool)
        there[token_ids] = True
        return {token_id: self[token_id] for token_id in np.flatnonzero(there).tolist()}

    def _piece(self, token_id: int) -> bytes:
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if token is None:
            return b""
        if self._steps is None:
            return self._by_decoding(token_id, token)
        # a letter of an added token stands for itself, not for a byte
        added = self._added.get(token_id)
        text: str | bytes = token
        for step in self._steps:
            if not isinstance(text, str):
                break
            text = text if added is not None and step is _byte_level else step(text)
        return text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text

    def _by_decoding(self, token_id: int, token: str) -> bytes:
        """Return what the token adds to a text that ends with another token."""
        if byte := _BYTE_TOKEN.fullmatch(token):
            return bytes.fromhex(byte[1])
        anchor, text = self._anchor = self._anchor or self._find_anchor()
        both = self._tokenizer.decode([anchor, token_id], clean_up_tokenization_spaces=False)
        return both.removeprefix(text).encode()

    def _find_anchor(self) -> tuple[int, str]:
        """Return a token and its text that other tokens leave as it is."""
        for token_id in range(len(self._tokenizer)):
            text = self._tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
            twice = self._tokenizer.decode([token_id] * 2, clean_up_tokenization_spaces=False)
            if token_id not in self._added and text.isascii() and text.isalnum() and twice.startswith(text):
                return token_id, text
        return 0, ""


def _steps(decoder: Any) -> list[Step] | None:
    """Return the steps of a decoder of `tokenizers`; None if there is one that this module does not know."""
    if decoder is None:  # tokens are words
        return [lambda token: " " + token]
    described = json.loads(decoder.__getstate__())
    steps: list[Step] = []
    whole = False  # after Fuse, a step gets the whole text
    for one in described["decoders"] if described["type"] == "Sequence" else [described]:
        if one["type"] == "Fuse":
            whole = True
        elif one["type"] == "Strip":
            if not whole:
                steps.append(_strip(one))
        elif (step := _step(one)) is not None:
            steps.append(step)
        else:
            return None
    return steps


def _step(described: dict[str, Any]) -> Step | None:
    match described:
        case {"type": "ByteLevel"}:
            return _byte_level
        case {"type": "ByteFallback"}:
            return _byte_fallback
        case {"type": "Replace", "pattern": {"String": old}, "content": new}:
            return lambda token: token.replace(old, new)
        case {"type": "Metaspace", "replacement": blank}:
            return lambda token: token.replace(blank, " ")
    return None


def _strip(described: dict[str, Any]) -> Step:
    content, start, stop = described["content"], described["start"], described["stop"]

    def strip(token: str) -> str:
        for _ in range(start):
            token = token.removeprefix(content)
        for _ in range(stop):
            token = token.removesuffix(content)
        return token

    return strip


def _byte_fallback(token: str) -> str | bytes:
    byte = _BYTE_TOKEN.fullmatch(token)
    return token if byte is None else bytes.fromhex(byte[1])


def _byte_level(token: str) -> str | bytes:
    try:
        return bytes(_BYTES[letter] for letter in token)
    except KeyError:  # an added token
        return token


def _letters_of_bytes() -> dict[str, int]:
    """Return letter -> the byte that it stands for in byte-level vocabularies, as GPT-2 has laid down.

    Bytes that print in Latin-1 stand for themselves; the others get the letters from U+0100 on.
    """
    printed = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(0x100) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTES = _letters_of_bytes()
