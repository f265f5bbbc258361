"""Reads the log-probs of given tokens out of one /generate reply.

SGLang 0.5.23 computes them from the logits as they are, so at temperature 1, whatever the request's is.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from megatron_vespo.rollout.generate_reply import LOG_PROB_ROUNDING, GenerateReplyError


class _Meta(msgspec.Struct):
    # [[log-prob, token id, text], ...] from `logprob_start_len` on; the first one has no log-prob
    input_token_logprobs: list[tuple[float | None, int, Any]]


class _Reply(msgspec.Struct):
    meta_info: _Meta


_REPLY = msgspec.json.Decoder(_Reply)


def score_payload(token_ids: np.ndarray, start: int) -> dict[str, Any]:
    """Return the body of a request for the log-probs of `token_ids[start:]`; nothing is generated."""
    return {
        "input_ids": token_ids.tolist(),
        "sampling_params": {"max_new_tokens": 0},
        "return_logprob": True,
        "logprob_start_len": start - 1,
    }


def parse_score_reply(body: bytes, scored: np.ndarray, where: str) -> np.ndarray:
    """Return the log-probs of the tokens `scored`, int32 [n], as float32 [n].

    GenerateReplyError, which begins with `where`, for other tokens or log-probs that are not finite.
    """
    try:
        entries = _REPLY.decode(body).meta_info.input_token_logprobs
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise GenerateReplyError(f"{where}: not a reply with log-probs of the prompt: {error}") from error
    if not _are_of([token for _, token, _ in entries[1:]], scored.tolist()):
        raise GenerateReplyError(
            f"{where}: log-probs of {len(entries) - 1} tokens, not of the {len(scored)} that were sent"
        )
    log_probs = np.array([value for value, _, _ in entries[1:]], np.float32)  # null becomes NaN
    bad = np.flatnonzero(~(np.isfinite(log_probs) & (log_probs <= LOG_PROB_ROUNDING)))
    if len(bad):
        raise GenerateReplyError(f"{where}: log-prob {log_probs[bad[0]]} of response token {bad[0]}")
    return log_probs


def _are_of(reported: list[int], sent: list[int]) -> bool:
    """Whether a reply is about the tokens `sent`.

    SGLang 0.5.23 writes 0 in the place of the vocabulary's last id; its log-prob is that id's.
    """
    if len(reported) != len(sent):
        return False
    others = {pair for pair in zip(reported, sent, strict=True) if pair[0] != pair[1]}
    return len(others) <= 1 and all(token == 0 for token, _ in others)
