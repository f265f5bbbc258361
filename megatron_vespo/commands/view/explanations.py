"""What each metric means, from docs/reference/metrics.md, where the documentation lies beside the package."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import megatron_vespo

PAGE = Path(megatron_vespo.__file__).parents[1] / "docs/reference/metrics.md"


@functools.cache
def explanations() -> dict[str, str]:
    """Metric -> meaning; {} if the page is not here. A part in angle brackets stands for any text."""
    return parse(PAGE.read_text(encoding="utf-8")) if PAGE.is_file() else {}


def parse(page: str) -> dict[str, str]:
    """The rows of the page's tables; a row may explain several metrics."""
    found: dict[str, str] = {}
    before = ""
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("| `") or len(cells) != 2:
            continue
        names, meaning = re.findall(r"`([^`]+)`", cells[0]), _plain(cells[1])
        if "the same" in meaning:
            meaning += f" (as for {before})"
        else:
            before = f"{', '.join(names)}: {meaning}"
        found |= dict.fromkeys(names, meaning)
    return found


def _plain(markdown: str) -> str:
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", markdown)
    return text.replace("`", "")
