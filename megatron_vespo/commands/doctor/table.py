"""The findings of all nodes as one table, which names the nodes that differ from the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_vespo.commands.doctor.finding import Finding, Status

MUCH_SLOWER = 3.0  # than the median node
ORDER: tuple[Status, ...] = ("ok", "warn", "FAIL")


@dataclass(frozen=True)
class Line:
    check: str
    status: Status
    text: str
    fix: str = ""


def lines_of(findings: Mapping[str, Sequence[Finding]]) -> list[Line]:
    """One line per check, in the order in which checks first appear; `findings` is by name of the node."""
    names = list(dict.fromkeys(finding.check for found in findings.values() for finding in found))
    return [
        _line(name, {node: f for node, found in findings.items() for f in found if f.check == name})
        for name in names
    ]


def _line(check: str, by_node: dict[str, Finding]) -> Line:
    status: Status = max(
        (finding.status for finding in by_node.values()), key=lambda status: ORDER.index(status)
    )
    if len(by_node) == 1:
        [finding] = by_node.values()
        return Line(check, finding.status, finding.text, finding.fix)
    if status != "ok":
        return _of_the_bad(check, status, by_node)
    if any(finding.alike for finding in by_node.values()):
        texts = Counter(finding.text for finding in by_node.values())
        if len(texts) > 1:
            return _odd_ones_out(check, texts, by_node)
    if slow := _much_slower(by_node):
        others = max(finding.measured or 0.0 for finding in by_node.values())
        said = ", ".join(f"{node} {by_node[node].measured:.2f} GB/s" for node in slow)
        return Line(
            check, "warn", f"{said}, others up to {others:.2f}", "compare these nodes with the others"
        )
    text = next((finding.text for finding in by_node.values() if finding.text), "")
    return Line(check, "ok", text)


def _of_the_bad(check: str, status: Status, by_node: dict[str, Finding]) -> Line:
    """Groups nodes with the same text, the worst first."""
    nodes_of: dict[str, list[str]] = {}
    for node, finding in sorted(by_node.items(), key=lambda item: -ORDER.index(item[1].status)):
        if finding.status != "ok":
            nodes_of.setdefault(finding.text, []).append(node)
    fix = next(finding.fix for finding in by_node.values() if finding.status == status)
    parts = [
        text if len(nodes) == len(by_node) else f"{', '.join(nodes)}: {text}"
        for text, nodes in nodes_of.items()
    ]
    return Line(check, status, "; ".join(parts), fix)


def _odd_ones_out(check: str, texts: Counter[str], by_node: dict[str, Finding]) -> Line:
    usual = texts.most_common(1)[0][0]
    odd = [f"{node}: {finding.text}" for node, finding in by_node.items() if finding.text != usual]
    return Line(check, "FAIL", f"{'; '.join(odd)}; the others: {usual}", "make all nodes the same")


def _much_slower(by_node: dict[str, Finding]) -> list[str]:
    measured = {node: finding.measured for node, finding in by_node.items() if finding.measured is not None}
    if len(measured) < 2:
        return []
    usual = sorted(measured.values())[len(measured) // 2]
    return [node for node, value in measured.items() if value * MUCH_SLOWER < usual]


def as_text(lines: Sequence[Line], width: int) -> str:
    """One line per check, with the fix below it."""
    widest = max(len(line.check) for line in lines)
    rows = []
    for line in lines:
        rows.append(f"{line.check:{widest}}  {line.status:4}  {line.text}"[:width])
        if line.status != "ok" and line.fix:
            rows.append(f"{'':{widest}}        -> {line.fix}")
    counts = Counter(line.status for line in lines)
    bad = ", ".join(f"{counts[status]} {status}" for status in reversed(ORDER[1:]) if counts[status])
    return "\n".join([*rows, f"{len(lines)} checks: {bad or 'all ok'}"])
