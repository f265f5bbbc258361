"""The sample responses in report.html: those of the first, a middle and the last recorded step."""

from __future__ import annotations

from typing import Any

from megatron_vespo.observability.html_parts import safe, table, text_block
from megatron_vespo.observability.run_files import RunFiles

MAX_PROMPT, MAX_RESPONSE, MAX_SHORT = 2000, 6000, 300  # characters
MAX_RESPONSES, MAX_TURNS = 4, 20  # of a step, of a response


def samples_section(run: RunFiles) -> str:
    rows = [row for row in run.samples if isinstance(row.get("step"), int)]
    steps = sorted({row["step"] for row in rows})
    if not steps:
        return ""
    parts = []
    for step in sorted({steps[0], steps[len(steps) // 2], steps[-1]}):
        parts.append(f"<h3>Optimizer step {step:,}</h3>")
        parts += [_response(row) for row in rows if row["step"] == step][:MAX_RESPONSES]
    return "".join(parts)


def _response(row: dict) -> str:
    numbers = [
        ("reward", _number(row.get("reward"))),
        ("advantage", _number(row.get("advantage"))),
        ("log W", _number(row.get("log_w"))),
        ("weight", _number(row.get("weight"))),
        ("tokens", safe(row.get("sampled_tokens", "-"), MAX_SHORT)),
        ("end", safe(row.get("finish_reason", "-"), MAX_SHORT)),
    ]
    parts = row.get("parts")
    if isinstance(parts, dict) and parts:
        numbers += [(f"reward: {safe(name, 40)}", _number(value)) for name, value in list(parts.items())[:10]]
    heading, cells = zip(*numbers, strict=True)
    why = str(row.get("why", "response"))
    blocks = [
        f"<strong>{safe(why[:1].upper() + why[1:], MAX_SHORT)}</strong>",
        table([cells], heading, numbers=range(len(heading))),
        f'<div class="label">prompt</div>{text_block(row.get("prompt", ""), MAX_PROMPT)}',
    ]
    if row.get("answer") not in (None, ""):
        blocks.append(f'<div class="label">answer</div>{text_block(row["answer"], MAX_SHORT)}')
    blocks += _turns(row.get("turns"))
    if row.get("error"):
        blocks.append(f'<div class="label">reward failed</div>{text_block(row["error"], MAX_SHORT)}')
    return f'<div class="response">{"".join(blocks)}</div>'


def _turns(turns: Any) -> list[str]:
    turns = [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    blocks, left = [], MAX_RESPONSE
    for turn in turns[:MAX_TURNS]:
        writer, text = str(turn.get("writer", "")), str(turn.get("text", ""))
        label = "response" if writer == "policy" else safe(writer, 40)
        blocks.append(f'<div class="label">{label}</div>{text_block(text, max(left, 200))}')
        left -= len(text)
    if len(turns) > MAX_TURNS:
        blocks.append(f'<div class="label">and {len(turns) - MAX_TURNS} more turns</div>')
    return blocks


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else safe("-" if value is None else value, 40)
