"""The environment of a real trainer rank and of a real engine's processes against the table of both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vespo.rollout.server_arguments import server_arguments
from megatron_vespo.rollout.sglang_server import SGLangServer
from megatron_vespo.system.process_environment import CONNECTIONS, PAUSED_GRAPHS, TABLE

PROGRAMS = Path(__file__).parent / "programs"


def run(program: str, *arguments: str, text: str = "", **variables: str) -> object:
    """What it has printed last."""
    clean = {name: value for name, value in os.environ.items() if name not in TABLE}
    done = subprocess.run(
        [sys.executable, str(PROGRAMS / program), *arguments],
        input=text, capture_output=True, text=True, timeout=280, env=clean | variables,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def small_run(tiny_model, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("environments")
    prompts = folder / "prompts.jsonl"
    prompts.write_text('{"prompt": "1 + 1 =", "answer": "2"}\n')
    return run(
        "process_environments.py",
        *("--hf-checkpoint", str(tiny_model), "--prompt-data", str(prompts), "--output-dir", str(folder)),
        *("--trainer-ranks 1 --train-iters 1 --steps-per-rollout 1 --rollout-batch-size 4 --group-size 4 "
          "--lr 1e-4 --max-prompt-tokens 64 --max-completion-tokens 32 --max-tokens-per-gpu 256 "
          "--sglang-max-total-tokens 4096 --sglang-context-length 1024").split(),
        PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True,max_split_size_mb:64",
        SPT_NOENV="1",  # else SGLang's titles overwrite what /proc has of the environment
    )  # fmt: skip


def expected(small_run: dict, role: str) -> dict[str, str]:
    values = {name: getattr(row, role) for name, row in TABLE.items()} | small_run["exported"]
    return {name: value for name, value in values.items() if value is not None}


@pytest.mark.timeout(300)
def test_a_trainer_rank_has_what_the_table_says(small_run):
    trainer = small_run["trainer"]
    print(json.dumps(small_run, indent=1))
    assert trainer["environment"] == expected(small_run, "trainer")
    assert trainer["allocator"] == "expandable_segments:True,max_split_size_mb:64"  # torch has read it
    assert trainer["threads"] == int(trainer["environment"]["OMP_NUM_THREADS"])


@pytest.mark.timeout(300)
def test_an_engines_processes_have_what_the_table_says(small_run):
    server, started = small_run["engine"]["server"], small_run["engine"]["started by it"]
    assert server == expected(small_run, "engine")
    scheduler_and_detokenizer = [server | {CONNECTIONS: "8"}] * 2  # SGLang's own
    assert started == scheduler_and_detokenizer


def colocated(*sglang_flags: str, **exported: str) -> dict:
    """What an engine that gives its memory back is started with."""
    arguments = server_arguments(
        list(sglang_flags),
        device="cuda",
        routes=False,
        longest_step_s=300.0,
        dtype="bfloat16",
        seed=1,
        memory_saver=True,
    )
    engine = SGLangServer("m", "127.0.0.1", 1, arguments, Path("log"), 1.0, exported=exported)
    own = engine._environment()
    return {"arguments": arguments, "variables": {name: own[name] for name in TABLE if name in own}}


@pytest.mark.timeout(120)
def test_sglang_can_give_back_the_memory_of_cuda_graphs(tiny_model):
    """But of breakable ones, which it does not start with where it was told to."""
    prefill = "--cuda-graph-backend-prefill"
    servers = [
        colocated(),
        colocated(prefill, "full"),
        colocated(prefill, "breakable"),
        colocated("--cuda-graph-config", '{"prefill": {"backend": "breakable"}}'),
        colocated(prefill, "breakable", **{PAUSED_GRAPHS: "1"}),
    ]
    for server in servers:
        server["arguments"] += ["--model-path", str(tiny_model)]
    found = run("graph_backends.py", text=json.dumps(servers))
    kept = {"decode": ["FullCudaGraphBackend", False], "prefill": ["BreakableCudaGraphBackend", False]}
    full = ["FullCudaGraphBackend", True]
    assert found[:4] == [{"decode": full, "prefill": None}, {"decode": full, "prefill": full}, kept, kept]
    assert "not compatible with memory saver" in found[4]
