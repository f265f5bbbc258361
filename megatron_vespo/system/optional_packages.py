"""Checks packages that Megatron-Core uses only if they can be imported.

In most places Megatron takes an ImportError for a missing package, so a broken package silently changes what
a run computes with. In other places, and with other errors, Megatron's own import fails. Therefore this
module tries these imports first.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from functools import cache
from typing import Any

TRANSFORMER_ENGINE = "transformer_engine"
DEEP_EP = "deep_ep"
# Package -> what Megatron-Core imports from it: module -> names. SGLang's sgl-deep-ep provides deep_ep.
IMPORTS = {
    TRANSFORMER_ENGINE: {
        "transformer_engine": (),
        "transformer_engine.pytorch.fp8": ("FP8GlobalStateManager", "fp8_autocast", "fp8_model_init"),
    },
    DEEP_EP: {"deep_ep": ("Buffer",), "deep_ep.utils": ("EventHandle", "EventOverlap")},
}


@cache
def import_error(package: str) -> str | None:
    """Why Megatron cannot use the package, in one line; None if it can.

    Call it before Megatron is imported. It hides a broken package, so that Megatron sees it as missing.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            for module, names in IMPORTS[package].items():
                found = importlib.import_module(module)
                for name in names:
                    if not hasattr(found, name):
                        raise ImportError(f"cannot import name {name!r} from {module!r}")
    except Exception as error:  # a package may raise anything while it is imported
        if not (isinstance(error, ModuleNotFoundError) and error.name == package):
            hidden: dict[str, Any] = sys.modules
            hidden[package] = None  # from now on, importing it raises ModuleNotFoundError
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def check_transformer_engine(transformer_impl: str, where: str) -> None:
    """ValueError if the flags need Transformer Engine and its import fails; `where` names this process."""
    if transformer_impl == "transformer_engine":
        _refuse(TRANSFORMER_ENGINE, where, "--transformer-impl local runs Megatron's own, slower layers")


def check_deep_ep(dispatcher: str, flex_backend: str | None, where: str) -> None:
    """ValueError if the flags need DeepEP and its import fails. Call it only where there is a GPU."""
    if dispatcher == "flex" and flex_backend == "deepep":
        _refuse(DEEP_EP, where, "--moe-token-dispatcher-type alltoall does without it")


def _refuse(package: str, where: str, instead: str) -> None:
    if error := import_error(package):
        raise ValueError(f"{where}: no {package} ({error}); install it as docs/install.md says, or {instead}")
