"""What trainer ranks and engines get in their environment, and what the loader makes of it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import requests
import torch

from megatron_vespo.cluster.trainer_worker import set_environment
from megatron_vespo.commands.doctor.processes import judge_variables
from megatron_vespo.rollout.server_arguments import server_arguments
from megatron_vespo.rollout.sglang_server import SGLangServer
from megatron_vespo.system.process_environment import (
    ALLOCATOR,
    ALLOCATOR_NEW,
    CONNECTIONS,
    CUMEM,
    LIBRARIES,
    PAUSED_GRAPHS,
    TABLE,
    THREADS,
    apply,
    cuda_libraries,
    engine_environment,
    exported_values,
    num_threads,
    reached_directly,
    trainer_environment,
    without_expandable_segments,
)
from tests.support.settings import flat_settings

# a node's Ray has all of it, and everything is wrong there
RAYLET = {name: "of the node" for name in TABLE} | {"PATH": "/bin", THREADS: "1"}


def test_without_exports_every_process_gets_the_table():
    trainer, engine = apply(trainer_environment({}), RAYLET), apply(engine_environment({}), RAYLET)
    assert trainer == {
        "PATH": "/bin", CUMEM: "0", CONNECTIONS: "1", THREADS: "1", ALLOCATOR: "expandable_segments:True",
    }  # fmt: skip
    assert engine == {"PATH": "/bin", CUMEM: "0"}


@pytest.mark.parametrize("memory_saver", [False, True])
@pytest.mark.parametrize("symmetric_memory", [False, True])
@pytest.mark.parametrize("user", [{}, {CUMEM: "1"}, {CUMEM: "0"}, {CUMEM: "-2"}])
def test_trainer_and_engines_always_agree_on_cumem(user, symmetric_memory, memory_saver):
    trainer = trainer_environment(user, symmetric_memory=symmetric_memory)
    engine = engine_environment(user, symmetric_memory=symmetric_memory, memory_saver=memory_saver)
    assert trainer[CUMEM] == engine[CUMEM] == ("1" if symmetric_memory else user.get(CUMEM, "0"))


def test_what_the_user_exports_counts_everywhere():
    user = exported_values({CONNECTIONS: "32", THREADS: "6", ALLOCATOR: "", "PATH": "/bin", LIBRARIES: "/l"})
    assert user == {CONNECTIONS: "32", THREADS: "6"}
    trainer, engine = trainer_environment(user, threads=12), engine_environment(user)
    assert trainer[CONNECTIONS] == engine[CONNECTIONS] == "32"
    assert trainer[THREADS] == engine[THREADS] == "6"
    assert LIBRARIES not in engine  # a node's own


def test_a_rank_with_the_optimizer_on_the_cpu_gets_threads():
    assert trainer_environment({}, threads=12)[THREADS] == "12"


@pytest.mark.parametrize(
    ("user", "trainer", "colocated"),
    [
        ({}, {ALLOCATOR: "expandable_segments:True"}, {}),
        ({ALLOCATOR: "max_split_size_mb:64"}, {ALLOCATOR: "max_split_size_mb:64"}, None),
        ({ALLOCATOR_NEW: "max_split_size_mb:64"}, {ALLOCATOR_NEW: "max_split_size_mb:64"}, None),
        ({ALLOCATOR: "expandable_segments:True"}, {ALLOCATOR: "expandable_segments:True"}, {}),
        (
            {ALLOCATOR_NEW: "expandable_segments:True,max_split_size_mb:64"},
            {ALLOCATOR_NEW: "expandable_segments:True,max_split_size_mb:64"},
            {ALLOCATOR_NEW: "max_split_size_mb:64"},
        ),
    ],
)  # fmt: skip
def test_expandable_segments_are_for_trainer_ranks(user, trainer, colocated):
    def of(values):
        return {name: values[name] for name in (ALLOCATOR, ALLOCATOR_NEW) if values[name] is not None}

    assert of(trainer_environment(user)) == trainer
    assert of(engine_environment(user)) == user
    assert of(engine_environment(user, memory_saver=True)) == (trainer if colocated is None else colocated)


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ("expandable_segments:True", ""),
        ("a:1, expandable_segments:False", "a:1"),
        ("roundup_power2_divisions:[256:1,512:2],expandable_segments:True,b:2",
         "roundup_power2_divisions:[256:1,512:2],b:2"),
    ],
)  # fmt: skip
def test_one_option_is_taken_out(options, left):
    assert without_expandable_segments(options) == left


def test_cuda_graphs_are_paused_in_colocated_engines_alone():
    assert engine_environment({})[PAUSED_GRAPHS] is None
    assert engine_environment({}, memory_saver=True)[PAUSED_GRAPHS] == "1"
    assert engine_environment({PAUSED_GRAPHS: "0"}, memory_saver=True)[PAUSED_GRAPHS] == "0"
    assert engine_environment({}, memory_saver=True, pausable_graphs=False)[PAUSED_GRAPHS] is None


def engine(*sglang_flags: str, memory_saver: bool, exported: dict | None = None) -> SGLangServer:
    arguments = server_arguments(
        list(sglang_flags),
        device="cuda",
        routes=False,
        longest_step_s=300.0,
        dtype="bfloat16",
        seed=1,
        memory_saver=memory_saver,
    )
    return SGLangServer("m", "127.0.0.1", 30000, arguments, Path("log"), 1.0, None, "2,3", exported)


def test_an_engine_reads_what_it_needs_from_its_arguments(monkeypatch):
    for name in TABLE:
        monkeypatch.setenv(name, "of the node")
    monkeypatch.setenv(LIBRARIES, "/own")
    apart = engine(memory_saver=False, exported={})._environment()
    assert not {CONNECTIONS, THREADS, ALLOCATOR, ALLOCATOR_NEW, PAUSED_GRAPHS} & apart.keys()
    assert (apart[CUMEM], apart[LIBRARIES], apart["CUDA_VISIBLE_DEVICES"]) == ("0", "/own", "2,3")
    colocated = engine(memory_saver=True, exported={ALLOCATOR: "expandable_segments:True"})._environment()
    assert colocated[PAUSED_GRAPHS] == "1" and ALLOCATOR not in colocated
    assert colocated[LIBRARIES] == ":".join(["/own", *cuda_libraries()])
    breakable = engine("--cuda-graph-backend-prefill", "breakable", memory_saver=True, exported={})
    assert PAUSED_GRAPHS not in breakable._environment()
    symmetric = engine("--enable-symm-mem", memory_saver=False, exported={CUMEM: "0"})
    assert symmetric._environment()[CUMEM] == "1"


def test_a_rank_sets_its_own(monkeypatch):
    for name in TABLE:
        monkeypatch.setenv(name, "of the node")
    threads = torch.get_num_threads()
    args = flat_settings(optimizer_cpu_offload=False, sglang_flags=["--enable-symm-mem"])
    try:
        set_environment(args, {THREADS: "3", ALLOCATOR_NEW: "max_split_size_mb:64"})
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    now = {name: os.environ[name] for name in TABLE if name in os.environ}
    assert now == {CUMEM: "1", CONNECTIONS: "1", THREADS: "3", ALLOCATOR_NEW: "max_split_size_mb:64"}


@pytest.mark.parametrize(("cores", "gpus", "share"), [(96, 8, 12), (96, 3, 32), (4, 8, 1), (4, 0, 4)])
def test_the_optimizer_on_the_cpu_gets_a_share_of_the_node(cores, gpus, share, monkeypatch):
    """Another node of the cluster has more."""
    resources = {"here": {"CPU": 1.0, **({"GPU": float(gpus)} if gpus else {})}, "there": {"GPU": 64.0}}
    nodes = [{"NodeID": node, "Resources": has} for node, has in resources.items()]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "here"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    for name in TABLE:
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    try:
        set_environment(flat_settings(optimizer_cpu_offload=True, sglang_flags=[]), {})
        assert (os.environ[THREADS], torch.get_num_threads()) == (str(share), share)
    finally:
        torch.set_num_threads(threads)


def test_the_page_has_the_table():
    page = (Path(__file__).parents[3] / "docs/reference/environment.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if "|" in line]
    told = {cells[0].strip("`"): cells[1:] for cells in rows if len(cells) == 4}
    for name, row in TABLE.items():
        for value, cell in zip((row.trainer, row.engine, row.colocated), told.get(name, []), strict=False):
            assert cell.startswith(("not set", "SGLang's") if value is None else (value, f"`{value}`"))
    assert TABLE.keys() - told.keys() == {ALLOCATOR_NEW}  # the other name of one that is there


def compiled(source: str, target: Path, *flags: str) -> Path:
    file = target.with_suffix(".c")
    file.write_text(source)
    subprocess.run(["cc", "-shared", "-fPIC", str(file), "-o", str(target), *flags], check=True)
    return target


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_library_that_needs_the_cuda_runtime_can_be_preloaded(tmp_path, monkeypatch):
    """As torch_memory_saver's: it needs libcudart, has no path of its own, and goes into LD_PRELOAD."""
    name = "libcudart.so.99"  # of a version that no machine's loader knows
    runtime = tmp_path / "site" / "nvidia" / "cu99" / "lib" / name
    runtime.parent.mkdir(parents=True)
    compiled("int cuda_runtime(void) { return 0; }", runtime, f"-Wl,-soname,{name}")
    source = "int cuda_runtime(void); int hook(void) { return cuda_runtime(); }"
    hook = compiled(source, tmp_path / "hook.so", str(runtime))
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delenv(LIBRARIES, raising=False)

    def exit_status(memory_saver: bool) -> int:
        own = engine(memory_saver=memory_saver)._environment() | {"LD_PRELOAD": str(hook)}
        return subprocess.run(["/bin/true"], env=own, capture_output=True).returncode

    assert exit_status(memory_saver=False) == 127
    assert exit_status(memory_saver=True) == 0


