"""The doctor's judgements, its deadlines and its table."""

import ast
import os
import resource
import shutil
import subprocess
import time
from pathlib import Path

import pytest

import megatron_vespo
from megatron_vespo.commands.doctor import gpus, machine, packages, patches, processes, shared_folder, traps
from megatron_vespo.commands.doctor.finding import Check, Finding, run_checks
from megatron_vespo.commands.doctor.import_check import problem
from megatron_vespo.commands.doctor.own_source import uses_in
from megatron_vespo.commands.doctor.surface import ROUTES, missing_flags
from megatron_vespo.commands.doctor.table import as_text, lines_of
from megatron_vespo.commands.doctor.versions import TESTED
from megatron_vespo.system.patches import read_check

GIB = 2**30


def test_a_check_that_hangs_or_raises_is_a_finding():
    def raises() -> Finding:
        raise OSError("no such disk")

    def hangs() -> Finding:
        time.sleep(30)
        raise AssertionError

    started = time.monotonic()
    checks = [
        Check("hangs", hangs, 0.2),
        Check("raises", raises, 5.0),
        Check("fine", lambda: Finding("fine", "ok", "yes"), 5.0),
    ]
    hung, raised, fine = run_checks(checks)
    assert time.monotonic() - started < 5
    assert (hung.check, hung.status, hung.text) == ("hangs", "FAIL", "no answer within 0.2 s")
    assert raised == Finding("raises", "FAIL", "the check itself failed: OSError: no such disk")
    assert fine.status == "ok"


def test_what_a_source_uses_of_a_library():
    tree = ast.parse(
        "import ray\nimport ray.util as u\nfrom ray.x import A as B, c\nimport os\n"
        "ray.get(f(y), timeout=1)\nray.a.b\nu.z(k=2)\n"
        "def f():\n    from ray import late\n    B.make(p=1)\n    c(q=1, **more)\n"
        "    os.remove(x, dir_fd=1)\n"
    )
    assert uses_in(tree, "ray") == {
        ("ray", ""): set(), ("ray.util", ""): set(), ("ray.x", "A"): set(), ("ray.x", "c"): {"q"},
        ("ray", "late"): set(), ("ray", "get"): {"timeout"}, ("ray", "a"): set(), ("ray", "a.b"): set(),
        ("ray.util", "z"): {"k"}, ("ray.x", "A.make"): {"p"},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("module", "name", "keywords", "said"),
    [
        ("json", "dumps", {"obj", "indent"}, None),
        ("json", "dumps", {"anything"}, None),  # takes **kw
        ("json", "decoder.JSONDecoder", {"strict"}, None),
        ("xml", "dom.minidom.parse", {"file"}, None),  # a submodule that nobody has imported
        ("textwrap", "dedent", {"text", "deep"}, "textwrap.dedent takes no deep"),
        ("json", "write", set(), "no json.write"),
        ("json", "decoder.Nothing", set(), "no json.decoder.Nothing"),
        ("json.nothing", "", set(), "json.nothing: ModuleNotFoundError: No module named 'json.nothing'"),
    ],
)
def test_what_is_wrong_with_a_name(module, name, keywords, said):
    assert problem(module, name, keywords) == said


def test_every_endpoint_that_is_called_is_looked_for():
    called = set()
    for folder in ("weight_sync", "rollout", "cluster"):
        for path in (Path(megatron_vespo.__file__).parent / folder).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    values = [a.value for a in ast.walk(node) if isinstance(a, ast.Constant)]
                    called |= {v for v in values if isinstance(v, str) and v.startswith("/") and len(v) > 1}
    assert {path for path in called if not path.startswith("/proc")} == set(ROUTES)


def test_sglang_has_every_flag_that_the_code_names():
    assert missing_flags() == []


def test_tested_versions_are_those_that_are_installed_by_setup():
    setup = (Path(megatron_vespo.__file__).parent.parent / "setup.py").read_text()
    for name in ("megatron-core", "sglang", "transformers"):
        assert f'"{name}=={TESTED[name]}"' in setup
    assert f'"ray[default]=={TESTED["ray"]}"' in setup
    assert f'python_requires=">={TESTED["python"]}"' in setup


