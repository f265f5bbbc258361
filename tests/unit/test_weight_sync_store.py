"""Where trainer and engines meet for a weight sync: a free port, on one address."""

import socket
from datetime import timedelta

import psutil
import torch.distributed as dist

from megatron_vespo.weight_sync.distributed import _store

TIMEOUT = timedelta(seconds=20)


def listening() -> set[tuple[str, int]]:
    return {tuple(c.laddr) for c in psutil.Process().net_connections("tcp") if c.status == "LISTEN"}


def test_it_listens_on_its_address_only_and_leaves_nothing():
    before = listening()
    store = _store("127.0.0.1", 2, TIMEOUT)
    assert listening() - before == {("127.0.0.1", store.port)}
    other = dist.TCPStore("127.0.0.1", store.port, 2, is_master=False, timeout=TIMEOUT)
    other.set("a", "b")
    assert store.get("a") == b"b"
    del store, other
    assert listening() == before


def test_the_port_is_free_at_once_again():
    store = _store("127.0.0.1", 2, TIMEOUT)
    port = store.port
    del store
    socket.create_server(("127.0.0.1", port)).close()
