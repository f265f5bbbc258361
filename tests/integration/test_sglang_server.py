"""SGLang against HF transformers, and engines that fail, die or lose their parent."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import aiohttp
import numpy as np
import pytest
import torch

from megatron_vespo.rollout.collector import Collector
from megatron_vespo.rollout.engine_client import generate_payload
from megatron_vespo.rollout.router import CollectError
from megatron_vespo.rollout.sglang_server import EngineError, SGLangServer, group_members
from megatron_vespo.system.http import EngineRequestError, get_json, post_json
from megatron_vespo.system.ports import find_free_port
from megatron_vespo.types import SamplingParams
from tests.support.references import completion_log_probs
from tests.support.servers import HOST, NUM_LAYERS, ROUTES, TOPK, VOCAB_SIZE, tiny_engine

STOP_TOKEN = 1


def collector_of(engine: SGLangServer, timeout_s: float = 60.0) -> Collector:
    return Collector([engine.url], routes=ROUTES, request_timeout_s=timeout_s, check=engine.check)


def sampling(max_new_tokens: int, temperature: float = 1.0, stop=(STOP_TOKEN,)) -> SamplingParams:
    return SamplingParams(temperature=temperature, max_new_tokens=max_new_tokens, stop_token_ids=stop)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_completions_against_transformers(engine, reference, prompts, temperature):
    """Log-probs are those after temperature; routed experts those of every token that entered the model."""
    progress = []
    groups = collector_of(engine).collect(
        prompts,
        sampling(24, temperature),
        num_completions=4,
        seed=0,
        on_progress=lambda done, total: progress.append((done, total)),
    )
    assert progress == [(done, 20) for done in range(1, 21)]
    assert [[completion.prompt.prompt_id for completion in group] for group in groups] == [
        [i] * 4 for i in range(5)
    ]
    for completion in (completion for group in groups for completion in group):
        tokens = np.concatenate([completion.prompt.token_ids, completion.token_ids])
        with torch.no_grad():
            output = reference(torch.from_numpy(tokens).long()[None], output_router_logits=True)
        expected = completion_log_probs(reference, completion, temperature)
        assert np.abs(completion.log_probs - expected).max() <= 1e-4
        for layer in range(NUM_LAYERS):
            chosen = output.router_logits[layer].view(len(tokens), -1).topk(TOPK).indices[:-1]
            assert np.array_equal(np.sort(completion.routed_experts[:, layer]), np.sort(chosen.numpy()))
        ended = completion.token_ids[-1] == STOP_TOKEN
        assert completion.finish_reason == ("stop" if ended else "length")
        assert len(completion.token_ids) == 24 or ended
    if temperature != 1.0:
        untempered = completion_log_probs(reference, completion)
        assert np.abs(completion.log_probs - untempered).max() > 1e-2  # the comparison can tell


def test_bytes_of_a_reply_without_routes(engine, prompts):
    """Of a real one, per token; a large vocabulary's ids have three digits more, twice, than these."""

    async def size(routes: bool, length: int) -> int:
        body = generate_payload(prompts[1], sampling(length), None, routes_start=0 if routes else None)
        body["sampling_params"]["ignore_eos"] = True
        async with aiohttp.ClientSession() as session:
            async with session.post(engine.url + "/generate", json=body) as response:
                return len(await response.read())

    plain = (asyncio.run(size(False, 900)) - asyncio.run(size(False, 100))) / 800
    routed = (asyncio.run(size(True, 900)) - asyncio.run(size(True, 100))) / 800
    print(f"{plain:.1f} bytes per token, {routed:.1f} with routes")
    assert 4096 * (plain + 2 * 3) <= 200_000
    assert routed - plain == pytest.approx(NUM_LAYERS * TOPK * 4 * 4 / 3, rel=0.1)  # int32 in base64


def test_custom_stop_token(engine, prompts):
    everything = tuple(range(VOCAB_SIZE))
    [[completion]] = collector_of(engine).collect(
        prompts[:1], sampling(24, stop=everything), num_completions=1, seed=0
    )
    assert (len(completion.token_ids), completion.finish_reason) == (1, "stop")


def test_policy_versions_across_an_update(engine, prompts):
    collector = collector_of(engine)
    [[before]] = collector.collect(prompts[:1], sampling(4), num_completions=1, seed=0)
    assert before.policy_versions.are_all(0)
    one_done = threading.Event()  # the other fifteen are under way
    result: list = []

    def collect() -> None:
        result.extend(
            collector.collect(
                prompts[2:4],
                sampling(900),
                num_completions=8,
                seed=0,
                on_progress=lambda done, total: one_done.set(),
            )
        )

    thread = threading.Thread(target=collect)
    thread.start()
    assert one_done.wait(60)
    post_json(engine.url, "/update_weight_version", {"new_version": "5"}, timeout_s=30)
    thread.join(120)
    completions = [completion for group in result for completion in group]
    assert len(completions) == 16
    assert all((np.diff(completion.policy_versions.array()) >= 0).all() for completion in completions)
    assert any(completion.policy_versions.versions == (0, 5) for completion in completions)
    post_json(engine.url, "/update_weight_version", {"new_version": "0"}, timeout_s=30)


