"""Loads packages that adapt a machine, such as one without CUDA, to Megatron and SGLang.

This happens before either is imported.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points

from megatron_vespo.system.optional_packages import IMPORTS, import_error

GROUP = "megatron_vespo.runtime"
# what SGLang calls in every process of an engine when new weights come
WEIGHT_LOADER = "megatron_vespo.weight_sync.engine_loader.load"


def has_runtime_plugins() -> bool:
    """Whether such a package is installed."""
    return bool(entry_points(group=GROUP))


@cache
def load_runtime_plugins() -> None:
    """Call every installed `megatron_vespo.runtime` entry point, once, before Megatron is imported."""
    for plugin in entry_points(group=GROUP):
        plugin.load()()


def prepare_for_megatron() -> None:
    """Hide broken packages that would end Megatron's import, then run the plugins, which import it."""
    for package in IMPORTS:
        import_error(package)
    load_runtime_plugins()
