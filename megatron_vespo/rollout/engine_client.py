"""Calls one engine's /generate: takes token ids, returns a checked Completion.

Shapes: P prompt tokens, C completion tokens, L layers, K experts per token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import Protocol

import aiohttp
import numpy as np

from megatron_vespo.data.routes import joined_routes
from megatron_vespo.rollout.generate_reply import RouteShape, SupportOverflowError, parse_generate_reply
from megatron_vespo.rollout.sampling_mask import OVERFLOW
from megatron_vespo.rollout.score_reply import parse_score_reply, score_payload
from megatron_vespo.system.http import EngineRequestError, auth_headers
from megatron_vespo.types import Completion, Prompt, SamplingParams, Segments, TokenSupports, VersionSpans

CONNECT_TIMEOUT_S = 30.0
# SGLang closes a connection that is idle for 5 s. A request that is sent at that moment is lost, and episodes
# leave connections idle between their turns.
KEEP_ALIVE_S = 2.0


class ConnectionLostError(RuntimeError):
    """The connection to an engine broke, or the process that held it died; the request may be repeated."""


class EngineClient(ABC):
    """Draws completions from the engine at `url`; usable only inside one event loop.

    If `wants_routes`, completions have the chosen experts: one megabyte per thousand tokens of a large model.
    """

    def __init__(self, url: str, wants_routes: bool):
        self.url, self._wants_routes = url, wants_routes

    async def generate(
        self, prompt: Prompt, sampling: SamplingParams, seed: int | None, begun: Completion | None = None
    ) -> Completion | None:
        """One sampled completion. `seed` has an effect if the engine runs --enable-deterministic-inference.

        The completion continues from `begun`, a partial completion, which may end with given tokens. Every
        sampled token keeps the routes of the pass that has sampled it. `sampling.max_new_tokens` bounds the
        whole completion. A result with finish reason "abort" is also partial; None means that no token was
        generated.

        Raises EngineRequestError if the engine refuses, GenerateReplyError for an unusable reply,
        ConnectionLostError, and TimeoutError at the deadline.
        """
        if begun is None:
            return await self.draw(prompt, sampling, seed, 0 if self._wants_routes else None)
        asked = replace(prompt, token_ids=np.concatenate([prompt.token_ids, begun.token_ids]))
        left = replace(sampling, max_new_tokens=sampling.max_new_tokens - len(begun.token_ids))
        # the routes of a beginning are known, or lost for good
        keeps_routes = self._wants_routes and begun.routed_experts is not None
        # given tokens, and the token before them, have not entered a pass yet
        entered = len(asked.token_ids) - 1 - begun.num_given_at_end
        rest = await self.draw(asked, left, seed, entered if keeps_routes else None)
        return begun if rest is None else _joined(begun, rest)

    @abstractmethod
    async def draw(
        self, prompt: Prompt, sampling: SamplingParams, seed: int | None, routes_start: int | None
    ) -> Completion | None:
        """One reply of the engine, with the routes of tokens from `routes_start` on, unless that is None."""

    @abstractmethod
    async def abort(self) -> None:
        """Makes the engine return all its requests, with the tokens generated so far."""


MakeClient = Callable[[int, str], EngineClient]  # number and url of an engine


class RemoteClients(Protocol):
    """Clients whose HTTP is done by other processes."""

    def connect(self, routes: RouteShape | None, timeout_s: float) -> AbstractAsyncContextManager[MakeClient]:
        """Makes clients for one event loop. `timeout_s` is the deadline of one request."""
        ...


class HttpEngineClient(EngineClient):
    """Does HTTP in this process, within `session`'s event loop."""

    def __init__(
        self,
        url: str,
        session: aiohttp.ClientSession,
        routes: RouteShape | None,
        api_key: str | None = None,
    ):
        super().__init__(url, routes is not None)
        self._session, self._routes = session, routes
        self._headers = auth_headers(api_key)

    async def draw(
        self, prompt: Prompt, sampling: SamplingParams, seed: int | None, routes_start: int | None
    ) -> Completion | None:
        payload = generate_payload(prompt, sampling, seed, routes_start)
        try:
            reply = await self._generate(payload, f"prompt {prompt.prompt_id}")
        except EngineRequestError as error:
            if sampling.with_supports and OVERFLOW in str(error):
                raise SupportOverflowError(str(error)) from error
            raise
        routes = None if routes_start is None else self._routes
        return parse_generate_reply(
            reply, prompt, sampling.temperature, routes, routes_start or 0, sampling.with_supports
        )

    async def score(self, token_ids: np.ndarray, start: int, what: str) -> np.ndarray:
        """Return the model's log-probs of `token_ids[start:]` at temperature 1, float32 [n - start].

        `token_ids` is int32 [n], `start` at least 1; `what` names the request. Raises like `generate`.
        """
        reply = await self._generate(score_payload(token_ids, start), what)
        return parse_score_reply(reply, token_ids[start:], f"engine {self.url}, {what}")

    async def _generate(self, payload: dict, what: str) -> bytes:
        try:
            async with self._session.post(
                self.url + "/generate", json=payload, headers=self._headers
            ) as response:
                if response.status != 200:
                    body = f"{what}: {await response.text()}"
                    raise EngineRequestError(self.url, "/generate", response.status, body)
                return await response.read()
        except TimeoutError:  # also aiohttp's, which are ClientErrors too
            raise
        except aiohttp.ClientError as error:
            raise ConnectionLostError(str(error)) from error

    async def abort(self) -> None:
        async with self._session.post(
            self.url + "/abort_request", json={"abort_all": True}, headers=self._headers
        ) as response:
            if response.status != 200:
                raise EngineRequestError(self.url, "/abort_request", response.status, await response.text())


