"""Sends JSON over HTTP to an engine's control endpoints; every failure is an EngineRequestError."""

from __future__ import annotations

from urllib.parse import urlsplit

BODY_CHARACTERS = 300  # quoted from a refused reply in an error


class EngineRequestError(RuntimeError):
    """A control call that an engine refused or did not answer. If it did not answer, `status` is None."""

    def __init__(self, url: str, path: str, status: int | None, body: str):
        answered = f"answered {status}" if status is not None else "did not answer"
        self.reason = f"{path} {answered}: {body[:BODY_CHARACTERS]}"
        super().__init__(f"engine {url}: {self.reason}")
        self.url, self.path, self.status, self._body = url, path, status, body

    def __reduce__(self):
        """Rebuild it in another process from the constructor's arguments."""
        return type(self), (self.url, self.path, self.status, self._body)


def is_http_url(url: str) -> bool:
    """Return whether `url` has the form http://HOST or https://HOST, with or without port and path."""
    try:
        parts = urlsplit(url)
        return bool(parts.scheme in ("http", "https") and parts.hostname and parts.port != 0)
    except ValueError:  # of the host or the port
        return False


def auth_headers(api_key: str | None) -> dict[str, str]:
    return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}


def post_json(url: str, path: str, payload: dict, timeout_s: float, api_key: str | None = None) -> dict:
    """POST `payload` to `url + path`; returns the JSON reply, or {} if the reply is empty or plain text.

    Raises EngineRequestError if the status is not 200, or if the reply says `"success": false`.
    """
    return _call("POST", url, path, payload, timeout_s, api_key)


def get_json(url: str, path: str, timeout_s: float, api_key: str | None = None) -> dict:
    """GET `url + path`; reply and errors as for `post_json`."""
    return _call("GET", url, path, None, timeout_s, api_key)


def _call(
    method: str, url: str, path: str, payload: dict | None, timeout_s: float, api_key: str | None
) -> dict:
    import requests  # not for whoever only reads flags: the trainer's ranks can do without it

    try:
        with requests.Session() as session:
            session.trust_env = False  # no proxy, which would see the engine's key
            reply = session.request(
                method, url + path, json=payload, timeout=timeout_s, headers=auth_headers(api_key)
            )
    except requests.Timeout as error:
        raise EngineRequestError(url, path, None, f"nothing within {timeout_s:g} s") from error
    except requests.RequestException as error:
        raise EngineRequestError(url, path, None, str(error)) from error
    if reply.status_code != 200:
        raise EngineRequestError(url, path, reply.status_code, reply.text)
    if "json" not in reply.headers.get("Content-Type", "") or not reply.content:
        return {}  # /flush_cache and /health answer with plain text or an empty body
    body = reply.json()
    # Control calls may refuse with status 200.
    if isinstance(body, dict) and body.get("success") is False:
        raise EngineRequestError(url, path, reply.status_code, reply.text)
    return body
