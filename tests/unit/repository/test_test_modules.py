"""Test modules stand alone: none imports another, names are unique. What they share is in tests/support."""

import ast
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).parents[2]
MODULES = sorted(TESTS.rglob("test_*.py"))


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_none_imports_another():
    stems = {path.stem for path in MODULES} | {"conftest"}
    wrong = {
        str(path.relative_to(TESTS)): found
        for path in TESTS.rglob("*.py")
        if (found := {name for name in imported(path) if set(name.split(".")) & stems})
    }
    assert len(MODULES) > 100 and not wrong


def test_every_name_is_there_once():
    assert [name for name, count in Counter(path.name for path in MODULES).items() if count > 1] == []