@pytest.fixture
def found(monkeypatch):
    """`found(name, version, wrong)`: the finding about a package."""

    def judge(name: str, version: str | None, wrong: tuple[str, ...] = ()) -> Finding:
        monkeypatch.setattr(packages, "installed", lambda package: version)
        monkeypatch.setattr(packages, "_check_imports", lambda package: (list(wrong), 7))
        return packages.package(name)

    return judge


def test_packages(found):
    assert found("ray", TESTED["ray"]).status == "ok"
    other = found("ray", "1.0")
    assert other.status == "warn" and "tested with" in other.text and other.fix == "pip install ray==2.60.0"
    assert found("ray", None).status == "FAIL"
    assert found("transformer-engine", None).status == "ok"
    broken = found("transformer-engine", "9", ("no a.b", "no a.c", "no a.d", "no a.e"))
    assert broken.status == "FAIL" and broken.text == "9: no a.b; no a.c and 2 more"
    assert "PyPI's apex is another project" in found("apex", "0.9", ("no apex.optimizers",)).fix


def test_a_package_that_kills_its_process(monkeypatch, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nif any('doctor.import_check' in a for a in sys.orig_argv):\n"
        "    print('dying', file=sys.stderr, flush=True)\n    import os\n    os.abort()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    wrong, _ = packages._check_imports("ray")
    assert wrong[0].startswith("its import ended with status -6")


UNLIMITED = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("judge", "measured", "status", "fix"),
    [
        (machine.judge_open_files, (65536, 65536), "ok", ""),
        (machine.judge_open_files, (UNLIMITED, UNLIMITED), "ok", ""),
        (machine.judge_open_files, (1024, 1048576), "warn", "ulimit -n 65536"),
        (machine.judge_open_files, (4096, 4096), "warn", "hard limit of 4096"),
        (machine.judge_open_files, (256, 20000), "FAIL", "ulimit -n 20000"),
        # with InfiniBand or without
        (machine.judge_locked_memory, (8 * 2**20, False), "ok", ""),
        (machine.judge_locked_memory, (8 * 2**20, True), "FAIL", ""),
        (machine.judge_locked_memory, (UNLIMITED, True), "ok", ""),
        (machine.judge_space, ("x", 10 * GIB, GIB, 10 * GIB, "make room"), "ok", ""),
        (machine.judge_space, ("x", 2 * GIB, GIB, 10 * GIB, "make room"), "warn", ""),
        (machine.judge_space, ("x", 64 * 2**20, GIB, 10 * GIB, "make room"), "FAIL", ""),
        # free ports, the range, the first ephemeral one
        (machine.judge_ports, (1000, 30000, 31999, 32768), "ok", ""),
        (machine.judge_ports, (64, 30000, 31999, 32768), "ok", ""),
        (machine.judge_ports, (63, 30000, 31999, 32768), "warn", ""),
        (machine.judge_ports, (0, 30000, 31999, 32768), "FAIL", ""),
        (machine.judge_ports, (1000, 30000, 31999, 31000), "warn", ""),
    ],
)
def test_limits_of_the_machine(judge, measured, status, fix):
    finding = judge(*measured)
    assert finding.status == status and fix in finding.fix


