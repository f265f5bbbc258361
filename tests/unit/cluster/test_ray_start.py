"""How Ray is started: nothing of it is open to others."""

import os
import socket

import pytest

from megatron_vespo.cluster import placement
from megatron_vespo.system import ray_variables


@pytest.fixture
def started(monkeypatch):
    """`started(address)`: the options of ray.init, with the token that it found."""
    for name in ("RAY_ADDRESS", "RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        # so that what the code sets is taken back
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)

    def start(address: str | None, port: int = 0) -> dict:
        options: dict = {}
        token = "RAY_AUTH_TOKEN"
        monkeypatch.setattr(placement.ray, "init", lambda **o: options.update(o, token=os.environ.get(token)))
        placement.start_ray(address, 3, range(port, port + 2) if port else ())
        return options

    return start


def test_its_own_ray_has_a_token_of_the_run_and_no_dashboard(started):
    options = started(None)
    assert len(options["token"]) == 64 and options["include_dashboard"] is False


def test_it_joins_no_ray_that_somebody_else_runs_here(started):
    """`ray start` leaves its address in /tmp for all, where ray.init looks."""
    assert started(None)["address"] == "local"
    assert started("auto")["address"] == "auto"


def test_two_runs_have_two_tokens(started, monkeypatch):
    first = started(None)["token"]
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    assert started(None)["token"] != first


def test_a_token_of_the_user_counts(started, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/a/file")
    assert started(None)["token"] is None
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "mine")
    assert started(None)["token"] == "mine"


def test_a_cluster_that_is_joined_has_its_own(started):
    assert started("auto")["token"] is None


def test_an_address_in_the_environment_is_neither_joined_nor_passed_over(started, monkeypatch):
    """Ray would take it for what is to be joined, and say that num_cpus must not be given."""
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(ValueError) as error:
        started(None)
    assert str(error.value) == (
        "RAY_ADDRESS=10.0.0.1:6379 is set and --ray-address is not given: --ray-address auto joins that "
        "cluster; unset RAY_ADDRESS to start a Ray on this machine"
    )
    assert started("auto")["address"] == "auto"
    monkeypatch.setenv("RAY_ADDRESS", "")
    assert started(None)["address"] == "local"


LONG = "/tmp/" + "t" * 40


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"TMPDIR": LONG}, "TMPDIR"),
        ({"RAY_TMPDIR": LONG}, "RAY_TMPDIR"),
        ({"RAY_TMPDIR": LONG, "TMPDIR": "/tmp"}, "RAY_TMPDIR"),
        ({"RAY_TMPDIR": "/tmp", "TMPDIR": LONG}, None),
        ({"RAY_TMPDIR": "/tmp", "TMPDIR": LONG * 2}, "TMPDIR"),
        ({"TMPDIR": "/scratch/users/somebody"}, None),
    ],
)
def test_a_folder_with_too_long_a_name_for_sockets(started, monkeypatch, variables, named):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if named is None:
        assert started(None)
        return
    said = f"^{named} has {len(variables[named])} bytes: .* export {named} with at most"
    with pytest.raises(ValueError, match=said):
        started(None)
    assert started("auto"), "its processes run elsewhere"


def test_where_a_socket_of_ray_just_fits():
    """As Ray counts: 107 bytes."""
    most = 107 - len(f"/ray/session_2026-01-31_23-59-59_123456_{os.getpid()}/sockets/plasma_store")
    assert ray_variables.problem({"TMPDIR": "/" + "x" * (most - 1)}) is None
    assert ray_variables.problem({"TMPDIR": "/" + "x" * most}) is not None


def test_a_port_that_is_in_use_is_said_before_anything_starts(started):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for first in (port, port - 1):  # of the first engine, or of the second
            with pytest.raises(ValueError, match=f":{port} .*choose another port with --rollout-port$"):
                started(None, first)
