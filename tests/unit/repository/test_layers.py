"""Who may import whom: the rooms of the package and their layers, read from its source."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_vespo

PACKAGE = Path(megatron_vespo.__file__).parent
# room -> layer; imports point down, or to a room beside that does not import back
LAYERS = {
    "types": 0,
    "system": 0,
    "algorithms": 1,
    "models": 1,
    "data": 1,
    "rewards": 1,
    "checkpoints": 1,
    "observability": 1,
    "trainer": 2,
    "rollout": 2,
    "weight_sync": 2,
    "cluster": 3,
    "arguments": 3,
    "driver": 4,
    "commands": 5,
}
# the rooms of one layer that must not know each other
APART = [("trainer", "rollout", "weight_sync")]
LIBRARIES = {"ray": ["cluster"], "megatron": ["trainer"], "sglang": []}


def modules() -> dict[str, ast.Module]:
    """Dotted name below the package -> tree; without the package's own two files."""
    trees = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name not in ("", "__main__"):
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


def rooms_of(tree: ast.AST) -> set[str]:
    """Rooms of this package that are imported."""
    names = {name for name in imports(tree) if part(name) == "megatron_vespo" and name != "megatron_vespo"}
    return {part(name.removeprefix("megatron_vespo.")) for name in names} - {"__version__"}


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
    assert rooms_of(tree) == {"data", "types"}
    assert imports_library(tree, "megatron") and not imports_library(tree, "sglang")


def test_the_package_is_these_rooms_and_nothing_else():
    entries = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert entries == (LAYERS.keys() - {"types"}) | {
        "types.py",
        "__init__.py",
        "__main__.py",
    }


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    own = part(module)
    for other in rooms_of(MODULES[module]) - {own}:
        assert LAYERS[other] <= LAYERS[own], f"{module} imports {other} from a layer above"
        for rooms in APART:
            assert not {own, other} <= set(rooms), f"{module} imports {other}: they must not know each other"


def test_no_two_rooms_import_each_other():
    graph: dict[str, set[str]] = {}
    for module, tree in MODULES.items():
        graph.setdefault(part(module), set()).update(rooms_of(tree) - {part(module)})
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names them


@pytest.mark.parametrize("library", LIBRARIES)
def test_libraries_stay_in_their_rooms(library):
    for module, tree in MODULES.items():
        if library == "megatron" and module in ("arguments.parse", "commands.args"):
            # only inside functions: --help must not wait for it
            tree = ast.Module([node for node in tree.body if not is_definition(node)], [])
        if part(module) not in LIBRARIES[library]:
            assert not imports_library(tree, library), module


def is_definition(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef | ast.ClassDef)


@pytest.mark.long
def test_lower_layers_load_no_framework():
    pure = [f"megatron_vespo.{module}" for module in MODULES if LAYERS[part(module)] <= 1]
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
