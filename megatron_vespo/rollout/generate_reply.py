"""Turns the body of one /generate reply into a checked Completion: from JSON straight to arrays.

A reply of 4,096 tokens with the routes of a large model is 8.5 MB of JSON. The parser therefore skips fields
that nobody needs, and makes no Python object per expert.

Shapes: P prompt tokens, C completion tokens, L layers, K experts per token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec
import numpy as np
import pybase64

from megatron_vespo.rollout.sampling_mask import read_supports
from megatron_vespo.types import TOKEN_ID, Completion, Prompt, TokenSupports, VersionSpans

MAX_EXPERT_ID = 255  # Completion.routed_experts is uint8
LOG_PROB_ROUNDING = 1e-5  # a soft-max that rounds up to just above 1 gives a log-prob just above 0


class GenerateReplyError(RuntimeError):
    """A reply that cannot be trained on; the message names the request and the prompt."""


class RejectedDrawError(GenerateReplyError):
    """A completion that cannot be trained on; sampling it again may give a valid one."""

    what: str  # that it has


class NonFiniteLogProbsError(RejectedDrawError):
    """A completion whose log-probs are not finite."""

    what = "non-finite log-probs"


class SupportOverflowError(RejectedDrawError):
    """A completion of whose tokens one had more to choose from than the engine returns."""

    what = "a support larger than --sglang-sampling-mask-max-tokens"


class RouteShape(NamedTuple):
    """Shape of the routes of one token: L and K."""

    num_layers: int
    topk: int


_UNSET: Any = msgspec.UNSET


class _Span(msgspec.Struct):
    version: str | int
    start: int
    end: int


class _Meta(msgspec.Struct):
    finish_reason: dict[str, Any]
    id: Any = None
    # a request that was aborted before its first token lacks some of these
    output_token_logprobs: msgspec.Raw = _UNSET  # [[log-prob, id, text], ...]
    weight_versions: list[_Span] = _UNSET
    num_retractions: int = _UNSET
    routed_experts: msgspec.Raw = _UNSET  # base64 of int32 [entered, L, K]
    output_token_sampling_mask: msgspec.Raw = _UNSET  # [[id, ...], ...], what truncated sampling left
    output_token_sampling_logprobs: msgspec.Raw = _UNSET  # [log-prob among these, ...]


class _Reply(msgspec.Struct):
    meta_info: _Meta
    output_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


_REPLY = msgspec.json.Decoder(_Reply)
_NUMBERS = msgspec.json.Decoder(list[int | float | None])


def parse_generate_reply(
    body: bytes,
    prompt: Prompt,
    temperature: float,
    routes: RouteShape | None,
    routes_start: int = 0,
    with_supports: bool = False,
) -> Completion | None:
    """Check the body of one /generate reply and return it as a Completion; raises GenerateReplyError.

    None: the request was aborted before it had a token with a log-prob (and routes, and a support). SGLang's
    log-probs are those after temperature, `with_supports` those of the truncated distribution as well.
    Without `routes`, the reply's routes are skipped. Otherwise the request has asked for those of the tokens
    from `routes_start` on.
    """
    try:
        reply = _REPLY.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise GenerateReplyError(f"prompt {prompt.prompt_id}: not a reply of /generate: {error}") from error
    meta, token_ids = reply.meta_info, reply.output_ids or []
    finish, where = meta.finish_reason, f"request {meta.id} (prompt {prompt.prompt_id})"
    if finish.get("type") not in ("stop", "length", "abort"):
        raise GenerateReplyError(f"{where}: unknown finish reason {finish}")
    # SGLang ends such a request with "stop", after replacing the sampled token by a stop token.
    if finish.get("matched") == "NaN happened":
        raise NonFiniteLogProbsError(
            f"{where}: the engine sampled a token outside the vocabulary (NaN logits)"
        )
    scored = _scored(meta.output_token_logprobs or b"[]", where)
    supports = _supports(meta, where) if with_supports else None
    if finish["type"] == "abort" and (
        not token_ids
        or len(scored) != 3 * len(token_ids)
        or (routes and not meta.routed_experts)
        or (supports is not None and len(supports) != len(token_ids))
    ):
        return None
    _require(meta, prompt, routes is not None, with_supports)
    if not token_ids:
        raise GenerateReplyError(f"{where}: no tokens, finish reason {finish}")
    if scored[1::3] != token_ids:
        raise GenerateReplyError(
            f"{where}: {len(token_ids)} output ids do not match {-(-len(scored) // 3)} scored tokens"
        )
    log_probs = scored[0::3] if supports is None else _truncated(meta, supports, token_ids, where)
    num_entering = len(prompt.token_ids) + len(token_ids) - 1 - routes_start  # the last one is never fed back
    routed_experts = None if routes is None else _routes_of_sampling(meta, routes, num_entering, where)
    return Completion(
        prompt=prompt,
        token_ids=_token_ids(token_ids, where),
        log_probs=_log_probs(log_probs, where),
        policy_versions=_policy_versions(meta.weight_versions, len(token_ids), where),
        routed_experts=routed_experts,
        finish_reason=finish["type"],
        temperature=temperature,
        num_retractions=meta.num_retractions,
        supports=supports,
    )


def _require(meta: _Meta, prompt: Prompt, routed_experts: bool, supports: bool) -> None:
    names = ["output_token_logprobs", "weight_versions", "num_retractions"]
    names += ["routed_experts"] * routed_experts
    for name in names + ["output_token_sampling_mask", "output_token_sampling_logprobs"] * supports:
        if getattr(meta, name) is msgspec.UNSET:
            raise GenerateReplyError(f"prompt {prompt.prompt_id}: the reply has no {name!r}")


def _scored(entries: bytes, where: str) -> list[int | float | None]:
    """The numbers of [[log-prob, token id, null], ...] in one flat list.

    A list without the inner brackets is read in half the time. The token ids in it, which must equal the
    output ids, prove that every entry had three parts.
    """
    flat = bytes(entries).translate(None, b"[]")
    try:
        return _NUMBERS.decode(b"[" + flat + b"]")
    except msgspec.DecodeError as error:
        raise GenerateReplyError(f"{where}: output_token_logprobs are not triples: {error}") from error


def _supports(meta: _Meta, where: str) -> TokenSupports:
    try:
        return read_supports(meta.output_token_sampling_mask or b"")
    except ValueError as error:
        raise GenerateReplyError(f"{where}: output_token_sampling_mask: {error}") from error


def _truncated(
    meta: _Meta, supports: TokenSupports, token_ids: list[int], where: str
) -> list[int | float | None]:
    """Return the log-probs among the supports; GenerateReplyError unless every token is in its support."""
    try:
        log_probs = _NUMBERS.decode(meta.output_token_sampling_logprobs)
    except msgspec.DecodeError as error:
        raise GenerateReplyError(
            f"{where}: output_token_sampling_logprobs are not numbers: {error}"
        ) from error
    if not len(supports) == len(log_probs) == len(token_ids):
        raise GenerateReplyError(
            f"{where}: {len(supports)} sampling masks and {len(log_probs)} log-probs among them for "
            f"{len(token_ids)} tokens"
        )
    outside = supports.first_outside(np.array(token_ids))
    if outside is not None:
        raise GenerateReplyError(
            f"{where}: completion token {outside}, {token_ids[outside]}, is not in its sampling mask"
        )
    return log_probs


def _token_ids(token_ids: list[int], where: str) -> np.ndarray:
    """[C] int32."""
    try:
        return np.array(token_ids, TOKEN_ID)
    except OverflowError as error:
        raise GenerateReplyError(f"{where}: token id {max(token_ids, key=abs)} is too large") from error


def _log_probs(values: list[int | float | None], where: str) -> np.ndarray:
    """[C] float32. JSON has no NaN or infinity: SGLang writes null."""
    with np.errstate(over="ignore"):  # an infinity is refused below
        log_probs = np.array(values, dtype=np.float32)
    bad = np.flatnonzero(~(np.isfinite(log_probs) & (log_probs <= LOG_PROB_ROUNDING)))
    if len(bad):
        sound = np.isfinite(log_probs).all()
        raise (GenerateReplyError if sound else NonFiniteLogProbsError)(
            f"{where}: log-prob {values[bad[0]]} of completion token {bad[0]} "
            f"({len(bad)} bad of {len(values)})"
        )
    return log_probs


def _policy_versions(spans: list[_Span], length: int, where: str) -> VersionSpans:
    """From spans, which must cover every token once."""
    bounds = [0, *(span.end for span in spans)]
    if [span.start for span in spans] != bounds[:-1] or bounds[-1] != length or sorted(bounds) != bounds:
        raise GenerateReplyError(
            f"{where}: weight versions {spans} do not cover the {length} completion tokens"
        )
    parts = []
    for span in spans:
        if not str(span.version).isdecimal():
            raise GenerateReplyError(f"{where}: weight version {span.version!r} is not one of ours, a number")
        parts.append(VersionSpans.single(int(span.version), span.end - span.start))
    return VersionSpans.joined(parts)


def _routes_of_sampling(meta: _Meta, routes: RouteShape, num_tokens: int, where: str) -> np.ndarray | None:
    """The routes of `num_tokens`; None after a retraction, when SGLang returns those of the recomputation."""
    if meta.num_retractions:
        return None
    return _routed_experts(meta.routed_experts, (num_tokens, routes.num_layers, routes.topk), where)


def _routed_experts(encoded: msgspec.Raw, shape: tuple[int, int, int], where: str) -> np.ndarray:
    """uint8 [entered, L, K] from a JSON string, base64 of int32; GenerateReplyError for anything else."""
    text = memoryview(encoded)[1:-1]  # without the quotes, and without a copy
    try:
        experts = np.frombuffer(pybase64.b64decode(text, validate=True), dtype=np.uint32)
    except ValueError as error:
        raise GenerateReplyError(f"{where}: routed experts are not base64 int32 ({error})") from error
    if experts.size != np.prod(shape):
        raise GenerateReplyError(
            f"{where}: {experts.size} routed experts, "
            f"expected {shape[0]} tokens x {shape[1]} layers x {shape[2]}"
        )
    if experts.size and experts.max() > MAX_EXPERT_ID:  # a negative one is a large unsigned one
        signed = experts.view(np.int32)
        raise GenerateReplyError(
            f"{where}: routed experts {signed.min()}..{signed.max()} are not within 0..{MAX_EXPERT_ID}"
        )
    return experts.astype(np.uint8).reshape(shape)