def engine_session(timeout_s: float) -> aiohttp.ClientSession:
    """A session for any number of requests, each with this deadline; without the environment's proxies."""
    timeout = aiohttp.ClientTimeout(total=timeout_s, connect=CONNECT_TIMEOUT_S)
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)
    return aiohttp.ClientSession(connector=connector, timeout=timeout, trust_env=False)


def _joined(begun: Completion, rest: Completion) -> Completion:
    """`begun` continued by `rest`, whose prompt was the prompt and the tokens of `begun`."""
    old, new = begun.routed_experts, rest.routed_experts
    segments, supports = begun.segments, None
    if begun.supports is not None and rest.supports is not None:
        supports = TokenSupports.joined([begun.supports, rest.supports])
    if segments is not None:
        segments = Segments.joined([segments, Segments.single("policy", len(rest.token_ids))])
    return replace(
        begun,
        segments=segments,
        finish_reason=rest.finish_reason,
        token_ids=np.concatenate([begun.token_ids, rest.token_ids]),
        log_probs=np.concatenate([begun.log_probs, rest.log_probs]),
        policy_versions=VersionSpans.joined([begun.policy_versions, rest.policy_versions]),
        routed_experts=None if old is None or new is None else joined_routes(old, new),
        num_retractions=begun.num_retractions + rest.num_retractions,
        supports=supports,
    )


def generate_payload(
    prompt: Prompt, sampling: SamplingParams, seed: int | None, routes_start: int | None
) -> dict:
    """The body of one /generate request; it asks for the routes of the tokens from `routes_start` on, if any.

    It states how sampling is truncated, whatever the model's generation_config says. For training, the reply
    must say which tokens were left. Otherwise its log-probs would not describe the sampled distribution.
    """
    sampling_params = {
        "temperature": sampling.temperature,
        "max_new_tokens": sampling.max_new_tokens,
        "stop_token_ids": list(sampling.stop_token_ids),
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
    }
    if seed is not None:
        sampling_params["sampling_seed"] = seed
    payload = {
        "input_ids": prompt.token_ids.tolist(),
        "sampling_params": sampling_params,
        "return_logprob": True,
        "return_routed_experts": routes_start is not None,
    }
    if routes_start:
        payload["routed_experts_start_len"] = routes_start
    return payload | ({"return_sampling_mask": True} if sampling.with_supports else {})
