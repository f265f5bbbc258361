"""What report.html says about how a run was started: starts, flags, software and machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from megatron_vespo.observability.html_parts import folded, safe, table, text_block
from megatron_vespo.observability.run_files import RunFiles, outcome_of

MAX_VALUE, MAX_COMMAND, MAX_STARTS = 400, 20_000, 30
# packages that decide numbers, shown without unfolding
MAIN_PACKAGES = (
    "megatron-vespo", "megatron-core", "torch", "sglang", "transformers", "transformer_engine", "flash-attn",
    "ray", "numpy", "triton",
)  # fmt: skip


def starts_section(run: RunFiles) -> str:
    rows = []
    for number, start in list(enumerate(run.starts, start=1))[-MAX_STARTS:]:
        outcome = outcome_of(start)
        origin = start.get("resumed_from")
        rows.append(
            (
                str(number),
                safe(start.get("started", "-"), 40),
                safe(outcome.get("ended", "-"), 40),
                safe(outcome.get("how", "not recorded"), 40),
                f"<code>{safe(origin, MAX_VALUE)}</code>" if origin else "the beginning",
            )
        )
    parts = [table(rows, ("start", "started", "ended", "end", "from"))]
    for number, start in enumerate(run.starts, start=1):
        for restart in (start.get("trainer_restarts") or [])[-MAX_STARTS:]:
            parts.append(f"<p>Start {number}: {safe(restart, MAX_VALUE)}</p>")
    if command := run.last_start.get("command"):
        folder = run.last_start.get("folder")
        where = f" in <code>{safe(folder, MAX_VALUE)}</code>" if folder else ""
        parts.append(f"<h3>How to repeat it</h3><p>The command of the last start{where}:</p>")
        parts.append(text_block(command, MAX_COMMAND))
        if "<left out>" in command:
            parts.append('<p class="soft">Keys and passwords are left out.</p>')
        parts.append(_source(run.last_start.get("source")))
    return "".join(parts)


def _source(source: Any) -> str:
    if not isinstance(source, Mapping):
        return ""
    changed = source.get("changed") or []
    files = "1 file" if len(changed) == 1 else f"{len(changed)} files"
    changes = f", with changes in {files}" if changed else ", without changes"
    return f"<p>Source: commit <code>{safe(source.get('commit', '-'), 80)}</code>{changes}.</p>"


def flags_section(run: RunFiles) -> str:
    start = run.last_start
    changed, arguments = start.get("changed") or {}, start.get("arguments") or {}
    recipes = [
        f"<p>Recipe <code>{safe(name, MAX_VALUE)}</code></p>{text_block(text, MAX_COMMAND)}"
        for name, text in (start.get("recipes") or {}).items()
    ]
    differ = folded(f"{len(changed)} values that differ from the defaults", _values(changed))
    every = folded(f"All {len(arguments)} arguments, also derived ones", _values(arguments))
    opened = differ.replace("<details>", "<details open>", 1)
    return "".join(recipes) + opened + every


def setup_section(run: RunFiles) -> str:
    start = run.last_start
    packages, machine = start.get("packages") or {}, start.get("machine") or {}
    main = {name: packages[name] for name in MAIN_PACKAGES if name in packages}
    parts = []
    if machine:
        parts.append("<h3>Machine</h3>" + _values(machine))
    if nodes := start.get("nodes"):
        parts.append(
            folded(f"Nodes of the Ray cluster ({len(nodes)})", text_block(_text(nodes), MAX_COMMAND))
        )
    if packages:
        patches = f"<p>Patches: {safe(start['patches'], MAX_VALUE)}</p>" if "patches" in start else ""
        parts.append("<h3>Software</h3>" + _values(main) + patches)
        parts.append(folded(f"All {len(packages)} packages", _values(packages)))
    for name, variables in (start.get("environment") or {}).items():
        set_ones = {key: value for key, value in (variables or {}).items() if value is not None}
        parts.append(folded(f"Environment variables, {safe(name, 40)} ({len(set_ones)})", _values(set_ones)))
    return "".join(parts)


def _values(values: Mapping[str, Any]) -> str:
    return table(
        (f"<code>{safe(name, 100)}</code>", f"<code>{safe(_text(value), MAX_VALUE)}</code>")
        for name, value in values.items()
    )


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