@pytest.mark.parametrize(
    ("text", "threads"),
    [(None, None), ("", None), (" ", None), ("4", 4), ("4,2", 4), (" 4 , 2", 4), ("04", 4), ("8,", 8)],
)
def test_threads_as_openmp_takes_them(text, threads):
    env = {} if text is None else {THREADS: text}
    assert num_threads(env) == threads
    assert exported_values(env).get(THREADS) == (None if threads is None else str(threads))


@pytest.mark.parametrize("text", ["x", "0", "-1", "4.5", ",4", "²"])
def test_what_is_no_number_of_threads(text):
    with pytest.raises(ValueError) as error:
        exported_values({THREADS: text})
    assert str(error.value) == f"{THREADS} is {text!r}: must be a positive number of threads, or unset"
    finding = judge_variables({THREADS: text})
    assert finding.status == "FAIL" and THREADS in finding.text


ACTIVATE = "import megatron_vespo_cpu, torch; megatron_vespo_cpu.activate(); print(torch.get_num_threads())"


@pytest.mark.long
@pytest.mark.parametrize(("text", "threads"), [("", "1"), ("2,1", "2")])
def test_the_cpu_runtime_reads_threads_alike(text, threads):
    done = subprocess.run(
        [sys.executable, "-c", ACTIVATE], env=os.environ | {THREADS: text}, capture_output=True, text=True
    )
    assert done.stdout.split()[-1:] == [threads], done.stderr


@pytest.mark.parametrize(
    ("env", "hosts"),
    [
        ({}, "10.0.0.1,localhost,127.0.0.1"),
        ({"NO_PROXY": ".lab"}, ".lab,10.0.0.1,localhost,127.0.0.1"),
        ({"no_proxy": "a", "NO_PROXY": "b"}, "a,10.0.0.1,localhost,127.0.0.1"),
        ({"no_proxy": "*"}, "*"),
    ],
)
def test_an_engine_reaches_itself_without_a_proxy(env, hosts, monkeypatch):
    assert reached_directly("10.0.0.1", env) == {"no_proxy": hosts, "NO_PROXY": hosts}
    for name, value in {"http_proxy": "http://127.0.0.1:9", **reached_directly("10.0.0.1", env)}.items():
        monkeypatch.setenv(name, value)
    for url in ("http://10.0.0.1:30000/x", "http://127.0.0.1:1"):
        assert not requests.utils.get_environ_proxies(url)


def test_an_engines_process_has_them(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert "127.0.0.1" in engine(memory_saver=False, exported={})._environment()["no_proxy"]
