"""Reads checkpoints whose arguments hold objects of this package, as version 0.1 wrote them.

These classes may have moved or gone since. Nothing needs the objects: plain values beside them say the same.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

PACKAGE = "megatron_vespo"


class StandIn:
    """Takes the place of an object or function of this package."""

    def __init__(self, *arguments: Any, **options: Any):
        pass


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return StandIn if module.partition(".")[0] == PACKAGE else super().find_class(module, name)


# what torch.load needs from its `pickle_module`
_PICKLE = SimpleNamespace(
    __name__=__name__, Unpickler=_Unpickler, load=pickle.load, UnpicklingError=pickle.UnpicklingError
)


@contextlib.contextmanager
def stand_ins() -> Iterator[None]:
    """Inside, `torch.load` with weights_only=False makes a StandIn of every object of this package."""
    load = torch.load

    def with_stand_ins(*arguments: Any, **options: Any) -> Any:
        more = {"pickle_module": _PICKLE} if options.get("weights_only") is False else {}
        return load(*arguments, **options, **more)

    with patch.object(torch, "load", with_stand_ins):
        yield
