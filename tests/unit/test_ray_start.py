"""How Ray is started: nothing of it is open to others."""

import os
from argparse import Namespace

import pytest

from megatron_vespo.cluster import placement


@pytest.fixture
def started(monkeypatch):
    """`started(address)`: the options of ray.init, with the token that it found."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        # so that what the code sets is taken back
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)

    def start(address: str | None) -> dict:
        options: dict = {}
        token = "RAY_AUTH_TOKEN"
        monkeypatch.setattr(placement.ray, "init", lambda **o: options.update(o, token=os.environ.get(token)))
        placement.start_ray(Namespace(ray_address=address, trainer_ranks=1, rollout_engines=1))
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
