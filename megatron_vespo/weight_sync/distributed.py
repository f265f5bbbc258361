"""Broadcasts from one trainer rank to all engines (NCCL between GPUs, gloo without), steered over HTTP.

Every pipeline stage has one sender and one process group: the sender is rank 0, the engines' ranks follow.
SGLang joins on /init_weights_update_group, receives one flattened bucket a /update_weights_from_distributed
call, and only loads weights between /begin_weight_update and /end_weight_update.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Backend, PrefixStore, _new_process_group_helper, _world

from megatron_vespo.http import get_json, post_json

# SGLang's words: running requests keep their keys and values, or compute them anew with the new weights
PauseMode = Literal["in_place", "retract"]


class WeightSyncError(RuntimeError):
    """Engines that did not take the weights; says which."""


class EngineControl:
    """The same call to all engines at once; the first failure is raised after all have answered."""

    def __init__(self, urls: Sequence[str], timeout_s: float, pause: PauseMode | None = None):
        """`pause` is what becomes of requests that run during an update; without it there must be none."""
        self.urls, self.timeout_s, self.pause = list(urls), timeout_s, pause
        self._threads = ThreadPoolExecutor(max_workers=len(self.urls), thread_name_prefix="weight-sync")

    def submit(self, function, *arguments) -> Future:
        return self._threads.submit(function, *arguments)

    def post(self, path: str, payload: dict) -> list[Future]:
        """Send without waiting; pass the result to `wait`."""
        return [self.submit(post_json, url, path, payload, self.timeout_s) for url in self.urls]

    def wait(self, futures: list[Future]) -> list[dict]:
        """The engines' answers, in their order."""
        errors = [future.exception() for future in futures]
        for error in errors:
            if error is not None:
                raise WeightSyncError(f"weight sync failed: {error}") from error
        return [future.result() for future in futures]

    def call(self, path: str, payload: dict) -> list[dict]:
        return self.wait(self.post(path, payload))

    def stop_generation(self) -> None:
        """Running requests wait until `go_on`."""
        if self.pause is not None:
            self.call("/pause_generation", {"mode": self.pause})

    def go_on(self) -> None:
        if self.pause is not None:
            self.call("/continue_generation", {})

    def clear_up(self, group_names: Sequence[str]) -> None:
        """End what a trainer that has died was doing; refusals only say that it was not doing it."""
        steps = [("/destroy_weights_update_group", {"group_name": name}) for name in group_names]
        steps += [("/end_weight_update", {}), ("/continue_generation", {})]
        steps += [("/abort_request", {"abort_all": True})]
        for path, payload in steps:
            for future in self.post(path, payload):
                future.exception()

    def begin(self) -> None:
        """Open the engines for new weights."""
        self.stop_generation()
        self.call("/begin_weight_update", {})

    def finish(self, version: int) -> None:
        """Close the engines' update, check that each now serves policy `version`, and let requests go on."""
        self.call("/end_weight_update", {})
        for url in self.urls:
            served = get_json(url, "/model_info", self.timeout_s).get("weight_version")
            if served != str(version):
                raise WeightSyncError(
                    f"engine {url} serves weight version {served} after the sync of version {version}"
                )
        self.go_on()


def group_name(connection: int, stage: int) -> str:
    """Of a pipeline stage's broadcast group; connections that follow each other have names of their own."""
    return f"megatron_vespo_{connection}_stage_{stage}"


class BucketSender:
    """One pipeline stage's end of the broadcast group; lives on the rank that sends."""

    def __init__(
        self,
        control: EngineControl,
        engine_size: int,
        stage: int,
        host: str,
        device: torch.device,
        connection: int = 0,
    ):
        """`engine_size` is the ranks of one engine; all engines are alike. Blocks until all have joined."""
        self.control, self.device = control, device
        self.name = group_name(connection, stage)
        backend = "nccl" if device.type == "cuda" else "gloo"
        world_size = 1 + engine_size * len(control.urls)
        timeout = timedelta(seconds=control.timeout_s)
        # port 0: the store takes a free one and keeps it, no other process can come between
        store = dist.TCPStore(host, 0, world_size, is_master=True, timeout=timeout, wait_for_workers=False)
        joins = [
            control.submit(
                post_json,
                url,
                "/init_weights_update_group",
                {
                    "master_address": host,
                    "master_port": store.port,
                    "rank_offset": 1 + number * engine_size,
                    "world_size": world_size,
                    "group_name": self.name,
                    "backend": backend,
                },
                control.timeout_s,
            )
            for number, url in enumerate(control.urls)
        ]
        self.group = _join_as_rank_zero(backend, store, world_size, self.name, timeout)
        control.wait(joins)

    def send(self, bucket: dict[str, Tensor], version: int | None) -> None:
        """Broadcast one bucket. `version` on the last one: engines label tokens with it from there on."""
        # SGLang reads the flat bytes back in this order and wants every tensor aligned to its element size
        ordered = sorted(bucket.items(), key=lambda item: -item[1].element_size())
        payload = {
            "names": [name for name, _ in ordered],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in ordered],
            "shapes": [list(tensor.shape) for _, tensor in ordered],
            "group_name": self.name,
            "load_format": "flattened_bucket",
            # what requests paused in place have in the cache is theirs; it cannot be flushed
            "flush_cache": version is not None and self.control.pause != "in_place",
        }
        if version is not None:
            payload["weight_version"] = str(version)
        receiving = self.control.post("/update_weights_from_distributed", payload)
        flat = torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for _, tensor in ordered])
        try:
            dist.broadcast(flat, src=0, group=self.group)
        except RuntimeError as error:
            # an engine's own words say more than a broken connection
            self.control.wait([future for future in receiving if future.done()])
            raise WeightSyncError(f"broadcast to {', '.join(self.control.urls)} failed: {error}") from error
        self.control.wait(receiving)


def _join_as_rank_zero(
    backend: str, store: dist.Store, world_size: int, name: str, timeout: timedelta
) -> dist.ProcessGroup:
    """A process group with processes outside this trainer's world; torch offers it only by its internals."""
    group, _ = _new_process_group_helper(
        world_size, 0, [], Backend(backend), PrefixStore(name, store), group_name=name, timeout=timeout
    )
    _world.pg_group_ranks[group] = {rank: rank for rank in range(world_size)}
    return group
