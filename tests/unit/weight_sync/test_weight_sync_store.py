"""Where trainer and engines meet for a weight sync: a free port, on one address."""

import socket
import time
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta

import psutil
import pytest
import torch.distributed as dist

from megatron_vespo.weight_sync.bucket_sender import _all_have_arrived
from megatron_vespo.weight_sync.outside_group import open_store

TIMEOUT_S = 20.0
TIMEOUT = timedelta(seconds=TIMEOUT_S)


def listening() -> set[tuple[str, int]]:
    return {tuple(c.laddr) for c in psutil.Process().net_connections("tcp") if c.status == "LISTEN"}


def test_it_listens_on_its_address_only_and_leaves_nothing():
    before = listening()
    store = open_store("127.0.0.1", TIMEOUT_S, 2)
    assert listening() - before == {("127.0.0.1", store.port)}
    other = dist.TCPStore("127.0.0.1", store.port, 2, is_master=False, timeout=TIMEOUT)
    other.set("a", "b")
    assert store.get("a") == b"b"
    del store, other
    assert listening() == before


def test_the_port_is_free_at_once_again():
    store = open_store("127.0.0.1", TIMEOUT_S, 2)
    port = store.port
    del store
    socket.create_server(("127.0.0.1", port)).close()


@pytest.mark.parametrize("fails", [False, True])
def test_a_rank_on_its_way_is_waited_for(fails):
    """Also where the other one has failed, or it would look for a store that has gone."""
    store, other, on_the_way = open_store("127.0.0.1", TIMEOUT_S, 3), Future(), Future()
    if fails:
        other.set_exception(RuntimeError("refused"))
    else:
        store.set("address/1", "here")
    with ThreadPoolExecutor(1) as thread:
        found = thread.submit(_all_have_arrived, store, 2, [other, on_the_way], 20.0)
        time.sleep(0.3)
        assert not found.done()
        store.set("address/2", "here")
        assert found.result(timeout=5) == (not fails)


def test_the_wait_for_ranks_has_a_deadline():
    assert not _all_have_arrived(open_store("127.0.0.1", TIMEOUT_S, 2), 1, [Future()], 0.2)
