"""Calls one engine's /generate: takes token ids, returns a checked Completion.

Shapes: P prompt tokens, C completion tokens, L layers, K experts per token.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import replace
from typing import Any, NamedTuple

import aiohttp
import numpy as np

from megatron_vespo.system.http import EngineRequestError, auth_headers
from megatron_vespo.types import Completion, Prompt, SamplingParams

MAX_EXPERT_ID = 255  # Completion.routed_experts is uint8
LOG_PROB_ROUNDING = 1e-5  # a soft-max that rounds up to just above 1 gives a log-prob just above 0


class GenerateReplyError(RuntimeError):
    """A reply that cannot be trained on; the message names the request and the prompt."""


class NonFiniteLogProbsError(GenerateReplyError):
    """A completion whose log-probs are not finite; sampling it again may give a valid one."""


class RouteShape(NamedTuple):
    """Shape of the routes of one token: L and K."""

    num_layers: int
    topk: int


class EngineClient:
    """Draws completions from the engine at `url`; usable only inside `session`'s event loop.

    With `routes`, completions have the chosen experts: one megabyte per thousand tokens of a large model.
    """

    def __init__(
        self,
        url: str,
        session: aiohttp.ClientSession,
        routes: RouteShape | None,
        api_key: str | None = None,
    ):
        self.url = url
        self._session, self._routes = session, routes
        self._headers = auth_headers(api_key)

    async def generate(
        self, prompt: Prompt, sampling: SamplingParams, seed: int | None, begun: Completion | None = None
    ) -> Completion | None:
        """One sampled completion. `seed` has an effect if the engine runs --enable-deterministic-inference.

        The completion continues from `begun`, a partial completion. A result with finish reason "abort" is
        also partial; None means that no token was generated.

        Raises EngineRequestError if the engine refuses, GenerateReplyError for an unusable reply, and
        aiohttp.ClientError or, at the session's deadline, TimeoutError.
        """
        asked, left = _after(prompt, sampling, begun)
        payload = generate_payload(asked, left, seed, routed_experts=self._routes is not None)
        async with self._session.post(
            self.url + "/generate", json=payload, headers=self._headers
        ) as response:
            if response.status != 200:
                body = f"prompt {prompt.prompt_id}: {await response.text()}"
                raise EngineRequestError(self.url, "/generate", response.status, body)
            reply = await response.json()
        if _is_aborted_in_queue(reply, self._routes is not None):
            return begun
        rest = parse_generate_reply(reply, asked, sampling.temperature, self._routes)
        return rest if begun is None else _joined(begun, rest)

    async def abort(self) -> None:
        """Makes the engine return all its requests, with the tokens generated so far."""
        async with self._session.post(
            self.url + "/abort_request", json={"abort_all": True}, headers=self._headers
        ) as response:
            if response.status != 200:
                raise EngineRequestError(self.url, "/abort_request", response.status, await response.text())


def _after(
    prompt: Prompt, sampling: SamplingParams, begun: Completion | None
) -> tuple[Prompt, SamplingParams]:
    """The prompt and parameters with which an engine continues from `begun`."""
    if begun is None:
        return prompt, sampling
    left = sampling.max_new_tokens - len(begun.token_ids)
    return replace(prompt, token_ids=prompt.token_ids + begun.token_ids), replace(
        sampling, max_new_tokens=left
    )


def _joined(begun: Completion, rest: Completion) -> Completion:
    """`begun` continued by `rest`, whose prompt was the prompt and the tokens of `begun`."""
    old, routes = begun.routed_experts, rest.routed_experts
    if routes is not None:
        routes = None if old is None else np.concatenate([old, routes[len(old) :]])
    return replace(
        rest,
        prompt=begun.prompt,
        token_ids=begun.token_ids + rest.token_ids,
        log_probs=np.concatenate([begun.log_probs, rest.log_probs]),
        policy_versions=np.concatenate([begun.policy_versions, rest.policy_versions]),
        routed_experts=routes,
        num_retractions=begun.num_retractions + rest.num_retractions,
    )


def _is_aborted_in_queue(reply: dict, routed_experts: bool) -> bool:
    """Whether an aborted request has no new tokens, or tokens without log-probs and routes."""
    meta, token_ids = reply.get("meta_info", {}), reply.get("output_ids")
    if meta.get("finish_reason", {}).get("type") != "abort":
        return False
    missing = routed_experts and meta.get("routed_experts") is None
    return missing or not token_ids or len(meta.get("output_token_logprobs") or ()) != len(token_ids)


def generate_payload(
    prompt: Prompt, sampling: SamplingParams, seed: int | None, routed_experts: bool
) -> dict:
    """The body of one /generate request.

    It turns truncated sampling off for training, whatever the model's generation_config says. Otherwise the
    log-probs would not describe the sampled distribution.
    """
    sampling_params = {
        "temperature": sampling.temperature,
        "max_new_tokens": sampling.max_new_tokens,
        "stop_token_ids": list(sampling.stop_token_ids),
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": 0.0,
    }
    if seed is not None:
        sampling_params["sampling_seed"] = seed
    return {
        "input_ids": prompt.token_ids,
        "sampling_params": sampling_params,
        "return_logprob": True,
        "return_routed_experts": routed_experts,
    }


def parse_generate_reply(
    reply: dict, prompt: Prompt, temperature: float, routes: RouteShape | None
) -> Completion:
    """Checks one /generate reply and returns it as a Completion; raises GenerateReplyError.

    SGLang's log-probs are those after temperature. Without `routes` the reply's routes are ignored.
    """
    try:
        meta = reply["meta_info"]
        token_ids = list(reply["output_ids"])
        scored = meta["output_token_logprobs"]
        spans = meta["weight_versions"]
        finish = meta["finish_reason"]
        num_retractions = meta["num_retractions"]
        experts = meta["routed_experts"] if routes is not None else None
    except (KeyError, TypeError) as error:
        raise GenerateReplyError(f"prompt {prompt.prompt_id}: the reply has no {error}") from error
    where = f"request {meta.get('id')} (prompt {prompt.prompt_id})"
    if finish["type"] not in ("stop", "length", "abort"):
        raise GenerateReplyError(f"{where}: unknown finish reason {finish}")
    # SGLang ends such a request with "stop", after replacing the sampled token by a stop token.
    if finish.get("matched") == "NaN happened":
        raise NonFiniteLogProbsError(
            f"{where}: the engine sampled a token outside the vocabulary (NaN logits)"
        )
    if not token_ids:
        raise GenerateReplyError(f"{where}: no tokens, finish reason {finish}")
    if [entry[1] for entry in scored] != token_ids:
        raise GenerateReplyError(
            f"{where}: {len(token_ids)} output ids do not match {len(scored)} scored tokens"
        )
    routed_experts = None
    # After a retraction SGLang keeps tokens and log-probs, but returns the routes of the recomputation.
    if routes is not None and num_retractions == 0:
        num_entering = len(prompt.token_ids) + len(token_ids) - 1  # the last token is never fed back
        routed_experts = _routed_experts(experts, (num_entering, routes.num_layers, routes.topk), where)
    return Completion(
        prompt=prompt,
        token_ids=token_ids,
        log_probs=_log_probs([entry[0] for entry in scored], where),
        policy_versions=_policy_versions(spans, len(token_ids), where),
        routed_experts=routed_experts,
        finish_reason=finish["type"],
        temperature=temperature,
        num_retractions=num_retractions,
    )


def _log_probs(values: list[float | None], where: str) -> np.ndarray:
    """[C] float32. JSON has no NaN or infinity: SGLang writes null."""
    log_probs = np.array(values, dtype=np.float32)
    bad = np.flatnonzero(~(np.isfinite(log_probs) & (log_probs <= LOG_PROB_ROUNDING)))
    if len(bad):
        sound = np.isfinite(log_probs).all()
        raise (GenerateReplyError if sound else NonFiniteLogProbsError)(
            f"{where}: log-prob {values[bad[0]]} of completion token {bad[0]} "
            f"({len(bad)} bad of {len(values)})"
        )
    return log_probs


def _policy_versions(spans: list[dict], length: int, where: str) -> np.ndarray:
    """[C] int64 from [{"version": "3", "start": 0, "end": C}, ...], which must cover every token once."""
    bounds = [0, *(span["end"] for span in spans)]
    if [span["start"] for span in spans] != bounds[:-1] or bounds[-1] != length:
        raise GenerateReplyError(
            f"{where}: weight versions {spans} do not cover the {length} completion tokens"
        )
    versions = np.empty(length, dtype=np.int64)
    for span in spans:
        if not str(span["version"]).isdecimal():
            raise GenerateReplyError(
                f"{where}: weight version {span['version']!r} is not one of ours, a number"
            )
        versions[span["start"] : span["end"]] = int(span["version"])
    return versions


def _routed_experts(encoded: Any, shape: tuple[int, int, int], where: str) -> np.ndarray:
    """[P + C - 1, L, K] uint8 from base64 int32; GenerateReplyError if `encoded` is anything else."""
    try:
        experts = np.frombuffer(base64.b64decode(encoded), dtype=np.int32)
    except (binascii.Error, TypeError, ValueError) as error:
        raise GenerateReplyError(f"{where}: routed experts are not base64 int32 ({error})") from error
    if experts.size != np.prod(shape):
        raise GenerateReplyError(
            f"{where}: {experts.size} routed experts, "
            f"expected {shape[0]} tokens x {shape[1]} layers x {shape[2]}"
        )
    if experts.min() < 0 or experts.max() > MAX_EXPERT_ID:
        raise GenerateReplyError(
            f"{where}: routed experts {experts.min()}..{experts.max()} are not within 0..{MAX_EXPERT_ID}"
        )
    return experts.astype(np.uint8).reshape(shape)
