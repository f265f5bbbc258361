"""An HTTP endpoint as a reward function.

POST {"response": ..., "answer": ..., "metadata": {...}}     one request per response
200  {"reward": 0.5, ...}                                    further numbers are parts of the reward
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import socket
import weakref
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from megatron_vespo.rewards.coroutines import MAX_CONCURRENT
from megatron_vespo.system.http import is_http_url

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0  # between tries; each is up to twice as long as the one before
_BODY_CHARACTERS = 150  # quoted from a refused reply in an error
_REACH_TIMEOUT_S = 2.0
_TOO_MANY_REQUESTS = 429

# one per event loop, and a worker has one: requests share its connections
_sessions: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, aiohttp.ClientSession]
_sessions = weakref.WeakKeyDictionary()


class EndpointError(Exception):
    """The endpoint's answer is no reward, or there is none; one line."""


class _BusyError(EndpointError):
    """Another try may work."""


@dataclass(frozen=True)
class HttpReward:
    """Reward function that asks the endpoint at `url`, at most 64 times at once per worker.

    Connection errors and the statuses 429 and 5xx are tried again until the call is cancelled.
    Raises ValueError if `url` is not the URL of an endpoint.
    """

    url: str

    def __post_init__(self) -> None:
        if not is_http_url(self.url):
            raise ValueError(f"reward function {self.url!r}: write http://HOST:PORT/PATH, or https://")
        parts = urlsplit(self.url)
        if parts.username or parts.password:
            raise ValueError("reward function: its URL holds a password, which logs would show; leave it out")

    async def __call__(self, response: str, answer: str, metadata: dict) -> dict[str, Any]:
        """Return the endpoint's answer. Raises EndpointError for an answer that another try cannot mend."""
        body = json.dumps({"response": response, "answer": answer, "metadata": metadata}).encode()
        last: EndpointError | None = None
        try:
            for tries in itertools.count():
                try:
                    return await self._ask(body)
                except _BusyError as error:
                    last = error
                await asyncio.sleep(_pause_s(tries))
        except asyncio.CancelledError:  # the deadline: what went wrong is worth more than that it is late
            if last is not None:
                raise last from None
            raise
        raise AssertionError("tries never end")

    def unreachable(self) -> str | None:
        """Return why no connection to the endpoint can be made now, in one line; None if one can."""
        parts = urlsplit(self.url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            socket.create_connection((parts.hostname, port), _REACH_TIMEOUT_S).close()
        except OSError as error:
            return (
                f"--reward-function {self.url} cannot be reached now ({error}); every request is tried again "
                "within --reward-timeout"
            )
        return None

    async def _ask(self, body: bytes) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        try:
            # a redirected POST would become a GET
            async with _session().post(self.url, data=body, headers=headers, allow_redirects=False) as reply:
                content = await reply.read()
        except aiohttp.ClientSSLError as error:  # a connection error, but one that stays
            raise EndpointError(f"{self.url}: {error}") from error
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
            raise _BusyError(f"{self.url}: {error or type(error).__name__}") from error
        except aiohttp.ClientError as error:
            raise EndpointError(f"{self.url}: {error}") from error
        if reply.status == 200:
            return self._object(content)
        kind = _BusyError if reply.status == _TOO_MANY_REQUESTS or reply.status >= 500 else EndpointError
        raise kind(f"{self.url} answered {reply.status}: {_beginning(content)}")

    def _object(self, content: bytes) -> dict[str, Any]:
        try:
            answer = json.loads(content)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise EndpointError(
                f'{self.url} answered no object like {{"reward": 1.0}}: {_beginning(content)}'
            )
        return answer


def _session() -> aiohttp.ClientSession:
    loop = asyncio.get_running_loop()
    if loop not in _sessions:
        _sessions[loop] = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=MAX_CONCURRENT),
            timeout=aiohttp.ClientTimeout(total=None),  # the caller's deadline counts
            trust_env=False,  # no proxy, which would see the responses
        )
    return _sessions[loop]


def _pause_s(tries: int) -> float:
    """Return the pause after `tries` repetitions; its jitter keeps responses from coming back together."""
    longest = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** min(tries, 16))
    return random.uniform(0.5, 1.0) * longest


def _beginning(content: bytes) -> str:
    text = " ".join(content[: 4 * _BODY_CHARACTERS].decode(errors="replace").split())
    return text[:_BODY_CHARACTERS] or "an empty body"
