"""What went over HTTP to the engines and back, seen below the program's own client."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

import aiohttp
import numpy as np

from megatron_vespo.types import token_array


class Wire:
    """All answered /generate requests since `attach`."""

    def __init__(self) -> None:
        self.num_requests = 0
        self._replies: dict[bytes, list[dict[str, Any]]] = defaultdict(list)

    def attach(self, monkeypatch) -> Wire:
        post = aiohttp.ClientSession.post

        def recorded(session, url, **arguments):
            request = post(session, url, **arguments)
            return _Recorded(request, arguments["json"], self) if str(url).endswith("/generate") else request

        monkeypatch.setattr(aiohttp.ClientSession, "post", recorded)
        return self

    def add(self, payload: dict[str, Any], reply: dict[str, Any]) -> None:
        self.num_requests += 1
        self._replies[token_array(payload["input_ids"]).tobytes()].append(reply)

    def reply(self, asked: np.ndarray, kept: np.ndarray, log_probs: np.ndarray) -> dict[str, Any]:
        """Return a reply to a request whose input was exactly `asked`, and whose output `kept` begins with.

        An abort may have made the client ask with the same input again, and the same tokens may have come
        twice: `log_probs`, float32, begin with those of the reply.
        """
        replies = self._replies[token_array(asked).tobytes()]
        made = [
            reply
            for reply in replies
            if (ids := reply.get("output_ids"))
            and ids == kept[: len(ids)].tolist()
            and np.array_equal(reply_log_probs(reply), log_probs[: len(ids)])
        ]
        assert made, f"{len(replies)} replies to these {len(asked)} tokens, none with {kept} and {log_probs}"
        return max(made, key=lambda reply: len(reply["output_ids"]))


def reply_log_probs(reply: dict[str, Any]) -> np.ndarray:
    """Return the log-probs of the tokens that the engine sampled, float32 [n]."""
    return np.array([entry[0] for entry in reply["meta_info"]["output_token_logprobs"]], np.float32)


class _Recorded:
    def __init__(self, request: Any, payload: dict[str, Any], wire: Wire):
        self._request, self._payload, self._wire = request, payload, wire

    async def __aenter__(self) -> aiohttp.ClientResponse:
        response = await self._request.__aenter__()
        if response.status == 200:
            self._wire.add(self._payload, json.loads(await response.read()))  # kept for a second read
        return response

    async def __aexit__(self, *error: object) -> None:
        await self._request.__aexit__(*error)
