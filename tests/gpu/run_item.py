"""One item in a process of its own, which `run.py` starts and ends."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import traceback
from pathlib import Path

from tests.gpu.items.context import Context, Skip
from tests.gpu.items.table import ITEMS, Item


def result_of(item: Item, context: Context) -> dict:
    """outcome "ok", "skipped" or "failed", the reason of the latter two, and the figures."""
    module, _, function = item.function.partition(":")
    try:
        figures = getattr(importlib.import_module(f"tests.gpu.items.{module}"), function)(context)
    except Skip as skip:
        return {"outcome": "skipped", "reason": str(skip), "figures": {}}
    except Exception as error:
        traceback.print_exc()
        return {"outcome": "failed", "reason": f"{type(error).__name__}: {error}"[-2000:], "figures": {}}
    return {"outcome": "ok", "reason": "", "figures": figures}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=[item.name for item in ITEMS])
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--result", type=Path, required=True)
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    [item] = [item for item in ITEMS if item.name == options.name]
    result = result_of(item, Context(options.device, options.folder))
    options.result.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
