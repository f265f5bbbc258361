"""A Transformer Engine or a DeepEP that cannot be imported: what is said of it; it ends nothing else."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from megatron_vespo.cluster.trainer_worker import TrainerWorker
from megatron_vespo.commands.doctor import packages
from megatron_vespo.system.optional_packages import DEEP_EP, IMPORTS, TRANSFORMER_ENGINE, check_deep_ep
from tests.support.settings import flat_settings
from tests.support.train_flags import BASE, CONFIG

# as the real one begins
SWALLOWS = "__version__ = '2.20.2'\ntry:\n    from . import pytorch\nexcept ImportError:\n    pass\n"
NO_LIBRARY = "ImportError: libcudart.so.13: cannot open shared object file"
EMPTY = "RuntimeError: Found empty `transformer-engine` meta package installed."
# files of a Transformer Engine that is broken in some way -> the error that is to be named
BROKEN = {
    NO_LIBRARY: {
        "__init__.py": SWALLOWS,
        "pytorch/__init__.py": "raise ImportError('libcudart.so.13: cannot open shared object file')\n",
    },
    EMPTY: {
        "__init__.py": "raise RuntimeError('Found empty `transformer-engine`\\nmeta package installed.')\n",
    },
    "ImportError: cannot import name 'fp8_model_init' from 'transformer_engine.pytorch.fp8'": {
        "__init__.py": SWALLOWS, "pytorch/__init__.py": "",
        "pytorch/fp8.py": "FP8GlobalStateManager = fp8_autocast = None\n",
    },
    "ModuleNotFoundError: No module named 'transformer_engine'": {},
}  # fmt: skip
PARSE = """
import json, sys
from megatron_vespo.arguments.parse import parse_args
from megatron_vespo.system.hardware import ON_GPUS
answers = []
NCCL = "--distributed-backend nccl"
for more in (NCCL, f"{NCCL} --transformer-impl local", " ".join(ON_GPUS), ""):
    try:
        args = parse_args([*sys.argv[1:], *more.split()])
        answers.append([args.transformer_impl, args.moe_grouped_gemm, args.moe_permute_fusion])
    except ValueError as error:
        answers.append(str(error))
print(json.dumps(answers))
"""
DEEP_EP_OF_MEGATRON = """
from megatron_vespo.system.plugins import prepare_for_megatron
prepare_for_megatron()
from megatron.core.transformer.moe.fused_a2a import HAVE_DEEP_EP
from megatron_vespo.system.optional_packages import import_error
print(HAVE_DEEP_EP, import_error("deep_ep"))
"""


def write(folder: Path, package: str, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def run(program: str, folder: Path, *arguments: str) -> str:
    """The last line that a process prints to which the packages in `folder` are installed."""
    paths = f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *arguments], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": paths}, cwd=Path(__file__).parents[3], timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("package", "module"),
    [
        (TRANSFORMER_ENGINE, "megatron.core.extensions.transformer_engine"),
        (DEEP_EP, "megatron.core.transformer.moe.fused_a2a"),
    ],
)
def test_the_imports_are_megatrons_own(package, module):
    """Read from its source: the first `try` there."""
    source = Path(find_spec("megatron.core").origin).parents[2] / f"{module.replace('.', '/')}.py"
    first = next(node for node in ast.parse(source.read_text()).body if isinstance(node, ast.Try))
    imported: dict[str, tuple[str, ...]] = {}
    for node in first.body:
        if isinstance(node, ast.Import):
            imported |= {alias.name: () for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported[node.module] = tuple(alias.name for alias in node.names)
    assert imported == IMPORTS[package]
    [handler] = first.handlers
    assert handler.type.id == "ImportError"


@pytest.mark.long
@pytest.mark.parametrize("error", BROKEN)
def test_a_run_on_gpus_without_transformer_engine(error, tmp_path):
    """Refused with the real error, unless the local layers are asked for; plans and CPU runs are not."""
    write(tmp_path, TRANSFORMER_ENGINE, BROKEN[error])
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    refusal, local, planned, on_cpu = json.loads(
        run(PARSE, tmp_path, "--hf-checkpoint", str(tmp_path), *BASE)
    )
    assert error in refusal and "--transformer-impl local" in refusal and "\n" not in refusal
    assert planned == ["transformer_engine", True, True]
    assert local == on_cpu == ["local", False, False]


def test_a_trainer_rank_names_itself():
    worker = TrainerWorker.__new__(TrainerWorker)
    worker.rank, worker._host = 3, "10.0.0.7"
    worker._settings = flat_settings(transformer_impl="transformer_engine", distributed_backend="gloo")
    worker._args = worker._settings.values
    with pytest.raises(ValueError, match=r"^trainer rank 3 on 10\.0\.0\.7: no transformer_engine \(Module"):
        worker.start("127.0.0.1", 1)


@pytest.mark.long
def test_a_deep_ep_that_ends_its_import_does_not_end_megatrons(tmp_path):
    """SGLang's looks for CUDA's folder by an assertion, which Megatron does not catch."""
    write(tmp_path, DEEP_EP, {"__init__.py": "assert False, 'no CUDA home'\n"})
    assert run(DEEP_EP_OF_MEGATRON, tmp_path) == "False AssertionError: no CUDA home"


def test_the_flex_dispatcher_wants_deep_ep():
    with pytest.raises(ValueError, match=r"^here: no deep_ep \(ModuleNotFoundError.*type alltoall"):
        check_deep_ep("flex", "deepep", "here")
    check_deep_ep("alltoall", "deepep", "here")


@pytest.mark.long
@pytest.mark.parametrize(
    ("package", "distribution", "files", "status"),
    [
        ("transformer-engine", "transformer_engine-2.20.2", BROKEN[NO_LIBRARY], "FAIL"),
        ("deep-ep", "sgl_deep_ep-0.1.2", {"__init__.py": "raise ImportError('libcudart.so.13: cannot open "
                                                         "shared object file')\n"}, "warn"),
    ],
)  # fmt: skip
def test_doctor_says_why_it_does_not_load(package, distribution, files, status, tmp_path, monkeypatch):
    name, _, version = distribution.rpartition("-")
    write(tmp_path, package.replace("-", "_"), files)
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    write(tmp_path, f"{distribution}.dist-info", {"METADATA": metadata})
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    finding = packages.package(package)
    assert (finding.status, finding.text) == (status, f"{version}: {NO_LIBRARY}")


def test_doctor_misses_transformer_engine_where_there_are_gpus(monkeypatch):
    monkeypatch.setattr(packages, "installed", lambda package: None)
    for gpus, status in ((True, "FAIL"), (False, "ok")):
        monkeypatch.setattr(packages, "has_gpu_files", lambda gpus=gpus: gpus)
        assert packages.package("transformer-engine").status == status
    monkeypatch.setattr(packages, "has_gpu_files", lambda: True)
    assert "--no-build-isolation" in packages.package("transformer-engine").fix