def test_refused_requests_are_named(engine, prompts):
    with pytest.raises(
        EngineRequestError, match=r"^engine http://\S+: /generate answered 400: prompt 4: .*1024"
    ):
        collector_of(engine).collect(prompts[4:], sampling(5000), num_completions=1, seed=0)
    with pytest.raises(EngineRequestError, match=r"^engine http://\S+: /nowhere answered 404: "):
        post_json(engine.url, "/nowhere", {}, timeout_s=30)
    with pytest.raises(
        EngineRequestError, match=r"^engine http://\S+: /update_weights_from_disk answered 400: "
    ):
        post_json(engine.url, "/update_weights_from_disk", {"model_path": "/nowhere"}, timeout_s=60)
    assert get_json(engine.url, "/model_info", timeout_s=30)["weight_version"] == "0"


def test_deadline_names_the_engine(engine, prompts):
    collector = collector_of(engine, timeout_s=0.05)
    began = time.monotonic()
    with pytest.raises(
        CollectError, match=rf"^engine {engine.url}: no completion of prompt 2 within 0.05 s$"
    ):
        collector.collect(prompts[2:3], sampling(900), num_completions=100, seed=0)
    assert time.monotonic() - began < 10


def test_busy_port(tiny_model, tmp_path):
    with socket.socket() as holder:
        holder.bind((HOST, find_free_port(HOST)))
        holder.listen()
        port = holder.getsockname()[1]
        engine = SGLangServer(str(tiny_model), HOST, port, [], tmp_path / "log", 10.0)
        with pytest.raises(
            EngineError,
            match=rf"cannot listen on {HOST}:{port} \(.*in use\); choose another port with --rollout-port",
        ):
            engine.start()


def test_start_failure_shows_the_end_of_the_log(tmp_path):
    engine = tiny_engine(tmp_path / "missing", tmp_path / "log")
    with pytest.raises(EngineError) as failure:
        engine.start()
    lines = str(failure.value).splitlines()
    assert lines[0] == f"engine {engine.url} died (exit status 1); the end of {tmp_path / 'log'}:"
    assert 1 < len(lines) <= 16 and str(tmp_path / "missing") in str(failure.value)


def test_start_deadline(tiny_model, tmp_path):
    engine = tiny_engine(tiny_model, tmp_path / "log")
    engine.start_timeout_s = 1.0
    with pytest.raises(
        EngineError, match=rf"^engine {engine.url} is not healthy 1 s after its start; /health .+; the end"
    ):
        engine.start()


def test_failed_plugin_is_an_error(tiny_model, tmp_path, sglang_plugin):
    """SGLang itself only logs it."""
    sglang_plugin("no_such_module")
    engine = tiny_engine(tiny_model, tmp_path / "log")
    with pytest.raises(
        EngineError, match=rf"^engine {engine.url}: SGLang plugin no_such_module failed; see .*log$"
    ):
        engine.start()


PARENT = """
import sys
from pathlib import Path
from tests.support.servers import tiny_engine
from megatron_vespo.system.plugins import load_runtime_plugins
load_runtime_plugins()
tiny_engine(Path(sys.argv[1]), Path(sys.argv[2])).start()
"""


def server_group(parent_pid: int) -> int | None:
    """The process group of the only child of `parent_pid` that leads one."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            _, parent, group = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(parent) == parent_pid and group == stat.parent.name:
            return int(group)
    return None


def wait_for(condition, timeout_s: float, what: str):
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"no {what} within {timeout_s:g} s"
        time.sleep(0.2)
    return value


def test_killed_parent_leaves_nothing(tiny_model, tmp_path):
    """SIGKILL while SGLang's own children are starting, when they do not yet watch their parent."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tiny_model), str(tmp_path / "log")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        group = wait_for(lambda: server_group(parent.pid), 60, "server process")
        wait_for(lambda: len(group_members(group)) >= 4, 200, "scheduler and detokenizer")
    finally:
        parent.kill()
        parent.wait(30)
    wait_for(lambda: not group_members(group), 20, "end of the server's processes")


def test_death_while_collecting(tiny_model, tmp_path, prompts):
    """A killed scheduler: SGLang's front end lives on for seconds, and the requests' deadline is far away."""
    with tiny_engine(tiny_model, tmp_path / "log") as engine:
        group = engine.pid
        [scheduler] = [
            pid for pid in group_members(group) if "scheduler" in Path(f"/proc/{pid}/cmdline").read_text()
        ]
        threading.Timer(1.0, os.kill, (scheduler, signal.SIGKILL)).start()
        began = time.monotonic()
        with pytest.raises(
            EngineError, match=rf"^engine {engine.url} died \(signal SIGKILL\); the end of {tmp_path}/log:"
        ) as failure:
            collector_of(engine).collect(prompts, sampling(900), num_completions=200, seed=0)
        assert time.monotonic() - began < 30
        assert f"(pid={scheduler}) crashed" in str(failure.value)
    assert group_members(group) == []
