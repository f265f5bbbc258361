"""Control calls over HTTP to the engines of a run: the same call to all of them at once."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal

from megatron_vespo.system.http import EngineRequestError, get_json, post_json

RECOVERY_TIMEOUT_S = 60.0  # for what a healthy engine answers at once
# SGLang's names. Running requests keep their KV cache, compute it anew with the new weights, or end.
PauseMode = Literal["in_place", "retract", "abort"]


class WeightSyncError(RuntimeError):
    """Engines did not take the weights; the message names them."""


class EnginesLostError(WeightSyncError):
    """Engines did not answer: they are dead, hung or out of reach. `lost` has the reason by url."""

    def __init__(self, lost: dict[str, str]):
        super().__init__(lost)
        self.lost = lost

    def __str__(self) -> str:
        return "weight sync failed: " + "; ".join(self.lost.values())


class EngineAdmin:
    """Sends the same call to all engines at once, and raises failures after all have answered.

    Raises EnginesLostError if engines did not answer, else WeightSyncError with the first refusal.
    """

    def __init__(
        self,
        urls: Sequence[str],
        timeout_s: float,
        pause: PauseMode | None = None,
        api_key: str | None = None,
    ):
        """`pause`: what happens to requests that run during an update. Without it none may run."""
        self.urls, self.timeout_s, self._api_key = list(urls), timeout_s, api_key
        self.pause: PauseMode | None = pause
        self._threads = ThreadPoolExecutor(max_workers=len(self.urls), thread_name_prefix="weight-sync")

    def of(self, urls: Sequence[str]) -> EngineAdmin:
        """An EngineAdmin with the same settings for other engines of the run."""
        return type(self)(urls, self.timeout_s, self.pause, self._api_key)

    def submit(self, url: str, path: str, payload: dict, timeout_s: float | None = None) -> Future:
        """Send one call to one engine without waiting."""
        return self._threads.submit(post_json, url, path, payload, timeout_s or self.timeout_s, self._api_key)

    def post(self, path: str, payload: dict, timeout_s: float | None = None) -> list[Future]:
        """Send to all without waiting; pass the result to `wait`."""
        return [self.submit(url, path, payload, timeout_s) for url in self.urls]

    def wait(self, futures: list[Future]) -> list[dict]:
        """The answers, in the order of `futures`."""
        errors = [error for future in futures if (error := future.exception()) is not None]
        lost = {e.url: str(e) for e in errors if isinstance(e, EngineRequestError) and e.status is None}
        if lost:
            raise EnginesLostError(lost)
        if errors:
            raise WeightSyncError(f"weight sync failed: {errors[0]}") from errors[0]
        return [future.result() for future in futures]

    def call(self, path: str, payload: dict, timeout_s: float | None = None) -> list[dict]:
        """Send to all and wait; `timeout_s` replaces the usual limit."""
        return self.wait(self.post(path, payload, timeout_s))

    def close(self) -> None:
        """End the threads. Calls that run are not waited for."""
        self._threads.shutdown(wait=False)

    def stop_generation(self) -> None:
        """Pause running requests until `go_on`."""
        if self.pause is not None:
            self.call("/pause_generation", {"mode": self.pause})

    def go_on(self) -> None:
        if self.pause is not None:
            self.call("/continue_generation", {})

    def begin(self, in_session: bool = True) -> None:
        """Open the engines for new weights. A checkpoint that they read themselves needs no session."""
        self.stop_generation()
        if in_session:
            self.call("/begin_weight_update", {})

    def finish(self, policy_version: int, in_session: bool = True) -> None:
        """Close the engines' update, check that each now serves `policy_version`, and let requests go on."""
        if in_session:
            self.call("/end_weight_update", {})
        for url, answer in zip(self.urls, self.infos(), strict=True):
            found = answer.get("weight_version")
            if found != str(policy_version):
                raise WeightSyncError(
                    f"engine {url} serves weight version {found} after the sync of version {policy_version}"
                )
        self.go_on()

    def infos(self) -> list[dict]:
        """What each engine says of its model."""
        return self.wait([
            self._threads.submit(get_json, url, "/model_info", self.timeout_s, self._api_key)
            for url in self.urls
        ])  # fmt: skip

    def settle(self, path: str, payload: dict) -> None:
        """A call that engines may refuse because there is nothing to do. All must answer."""
        try:
            self.call(path, payload, RECOVERY_TIMEOUT_S)
        except EnginesLostError:
            raise
        except WeightSyncError:
            pass
