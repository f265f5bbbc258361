"""The one hook for packages that adapt a machine to Megatron and SGLang, such as one without CUDA."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points

GROUP = "megatron_vespo.runtime"


def has_runtime_plugins() -> bool:
    """Whether such a package is installed."""
    return bool(entry_points(group=GROUP))


@cache
def load_runtime_plugins() -> None:
    """Call every installed `megatron_vespo.runtime` entry point, once, before Megatron is imported."""
    for plugin in entry_points(group=GROUP):
        plugin.load()()