@pytest.mark.parametrize(
    ("env", "gpu", "status", "said"),
    [
        ({}, True, "ok", ""),
        ({"CUDA_VISIBLE_DEVICES": ""}, False, "ok", ""),
        ({"CUDA_VISIBLE_DEVICES": ""}, True, "FAIL", "no GPU is seen"),
        ({"http_proxy": "http://127.0.0.1:9"}, False, "ok", ""),
        ({"SGLANG_RETURN_ORIGINAL_LOGPROB": "1"}, False, "FAIL", "not return the log-probs of what they"),
        ({"SGLANG_RETURN_ORIGINAL_LOGPROB": "false"}, False, "ok", ""),
        ({"TMPDIR": "/" + "t" * 60}, False, "warn", "TMPDIR has 61 bytes"),
        ({"GLOO_SOCKET_IFNAME": "eth"}, False, "ok", ""),
        ({"GLOO_SOCKET_IFNAME": "ib0"}, False, "FAIL", "GLOO_SOCKET_IFNAME=ib0: there is no such"),
        ({"NCCL_SOCKET_IFNAME": "^lo"}, False, "ok", ""),
        ({"RAY_AUTH_MODE": "disabled"}, False, "warn", "runs code as you"),
        ({"RAY_ADDRESS": "auto"}, False, "warn", "RAY_ADDRESS=auto is set and --ray-address is not given"),
        ({"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}, True, "FAIL", "every trainer rank"),
        ({"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "0"}, True, "ok", ""),
    ],
)
def test_environment(env, gpu, status, said):
    finding = traps.judge_environment(env, {"lo", "eth0"}, gpu)
    assert finding.status == status and said in finding.text


@pytest.mark.parametrize(
    ("env", "status", "said"),
    [
        ({}, "ok", "trainer ranks get NCCL_CUMEM_ENABLE=0, CUDA_DEVICE_MAX_CONNECTIONS=1, OMP_NUM_THREADS=1"),
        ({"NCCL_CUMEM_ENABLE": "1"}, "warn", "NCCL_CUMEM_ENABLE=1: trainer ranks and engines both get it"),
        ({"NCCL_CUMEM_ENABLE": "0"}, "ok", "NCCL_CUMEM_ENABLE as exported"),
        ({"CUDA_DEVICE_MAX_CONNECTIONS": "8"}, "warn", "context parallelism without 1"),
        ({"SGLANG_MEMORY_SAVER_CUDA_GRAPH": "0"}, "warn", "keep their memory without 1"),
        # a run takes it out where it breaks something
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, "ok",
         "engines with --colocate get NCCL_CUMEM_ENABLE=0, SGLANG_MEMORY_SAVER_CUDA_GRAPH=1 ("),
    ],
)  # fmt: skip
def test_what_a_run_sets(env, status, said):
    finding = processes.judge_variables(env)
    assert (finding.status, said in finding.text, bool(finding.fix)) == (status, True, status != "ok"), (
        finding
    )


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.parametrize(
    ("needed", "status", "said"),
    [
        ([], "ok", "can be preloaded"),
        (["libcudart.so.99"], "ok", "can be preloaded"),  # which a run finds in site-packages
        (["libcudart.so.99", "libcuda.so.99"], "FAIL", "libcuda.so.99"),
    ],
)
def test_the_memory_savers_library(needed, status, said, tmp_path, monkeypatch):
    """A package in torch_memory_saver's place, with a library that has such needs."""
    (tmp_path / "torch_memory_saver.py").write_text(
        "import os\nfrom contextlib import contextmanager\n@contextmanager\ndef configure_subprocess():\n"
        f"    os.environ['LD_PRELOAD'] = {str(tmp_path / 'hook.so')!r}\n    yield\n"
    )
    libraries = tmp_path / "nvidia" / "cu99" / "lib"
    libraries.mkdir(parents=True)
    for name in needed:
        cc(libraries / name, f"-Wl,-soname,{name}")
    cc(tmp_path / "hook.so", "-Wl,--no-as-needed", *(str(libraries / name) for name in needed))
    for name in needed[1:]:
        (libraries / name).unlink()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    finding = processes.memory_saver()
    assert (finding.status, said in finding.text) == (status, True), finding


def cc(target: Path, *flags: str) -> None:
    source = target.with_name("empty.c")
    source.write_text("int nothing;")
    subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(target), *flags], check=True)


def seen(count: int, without_peer=()) -> dict:
    return {
        "names": ["H100"] * count, "bytes": [80 * GIB] * count, "built_for": "13.0",
        "without_peer": without_peer,
    }  # fmt: skip


TOPOLOGY = (
    "\tGPU0\tGPU1\tCPU Affinity\nGPU0\t X \tNV18\t0-31\nGPU1\tNV18\t X \t0-31\n\nLegend:\n  SYS = ...\n"
)


@pytest.mark.parametrize(
    ("answer", "topology", "files", "wanted", "status", "said"),
    [
        (seen(0), "", False, 0, "ok", "none"),
        (seen(0), "", True, 0, "FAIL", "torch sees none"),
        (seen(0), "", False, 8, "FAIL", "torch sees none"),
        (seen(1), "", True, 1, "ok", "1 x H100, 80 GiB, driver 580"),
        (seen(2), TOPOLOGY, True, 2, "ok", "NVLink, peer access"),
        (seen(2), TOPOLOGY.replace("NV18", "SYS"), True, 2, "ok", "no NVLink"),
        (seen(2, [(0, 1)]), "", True, 2, "warn", "1 pairs without peer access"),
        (seen(2), "", True, 8, "FAIL", "SLURM has allocated 8"),
    ],
)
def test_gpus(answer, topology, files, wanted, status, said):
    finding = gpus.judge_gpus(answer, "580", topology, files, wanted)
    assert finding.status == status and said in finding.text


@pytest.mark.parametrize(
    ("answer", "status", "text"),
    [
        ((0, "applied: m 1 a\napplied: m 1 b\n", ""), "ok", "all 2 applied"),
        ((1, "applied: m 1 a\nnot applied: m 1 b\n", ""), "FAIL", "not applied: b"),
        ((1, "", "patches: m 2 is installed\n"), "FAIL", "m 2 is installed"),
    ],
)
def test_patches(answer, status, text):
    finding = patches.judge_patches(read_check(*answer))
    assert (finding.status, finding.text) == (status, text)


def test_shared_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_folder, "SIZE_BYTES", 2 * 2**20)
    monkeypatch.setattr(shared_folder, "VISIBLE_WITHIN_S", 0.0)
    for rank in (0, 1):
        assert shared_folder.write(tmp_path, "7.0", rank) > 0
    finding = shared_folder.check(tmp_path, "7.0", 1, [0, 1], 2, 1.0)
    assert finding.status == "ok" and "all 2 ranks see each other" in finding.text
    assert shared_folder.check(tmp_path, "7.0", 0, [0, 1], 2, 0.01).status == "warn"
    with pytest.raises(ValueError, match="the file of rank 1 has other content"):
        shared_folder.path_of(tmp_path, "7.0", 0).replace(shared_folder.path_of(tmp_path, "7.0", 1))
        shared_folder.read(tmp_path, "7.0", 1)
    assert shared_folder.unseen(tmp_path, "7.0", [0, 1, 2], 0.0) == [0, 2]


