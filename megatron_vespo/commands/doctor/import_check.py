"""Imports a package and looks for the names that we use, in a process that the import may kill.

    python -m megatron_vespo.commands.doctor.import_check PACKAGE

The last line of standard output is a JSON list of problems; it is empty if there are none.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import sys
from typing import Any

from megatron_vespo.commands.doctor.own_source import Uses
from megatron_vespo.commands.doctor.surface import missing_in_sglang, surface
from megatron_vespo.system.optional_packages import DEEP_EP, TRANSFORMER_ENGINE, import_error
from megatron_vespo.system.plugins import prepare_for_megatron

MARK = "megatron_vespo.commands.doctor.import_check:"
# if a name that Megatron imports from them is missing, Megatron takes the package for absent
_AS_MEGATRON = {"transformer-engine": TRANSFORMER_ENGINE, "deep-ep": DEEP_EP}


def main(package: str) -> None:
    error = import_error(_AS_MEGATRON[package]) if package in _AS_MEGATRON else None
    prepare_for_megatron()  # as before a run
    uses = surface(package)
    wrong = [error] if error else _problems(uses)
    if package == "sglang" and not wrong:
        wrong = missing_in_sglang()
    print(f"\n{MARK}{json.dumps({'wrong': wrong, 'number': len(uses)})}", flush=True)
    os._exit(0)  # ignores threads and handlers that the package has left


def _problems(uses: Uses) -> list[str]:
    """One line per problem. A package that cannot be imported is a single problem."""
    found = (problem(module, name, keywords) for (module, name), keywords in uses.items())
    return list(dict.fromkeys(text for text in found if text))


def problem(module: str, name: str, keywords: set[str]) -> str | None:
    """What is wrong with `name` of `module`, in a few words."""
    try:
        found = _found(module, name)
    except AttributeError:
        return f"no {module}.{name}"
    except Exception as error:  # a package may raise anything while it is imported
        return f"{module}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    lacking = keywords - _accepted(found, keywords)
    return f"{module}.{name} takes no {', '.join(sorted(lacking))}" if lacking else None


def _found(module: str, name: str) -> Any:
    found = importlib.import_module(module)
    for part in name.split(".") if name else ():
        try:
            found = getattr(found, part)
        except AttributeError:
            if not inspect.ismodule(found):
                raise
            try:
                found = importlib.import_module(f"{found.__name__}.{part}")
            except ModuleNotFoundError as error:
                raise AttributeError(part) from error
    return found


def _accepted(found: Any, keywords: set[str]) -> set[str]:
    """Those of `keywords` that a call of `found` accepts; all of them if its signature is unknown."""
    if not keywords:
        return set()
    try:
        parameters = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):
        return keywords
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return keywords
    return {parameter.name for parameter in parameters}


if __name__ == "__main__":
    main(sys.argv[1])
