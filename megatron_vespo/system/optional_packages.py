"""Packages that Megatron-Core uses if they can be imported, and does without if not.

Megatron takes an ImportError for an absent package in most places, so a broken one changes in silence what a
run computes with. In others, and with other errors, its own import ends. Here its imports are tried first.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from functools import cache
from typing import Any

TRANSFORMER_ENGINE = "transformer_engine"
DEEP_EP = "deep_ep"
# Package -> what Megatron-Core imports of it: module -> names. SGLang's sgl-deep-ep is a deep_ep.
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

    To be asked before Megatron is imported. A broken package is hidden from the process: absent to Megatron.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            for module, names in IMPORTS[package].items():
                found = importlib.import_module(module)
                for name in names:
                    if not hasattr(found, name):
                        raise ImportError(f"cannot import name {name!r} from {module!r}")
    except Exception as error:
        if not (isinstance(error, ModuleNotFoundError) and error.name == package):
            hidden: dict[str, Any] = sys.modules
            hidden[package] = None  # an import of it is a ModuleNotFoundError from now on
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def check_transformer_engine(transformer_impl: str, where: str) -> None:
    """ValueError if these flags want its layers and it cannot be imported; `where` names this process."""
    if transformer_impl == "transformer_engine":
        _refuse(TRANSFORMER_ENGINE, where, "--transformer-impl local runs Megatron's own, slower layers")


def check_deep_ep(dispatcher: str, flex_backend: str | None, where: str) -> None:
    """The same of DeepEP. For processes that have a GPU: without one, it cannot be imported."""
    if dispatcher == "flex" and flex_backend == "deepep":
        _refuse(DEEP_EP, where, "--moe-token-dispatcher-type alltoall does without it")


def _refuse(package: str, where: str, instead: str) -> None:
    if error := import_error(package):
        raise ValueError(f"{where}: no {package} ({error}); install it as docs/install.md says, or {instead}")
