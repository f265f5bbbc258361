"""patches/apply.py as a module."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]


def load_apply() -> ModuleType:
    spec = importlib.util.spec_from_file_location("vespo_patches_apply", ROOT / "patches/apply.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


apply = load_apply()