def nodes(**texts: str) -> dict[str, list[Finding]]:
    return {node: [Finding("driver", "ok", text, alike=True)] for node, text in texts.items()}


def test_the_odd_one_out_is_named():
    [line] = lines_of(nodes(n1="580", n2="580", n3="535"))
    assert line.status == "FAIL" and line.text == "n3: 535; the others: 580"
    [line] = lines_of(nodes(n1="580", n2="580"))
    assert (line.status, line.text) == ("ok", "580")


def test_failures_name_their_nodes_and_the_worst_counts():
    bad = Finding("disk", "FAIL", "0 GiB free", "make room")
    warn = Finding("disk", "warn", "5 GiB free", "make some room")
    good = Finding("disk", "ok", "50 GiB free")
    [line] = lines_of({"n1": [good], "n2": [bad], "n3": [warn], "n4": [bad]})
    assert (line.status, line.text) == ("FAIL", "n2, n4: 0 GiB free; n3: 5 GiB free")
    assert line.fix == "make room"
    [line] = lines_of({"n1": [bad], "n2": [bad]})
    assert line.text == "0 GiB free"


def test_a_node_that_is_much_slower():
    def speed(value: float) -> list[Finding]:
        return [Finding("folder", "ok", f"{value} GB/s", measured=value)]

    [line] = lines_of({"n1": speed(1.0), "n2": speed(0.9), "n3": speed(0.2)})
    assert line.status == "warn" and line.text == "n3 0.20 GB/s, others up to 1.00"
    assert lines_of({"n1": speed(1.0), "n2": speed(0.5)})[0].status == "ok"


def test_the_table():
    findings = [Finding("disk", "FAIL", "full", "make room"), Finding("open files", "ok", "at most 65536")]
    assert as_text(lines_of({"n1": findings}), 80).splitlines() == [
        "disk        FAIL  full",
        "                  -> make room",
        "open files  ok    at most 65536",
        "2 checks: 1 FAIL",
    ]
