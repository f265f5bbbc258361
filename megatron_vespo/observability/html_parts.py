"""Pieces of an HTML page: text that cannot be anything but text, tables, and the style of report.html."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Iterable, Sequence

STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5b6573; --line: #d9dee5; --back: #fff;
  --panel: #f6f8fa; --good: #00704f; --bad: #b3400a; --c1: #0072b2; --c2: #c07f00; --c3: #008660;
  --c4: #d55e00; --c5: #b8578c; --c6: #3a95cf; --c7: #a89a00; --c8: #7d8793; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --soft: #9aa5b4; --line: #333c49;
  --back: #12161c; --panel: #1a2029; --good: #3fc796; --bad: #ff9466; --c1: #4aa8e8; --c2: #e69f00;
  --c3: #2fbf8f; --c4: #ff8340; --c5: #dd8fbb; --c6: #7cc4f0; --c7: #e0d24a; --c8: #98a2af; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 78rem; color: var(--ink); background: var(--back);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.5rem; margin: 0.5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 0.5rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1rem 0 0.25rem; }
p { margin: 0.4rem 0; }
nav a { margin-right: 1rem; }
a { color: var(--c1); }
.soft, figcaption small { color: var(--soft); }
.outcome { border-left: 0.3rem solid var(--c8); background: var(--panel); padding: 0.6rem 0.9rem;
  overflow-wrap: anywhere; }
.outcome.good { border-color: var(--good); }
.outcome.bad { border-color: var(--bad); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 0.5rem 0; }
th, td { text-align: left; vertical-align: top; padding: 0.2rem 1rem 0.2rem 0;
  border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
th { font-weight: 600; overflow-wrap: normal; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
code, pre { font: 13px/1.45 ui-monospace, "Cascadia Mono", Consolas, "DejaVu Sans Mono", monospace; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--panel); padding: 0.5rem 0.7rem;
  margin: 0.3rem 0; border-radius: 4px; unicode-bidi: plaintext; }
details { margin: 0.5rem 0; }
summary { cursor: pointer; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr));
  gap: 1.2rem; }
figure { margin: 0; min-width: 0; }
figcaption { font-weight: 600; }
figcaption small { font-weight: 400; display: block; line-height: 1.35; }
.key { white-space: nowrap; margin-right: 0.7rem; }
.key b { display: inline-block; width: 0.75rem; height: 0.28rem; margin-right: 0.25rem;
  vertical-align: middle; background: currentColor; }
svg { display: block; width: 100%; height: auto; }
svg text { font: 11px system-ui, Roboto, Arial, sans-serif; fill: var(--soft); }
.grid { stroke: var(--line); stroke-width: 1; }
.mark { stroke: var(--ink); stroke-width: 1; stroke-dasharray: 4 3; }
.resume { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 1 3; }
.curve { fill: none; stroke: currentColor; stroke-width: 1.8; stroke-linejoin: round; }
.point { fill: currentColor; }
.band { fill: currentColor; opacity: 0.16; }
.bar { fill: currentColor; }
.hit { fill: transparent; }
.hit:hover { fill: var(--ink); opacity: 0.12; }
.c1 { color: var(--c1); } .c2 { color: var(--c2); } .c3 { color: var(--c3); } .c4 { color: var(--c4); }
.c5 { color: var(--c5); } .c6 { color: var(--c6); } .c7 { color: var(--c7); } .c8 { color: var(--c8); }
.response { border: 1px solid var(--line); border-radius: 6px; padding: 0.6rem 0.9rem; margin: 0.8rem 0; }
.response .label { color: var(--soft); font-size: 0.85rem; margin-top: 0.4rem; }
@media (max-width: 600px) { body { padding: 0.6rem; } th, td { padding-right: 0.6rem; } }
@media print { :root { color-scheme: light; --ink: #000; --soft: #444; --line: #ccc; --back: #fff;
    --panel: #f3f3f3; --good: #00704f; --bad: #b3400a; --c1: #0072b2; --c2: #c07f00; --c3: #008660;
    --c4: #d55e00; --c5: #b8578c; --c6: #3a95cf; --c7: #a89a00; --c8: #7d8793; }
  body { max-width: none; padding: 0; font-size: 10pt; } nav { display: none; }
  .charts { grid-template-columns: repeat(2, 1fr); } figure, .response, tr { break-inside: avoid; }
  h2, h3 { break-after: avoid; } }
"""


def safe(value: object, limit: int | None = None) -> str:
    """`value` as HTML text, at most `limit` characters of it; the rest is counted.

    What HTML cannot hold is shown as an escape: control characters, lone surrogates and non-characters.
    """
    text, rest = str(value), ""
    if limit is not None and len(text) > limit:
        text, rest = text[:limit], f" … and {len(text) - limit:,} more characters"
    return html.escape("".join(map(_shown, text))) + rest


def _shown(character: str) -> str:
    code = ord(character)
    control = (code < 0x20 and character not in "\n\t") or 0x7F <= code < 0xA0
    hidden = 0xD800 <= code < 0xE000 or 0xFDD0 <= code < 0xFDF0 or code & 0xFFFE == 0xFFFE
    if not (control or hidden):
        return character
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def table(rows: Iterable[Sequence[str]], heading: Sequence[str] = (), numbers: Sequence[int] = ()) -> str:
    """A table of cells that are HTML already. Columns `numbers` are right-aligned.

    Without a heading the first cell of a row is its title.
    """
    lines = []
    if heading:
        cells = "".join(f'<th scope="col"{_align(i, numbers)}>{cell}</th>' for i, cell in enumerate(heading))
        lines.append(f"<tr>{cells}</tr>")
    for row in rows:
        cells = [f"<td{_align(i, numbers)}>{cell}</td>" for i, cell in enumerate(row)]
        if not heading:
            cells[0] = f'<th scope="row">{row[0]}</th>'
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>' if lines else ""


def _align(column: int, numbers: Sequence[int]) -> str:
    return ' class="number"' if column in numbers else ""


def text_block(text: object, limit: int) -> str:
    """Text of any script and direction as it is, in a box of its own."""
    # HTML drops a newline right after <pre>
    return f'<pre dir="auto">\n{safe(text, limit)}</pre>'


def folded(title: str, content: str) -> str:
    return f"<details><summary>{title}</summary>{content}</details>" if content else ""


def page(title: str, body: str) -> str:
    """A page without scripts that can load nothing: the policy in it allows its own style alone."""
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{safe(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )
