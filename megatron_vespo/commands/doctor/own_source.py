"""Finds what this package imports from a library, and with which keywords it calls it, in its own source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import megatron_vespo

PACKAGE = Path(megatron_vespo.__file__).parent
Uses = dict[tuple[str, str], set[str]]  # (module, dotted name in it or "") -> keywords of calls


def uses_of(library: str) -> Uses:
    """All uses in this package."""
    found: Uses = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for key, keywords in uses_in(ast.parse(path.read_text()), library).items():
            found.setdefault(key, set()).update(keywords)
    return found


def uses_in(tree: ast.AST, library: str) -> Uses:
    """Example: "import ray; ray.get(x, timeout=1)" -> {("ray", ""): set(), ("ray", "get"): {"timeout"}}."""
    found: Uses = {}
    bound = {}  # name in the file -> (module, dotted name in it)
    for node in ast.walk(tree):
        for name, place, imported in _imports(node, library):
            bound[name] = place
            found.setdefault(imported, set())
    for node in ast.walk(tree):
        call = node if isinstance(node, ast.Call) else None
        chain = _chain(call.func if call else node)
        if chain is None or chain[0] not in bound:
            continue
        module, name = bound[chain[0]]
        place = module, ".".join(part for part in (name, *chain[1:]) if part)
        found.setdefault(place, set())
        if call:
            found[place] |= {keyword.arg for keyword in call.keywords if keyword.arg}
    return found


def _imports(node: ast.AST, library: str) -> Iterator[tuple[str, tuple[str, str], tuple[str, str]]]:
    """For an import statement: the name that it binds, what the name refers to, and what must exist."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            if alias.name.partition(".")[0] == library:
                bound = alias.name if alias.asname else library
                yield alias.asname or library, (bound, ""), (alias.name, "")
    elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == library:
        for alias in node.names:
            yield alias.asname or alias.name, (node.module, alias.name), (node.module, alias.name)  # pyright: ignore[reportReturnType]


def _chain(node: ast.AST) -> list[str] | None:
    """["ray", "util", "x"] of ray.util.x; None for anything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return [node.id, *reversed(parts)] if isinstance(node, ast.Name) else None
