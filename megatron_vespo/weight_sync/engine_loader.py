"""Runs in every process of an SGLang engine, which calls `load` by --custom-weight-loader.

The engine is the installed one, unpatched. An exception here would end its process, so failures are reported
to the trainer.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from threading import Thread
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from megatron_vespo.weight_sync.disk_receiver import DiskConnection
from megatron_vespo.weight_sync.messages import (
    DiskHello,
    DiskLoad,
    DiskPlan,
    Hello,
    Introduction,
    Join,
    Load,
    unpack,
)
from megatron_vespo.weight_sync.outside_group import client_store, join_group, meet
from megatron_vespo.weight_sync.places import place_of
from megatron_vespo.weight_sync.receiver import Receiver
from megatron_vespo.weight_sync.reports import (
    report_failure,
    report_place,
    report_staged,
    wait_for_announcement,
)


class _Connection:
    """With one trainer, from its first message on."""

    def __init__(self, hello: Hello, device: torch.device):
        self._hello, self._device = hello, device
        self._receiver: Receiver | None = None
        self._store = client_store(hello.host, hello.port, hello.timeout_s)
        report_place(self._store, hello.slot, place_of(device))

    def take(self, message: Introduction | Join | Load, model: nn.Module) -> None:
        try:
            self._take(message, model)
        except Exception as error:  # whatever it is, the trainer says it
            traceback.print_exc()
            report_failure(self._store, self._hello.slot, f"{type(error).__name__}: {error}")

    def _take(self, message: Introduction | Join | Load, model: nn.Module) -> None:
        if isinstance(message, Introduction):
            self._receiver = Receiver(message, self._device)
            self._receiver.check(model)
            return
        assert self._receiver is not None
        if isinstance(message, Join):
            if message.rank is None:
                return
            group = join_group(
                message.backend, self._store, message.rank, message.world_size, message.name,
                self._hello.timeout_s,
            )  # fmt: skip
            meet(group, self._device)
            self._receiver.join(group)
            if message.staging:
                Thread(target=self._stage, args=(self._receiver,), daemon=True).start()
        else:
            self._receiver.load(model, message.start, message.stop, message.staged)

    def _stage(self, receiver: Receiver) -> None:
        """Receive what is announced, sync by sync, until the trainer is gone."""
        hello = self._hello
        # a client of its own: one that waits blocks all others that use it
        store = client_store(hello.host, hello.port, hello.timeout_s)
        number = 1
        while True:
            try:
                wait_for_announcement(store, number)
            except RuntimeError:
                return
            try:
                receiver.stage()
                report_staged(store, number, hello.slot)
            except Exception as error:
                traceback.print_exc()
                report_failure(store, hello.slot, f"{type(error).__name__}: {error}")
                return
            number += 1

    def close(self) -> None:
        if self._receiver is not None:
            self._receiver.close()


_connections: WeakKeyDictionary[nn.Module, _Connection | DiskConnection] = WeakKeyDictionary()


def load(model: nn.Module, named_tensors: Sequence[tuple[str, Tensor]]) -> None:
    """What SGLang calls with the message of its rank; see `messages`."""
    [(text, _)] = named_tensors
    message = unpack(text)
    if isinstance(message, Hello | DiskHello):
        _say_hello(message, model)
        return
    connection = _connections.get(model)
    if isinstance(connection, DiskConnection) and isinstance(message, DiskPlan | DiskLoad):
        connection.take(message, model)
    elif isinstance(connection, _Connection) and isinstance(message, Introduction | Join | Load):
        connection.take(message, model)
    else:  # there is nobody to tell; the engine ends, and the trainer finds it lost
        raise RuntimeError(f"{type(message).__name__} before a hello of the same kind")


def _say_hello(hello: Hello | DiskHello, model: nn.Module) -> None:
    """A trainer that cannot be reached finds that this rank has not reported its place, or not answered."""
    old = _connections.pop(model, None)
    try:
        if old is not None:
            old.close()
        device = next(model.parameters()).device
        is_disk = isinstance(hello, DiskHello)
        _connections[model] = DiskConnection(hello, device) if is_disk else _Connection(hello, device)
    except Exception:
        traceback.print_exc()
