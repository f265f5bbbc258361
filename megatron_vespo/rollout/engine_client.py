"""Calls one engine's /generate: takes token ids, returns a checked Completion.

Shapes: P prompt tokens, C completion tokens, L layers, K experts per token.
"""

from __future__ import annotations

from dataclasses import replace

import aiohttp
import numpy as np

from megatron_vespo.rollout.generate_reply import RouteShape, parse_generate_reply
from megatron_vespo.system.http import EngineRequestError, auth_headers
from megatron_vespo.types import Completion, Prompt, SamplingParams, VersionSpans, fetched


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
        # the routes of a beginning are known, or lost for good
        lost = begun is not None and begun.routed_experts is None
        routes = None if lost else self._routes
        known = 0 if begun is None or lost else len(asked.token_ids) - 1
        payload = generate_payload(asked, left, seed, routed_experts=routes is not None, routes_start=known)
        async with self._session.post(
            self.url + "/generate", json=payload, headers=self._headers
        ) as response:
            if response.status != 200:
                body = f"prompt {prompt.prompt_id}: {await response.text()}"
                raise EngineRequestError(self.url, "/generate", response.status, body)
            reply = await response.read()
        rest = parse_generate_reply(reply, asked, sampling.temperature, routes, known)
        return rest if begun is None else begun if rest is None else _joined(begun, rest)

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
    return replace(prompt, token_ids=np.concatenate([prompt.token_ids, begun.token_ids])), replace(
        sampling, max_new_tokens=left
    )


def _joined(begun: Completion, rest: Completion) -> Completion:
    """`begun` continued by `rest`, whose prompt was the prompt and the tokens of `begun`."""
    routes = None
    if begun.routed_experts is not None and rest.routed_experts is not None:
        routes = np.concatenate([fetched(begun.routed_experts), fetched(rest.routed_experts)])
    return replace(
        rest,
        prompt=begun.prompt,
        token_ids=np.concatenate([begun.token_ids, rest.token_ids]),
        log_probs=np.concatenate([begun.log_probs, rest.log_probs]),
        policy_versions=VersionSpans.joined([begun.policy_versions, rest.policy_versions]),
        routed_experts=routes,
        num_retractions=begun.num_retractions + rest.num_retractions,
    )


def generate_payload(
    prompt: Prompt, sampling: SamplingParams, seed: int | None, routed_experts: bool, routes_start: int = 0
) -> dict:
    """The body of one /generate request; it asks for the routes of the tokens from `routes_start` on.

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
        "input_ids": prompt.token_ids.tolist(),
        "sampling_params": sampling_params,
        "return_logprob": True,
        "return_routed_experts": routed_experts,
        "routed_experts_start_len": routes_start,
    }
