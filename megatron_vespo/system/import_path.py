"""Imports functions that the user names on the command line."""

from __future__ import annotations

import importlib
from collections.abc import Callable


def import_function(
    import_path: str, what: str, builtin: str | None = None, kind: str = "function"
) -> Callable:
    """The function named "package.module:function".

    Messages use `what`, the function's role, and `builtin`, the quoted names of built-in ones. With `kind`
    "class", they ask for a class; the caller checks that it is one.

    Raises:
        ValueError: the module or the function does not exist, or it is not callable.
    """
    where = f"{what} {import_path!r}"
    module_name, _, name = import_path.partition(":")
    if not (module_name and name):
        names = f"{builtin} or " if builtin else ""
        raise ValueError(f'{where}: write {names}"package.module:{kind}"')
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"{where}: cannot import {module_name} ({error}); PYTHONPATH must hold its folder, the "
            "current one is not searched"
        ) from error
    function = getattr(module, name, None)
    if function is None:
        raise ValueError(f"{where}: {module_name} has no {name!r}")
    if not callable(function):
        raise ValueError(f"{where}: is a {type(function).__name__}, not a {kind}")
    return function
