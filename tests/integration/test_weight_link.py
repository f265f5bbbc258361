"""Real engines that are lost while they are connected or get weights: they are named, the others go on."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from megatron_vespo.checkpoints.buckets import buckets
from megatron_vespo.rollout.collector import Collector
from megatron_vespo.rollout.sglang_server import SGLangServer
from megatron_vespo.types import SamplingParams
from megatron_vespo.weight_sync.broadcast import Broadcast
from megatron_vespo.weight_sync.engine_admin import EngineAdmin, EnginesLostError
from megatron_vespo.weight_sync.engine_layout import EngineLayout
from megatron_vespo.weight_sync.exact import Exact
from megatron_vespo.weight_sync.places import Place
from megatron_vespo.weight_sync.verify import Sums, check_engines_agree, weight_sums
from megatron_vespo.weight_sync.weight_link import WeightLink, Weights
from tests.support.builders import make_prompt
from tests.support.servers import HOST, ROUTES, make_tiny_model, two_engines
from tests.support.whole_model import exact_source, held_weights

TIMEOUT_S = 20.0
BUCKET_BYTES = 100_000


@pytest.fixture(scope="module")
def engines(tiny_model, tmp_path_factory) -> Iterator[tuple[SGLangServer, SGLangServer]]:
    with two_engines(tiny_model, tmp_path_factory.mktemp("link")) as both:
        yield both


@pytest.fixture(
    scope="module",
    params=[
        "memory",
        pytest.param("messages", marks=pytest.mark.slow),
        pytest.param("staged messages", marks=pytest.mark.slow),
        pytest.param("broadcast", marks=pytest.mark.slow),
    ],
)
def link(request, tiny_model, tmp_path_factory) -> Iterator[WeightLink]:
    """Of a trainer of one rank."""
    store = f"file://{tmp_path_factory.mktemp('store') / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    place = Place("elsewhere", "elsewhere") if "messages" in request.param else None
    source = exact_source(tiny_model, HOST, EngineLayout(1), BUCKET_BYTES, place)
    exact = Exact(replace(source, staging="staged" in request.param))
    yield WeightLink(
        rank=0,
        broadcast=Broadcast(0, 1, True, engine_size=1, host=HOST, backend="gloo"),
        exact="no plan" if request.param == "broadcast" else exact,
        timeout_s=TIMEOUT_S,
        pause="retract",
    )
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def policies(tmp_path_factory) -> list[Path]:
    return [make_tiny_model(tmp_path_factory.mktemp("policy"), seed=seed) for seed in (1, 2)]


@pytest.fixture
def weights(policies) -> list[Weights]:
    return [weights_of(folder, lambda number: None) for folder in policies]


def interrupted(folder: Path, link: WeightLink, action: Callable[[], object]) -> Weights:
    """`action` happens when a part of them is on the engines."""
    middle = 30 if exact(link) else 2  # pieces of 75, buckets of 7
    return weights_of(folder, lambda number: action() if number == middle else None)


def weights_of(folder: Path, read: Callable[[int], object]) -> Weights:
    """`read` is told how many buckets, or pieces, were read before."""
    held = held_weights(folder)

    def pieces() -> Iterator[dict[str, Tensor]]:
        tensors = load_file(folder / "model.safetensors")
        for number, piece in enumerate(buckets(tensors.items(), max_bytes=BUCKET_BYTES)):
            read(number)
            yield piece

    class Held(dict[str, Tensor]):
        number = 0

        def __getitem__(self, name: str) -> Tensor:
            read(self.number)
            self.number += 1
            return super().__getitem__(name)

    return Weights(pieces, lambda: Held(held))


def exact(link: WeightLink) -> bool:
    return link.why_broadcast is None


def sums(engine: SGLangServer) -> Sums:
    return weight_sums(EngineAdmin([engine.url], TIMEOUT_S))[0]


def restart(engine: SGLangServer) -> None:
    engine.stop(timeout_s=0)
    engine.start()


@pytest.mark.timeout(300)
def test_an_engine_that_is_dead_when_it_is_to_be_connected(engines, link, weights, monkeypatch):
    first, second = engines
    urls = [first.url, second.url]
    second.stop(timeout_s=0)
    opened = "/begin_weight_update" if exact(link) else "/init_weights_update_group"
    for number, called_first in ((1, "/pause_generation"), (2, opened)):
        if number == 2:  # as if it had died a moment later
            monkeypatch.setattr(WeightLink, "_leave", lambda self, number: None)
        began = time.monotonic()
        with pytest.raises(
            EnginesLostError, match=f"engine {second.url}: {called_first} did not answer"
        ) as error:
            link.connect(urls, urls, number)
        assert list(error.value.lost) == [second.url]
        assert time.monotonic() - began < TIMEOUT_S / 2
    monkeypatch.undo()
    link.connect([first.url], [first.url], 3)
    link.sync(weights[0], 1)
    second.start()
    link.connect(urls, [second.url], 4)
    before = sums(first)
    assert sums(second) != before, "its weights should be random"
    link.sync(weights[0], 2)
    assert check_engines_agree(link.admin, 2) == [before, before]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_an_engine_that_is_lost_in_a_sync(engines, link, weights, policies, how, request):
    first, second = engines
    urls, number = [first.url, second.url], 10 * how
    restart(second)
    link.connect(urls, [second.url], number)
    link.sync(weights[0], number)
    before = sums(first)
    collector = Collector([first.url], routes=ROUTES, request_timeout_s=120.0)
    sampling = SamplingParams(temperature=1.0, max_new_tokens=900, stop_token_ids=())
    with ThreadPoolExecutor() as threads:
        running = threads.submit(
            collector.collect, [make_prompt(0, [5, 7])], sampling, num_completions=64, seed=1
        )
        time.sleep(0.3)  # a few tokens of each
        with pytest.raises(EnginesLostError) as error:
            link.sync(interrupted(policies[1], link, lambda: os.killpg(second.pid, how)), number + 1)
        assert list(error.value.lost) == [second.url]
        link.connect([first.url], [], number + 1)
        link.sync(weights[1], number + 1)
        [group] = running.result()
    versions = [set(completion.policy_versions.versions) for completion in group]
    print(versions)
    # nothing was generated between the two, with a part of the weights
    assert all(seen <= {number, number + 1} for seen in versions)
    # engines generate while weights are staged: all may have ended before the hung one is noticed
    assert "staged" in request.node.callspec.params["link"] or any(len(seen) == 2 for seen in versions)
    restart(second)
    link.connect(urls, [second.url], number + 2)
    link.sync(weights[1], number + 2)
    after, same = check_engines_agree(link.admin, number + 2)
    assert after == same and after != before
