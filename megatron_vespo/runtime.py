"""The one hook for packages that adapt a machine to Megatron and SGLang, such as one without CUDA."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points


@cache
def load_runtime_plugins() -> None:
    """Call every installed `megatron_vespo.runtime` entry point, once, before Megatron is imported."""
    for plugin in entry_points(group="megatron_vespo.runtime"):
        plugin.load()()
