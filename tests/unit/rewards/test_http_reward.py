"""--reward-function http://...: a real server that answers well, badly, late or not at all."""

import socket
import time

import pytest

from megatron_vespo.rewards.loading import load_reward_function, load_rewards, reward_remarks
from megatron_vespo.rewards.math import math_reward
from megatron_vespo.rewards.pool import RewardItem, RewardPool, RewardResult
from tests.support.reward_endpoint import reward_endpoint


@pytest.fixture(scope="module")
def endpoint():
    with reward_endpoint() as started:
        yield started


@pytest.fixture(scope="module")
def score(endpoint):
    """Scores responses within 2 s each."""
    pool = RewardPool(load_reward_function(endpoint.url), num_workers=1, timeout_s=2.0)

    def score(*responses: str) -> list[RewardResult]:
        return pool.score([item(response) for response in responses])

    score("start")
    yield score
    pool.close()


def item(response: str, **metadata) -> RewardItem:
    return RewardItem(response, "0.25", metadata, True)


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


GOOD = RewardResult(0.25, "ok", "", {"form": 0.5})


def test_the_endpoint_gets_response_answer_and_metadata(endpoint):
    pool = RewardPool(load_reward_function(endpoint.url), num_workers=1, timeout_s=5.0)
    metadata = {"turns": [{"writer": "policy", "text": "é"}], "level": 3}
    assert pool.score([item("é 1", **metadata)]) == [GOOD]
    assert endpoint.requests[-1] == {"response": "é 1", "answer": "0.25", "metadata": metadata}
    unsendable = pool.score([item("x", date={1})])
    assert unsendable == [
        RewardResult(0.0, "error", "TypeError: Object of type set is not JSON serializable")
    ]
    pool.close()


@pytest.mark.parametrize("statuses", ["503", "429 500 502", "0", "0 0 504"])
def test_what_passes_is_tried_again(endpoint, score, statuses):
    response = f"flaky {statuses}"
    assert score(response) == [GOOD]
    assert endpoint.tries[response] == len(statuses.split()) + 1


@pytest.mark.parametrize(
    ("response", "detail"),
    [
        ("status 400", 'URL answered 400: {"error": "as you wished"}'),
        ("status 404", 'URL answered 404: {"error": "as you wished"}'),
        ("status 302", 'URL answered 302: {"error": "as you wished"}'),
        ("say {", 'URL answered no object like {"reward": 1.0}: {'),
        ("say ", 'URL answered no object like {"reward": 1.0}: an empty body'),
        ("say 0.5", 'URL answered no object like {"reward": 1.0}: 0.5'),
        ('say {"score": 1}', "the reward function returned a dict with 'score', but without 'reward'"),
        ('say {"reward": "1"}', "the reward function returned a str as 'reward', not a number"),
        ('say {"reward": NaN}', "the reward function returned nan as 'reward'"),
        ("say " + "x" * 9999, 'URL answered no object like {"reward": 1.0}: ' + "x" * 150),
    ],
)
def test_what_stays_wrong_is_an_error_at_once(endpoint, score, response, detail):
    began = time.monotonic()
    (result,) = score(response)
    told = detail.replace("URL", f"EndpointError: {endpoint.url}")
    assert result == RewardResult(0.0, "error", told)
    assert endpoint.tries[response] == 1
    assert time.monotonic() - began < 1.0


def test_an_endpoint_that_stays_busy_or_hangs_meets_the_deadline(endpoint, score):
    busy, hanging, good = score("status 503", "wait 60", "good")
    late = "no reward within 2 s"
    said = f'{endpoint.url} answered 503: {{"error": "as you wished"}}'
    assert busy == RewardResult(0.0, "timeout", f"{late}: {said}")
    assert hanging == RewardResult(0.0, "timeout", late)
    assert good == GOOD
    assert 4 <= endpoint.tries["status 503"] <= 10  # pauses of 0.05 to 0.1 s, doubled each time


def test_slow_answers_overlap_over_kept_connections(endpoint, score):
    before, hanging = endpoint.connections, endpoint.in_work
    endpoint.most_in_work = 0
    began = time.monotonic()
    for _ in range(2):
        assert score(*["wait 0.3"] * 128) == [GOOD] * 128
    assert time.monotonic() - began < 6.0  # one after the other: 77 s
    assert 32 <= endpoint.most_in_work - hanging <= 64
    assert endpoint.connections - before <= 64


def test_an_endpoint_that_starts_later_is_found(endpoint):
    port = free_port()
    function = load_reward_function(f"http://127.0.0.1:{port}")
    (remark,) = reward_remarks(function)
    assert f"--reward-function http://127.0.0.1:{port} cannot be reached now (" in remark
    assert reward_remarks(load_reward_function(endpoint.url)) == []
    pool = RewardPool(function, num_workers=1, timeout_s=2.0)
    (result,) = pool.score([item("x")])
    assert result.status == "timeout"
    assert result.detail.startswith(f"no reward within 2 s: http://127.0.0.1:{port}: Cannot connect to host")
    pool.close()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://", "write http://HOST:PORT/PATH, or https://"),
        ("http:/localhost/x", "write http://HOST:PORT/PATH, or https://"),
        ("http://[::1", "write http://HOST:PORT/PATH, or https://"),
        ("https://host:70000/x", "write http://HOST:PORT/PATH, or https://"),
        ("http://name:secret@host/x", "its URL holds a password, which logs would show; leave it out"),
    ],
)
def test_wrong_urls_are_refused(url, message):
    with pytest.raises(ValueError) as refused:
        load_reward_function(url)
    assert str(refused.value).endswith(message)
    assert "secret" not in str(refused.value)


def test_where_the_environment_rewards_there_is_no_function():
    assert load_rewards("environment") is None
    assert load_rewards("math") is math_reward
    assert reward_remarks(None) == reward_remarks(math_reward) == []
