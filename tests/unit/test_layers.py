"""Who may import whom: the layers of the package, read from its source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_vespo

PACKAGE = Path(megatron_vespo.__file__).parent
# first part below the package -> layer; imports point down or stay in their own folder
LAYERS = {
    "": 0,  # __init__.py
    "types": 0,
    "algorithms": 1,
    "conversion": 1,
    "data": 1,
    "hardware": 0,
    "http": 1,
    "import_path": 0,
    "layout": 1,
    "observability": 1,
    "optional_packages": 0,
    "preemption": 1,
    "process_environment": 0,
    "ray_variables": 0,
    "paths": 0,
    "slurm_step": 0,
    "rewards": 1,
    "runtime": 1,
    "rollout": 2,
    "simulation": 2,
    "trainer": 2,
    "weight_sync": 2,
    "cluster": 3,
    "controller": 4,
    "rollout_metrics": 4,
    "arguments": 5,
    "async_flags": 5,
    "checkpoint_flags": 5,
    "cli": 5,
    "colocate_flags": 5,
    "convert_cli": 5,
    "debug_modes": 4,
    "disk": 0,
    "endings": 5,
    "finished": 0,
    "doctor": 5,
    "engine_flags": 5,
    "engine_nodes": 5,
    "evaluate_cli": 5,
    "evaluate_flags": 5,
    "evaluation_engines": 5,
    "evaluation_settings": 5,
    "flag_checks": 5,
    "flag_parser": 5,
    "flags": 5,
    "heldout_flags": 5,
    "layout_check": 5,
    "logits_check": 5,
    "model_flags": 5,
    "plan_cli": 5,
    "planning": 2,
    "platform": 5,
    "prepare_cli": 5,
    "prompt_data": 5,
    "recipe": 0,
    "resume": 5,
    "resume_flags": 5,
    "run_record": 5,
    "sbatch_script": 0,
    "session": 5,
    "smoke": 5,
    "submit_cli": 5,
    "modelopt_export": 5,
    "simulate_cli": 5,
    "loss_checks": 0,
    "time_limits": 0,
    "train": 5,
    "training_samples": 4,
    "validation": 5,
    "wording": 0,
}
# the same layer, and free of each other
SIBLINGS = {
    ("trainer", "rollout"),
    ("rollout", "trainer"),
    ("weight_sync", "trainer"),
    ("weight_sync", "rollout"),
    ("rollout", "simulation"),
    ("simulation", "trainer"),
    ("simulation", "weight_sync"),
}


def modules() -> dict[str, ast.Module]:
    """Dotted name below the package -> tree."""
    trees = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        trees[name] = ast.parse(path.read_text())
    return trees


MODULES = modules()


def imports(tree: ast.AST) -> set[str]:
    """Absolute names of everything imported, at the top or inside a function."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def part(module: str) -> str:
    return module.partition(".")[0]


def internal(tree: ast.AST) -> set[str]:
    """Parts of this package that are imported."""
    names = {name for name in imports(tree) if part(name) == "megatron_vespo"}
    return {part(name.removeprefix("megatron_vespo").removeprefix(".")) for name in names}


def imports_library(tree: ast.AST, library: str) -> bool:
    return any(part(name) == library for name in imports(tree))


def test_the_reader_sees_every_kind_of_import():
    tree = ast.parse(
        "import ray.util as r\nfrom megatron_vespo.data.packing import x\nfrom megatron_vespo import types\n"
        "def f():\n    from megatron.core import y\n"
    )
    assert imports(tree) == {
        "ray.util",
        "megatron_vespo.data.packing.x",
        "megatron_vespo.types",
        "megatron.core.y",
    }
    assert internal(tree) == {"data", "types"}
    assert imports_library(tree, "megatron") and not imports_library(tree, "sglang")


def test_every_part_has_a_layer():
    assert {part(module) for module in MODULES} == LAYERS.keys()


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    own = part(module)
    for other in internal(MODULES[module]) - {own}:
        assert LAYERS[other] <= LAYERS[own], f"{module} imports {other} from a layer above"
        assert (own, other) not in SIBLINGS, f"{module} imports {other}, they must not know each other"


@pytest.mark.parametrize("module", MODULES)
def test_ray_stays_in_cluster_and_entry_points(module):
    if imports_library(MODULES[module], "ray"):
        assert part(module) == "cluster" or LAYERS[part(module)] == 5


@pytest.mark.parametrize("module", MODULES)
def test_megatron_stays_in_the_trainer(module):
    if part(module) == "trainer":
        return
    if module in ("arguments", "model_flags"):
        at_top = ast.Module([node for node in MODULES[module].body if not is_definition(node)], [])
        assert not imports_library(at_top, "megatron"), "only inside functions: --help must not wait for it"
        return
    assert not imports_library(MODULES[module], "megatron")


def is_definition(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef | ast.ClassDef)


@pytest.mark.parametrize("module", MODULES)
def test_sglang_is_started_never_imported(module):
    assert not imports_library(MODULES[module], "sglang")


def test_lower_layers_load_no_framework():
    pure = [f"megatron_vespo.{module}" for module in MODULES if module and LAYERS[part(module)] <= 1]
    assert len(pure) > 15
    program = f"""
import importlib, sys
for name in {pure}:
    importlib.import_module(name)
loaded = {{name.partition(".")[0] for name in sys.modules}}
print(*sorted(loaded & {{"megatron", "ray", "sglang", "transformer_engine"}}))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
