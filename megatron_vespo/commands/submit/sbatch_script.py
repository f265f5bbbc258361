"""A job script of slurm/ filled in: other #SBATCH lines, variables, the flags of the command. Pure text."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence

_DIRECTIVE = re.compile(r"#SBATCH --([a-z-]+)(?:=(.+))?")
_PLAIN = re.compile(r"[^\s\"'\\#]+")  # what sbatch takes as it stands
# minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes, days-hours:minutes:seconds
_TIME = re.compile(
    r"(?P<days>\d+)-(?P<h>\d+)(:(?P<m>\d+)(:(?P<s>\d+))?)?"
    r"|((?P<hours>\d+):(?=\d+:))?(?P<minutes>\d+)(:(?P<seconds>\d+))?"
)
_NO_LIMIT = ("infinite", "unlimited")
_BEGIN = "set -euo pipefail\n"  # what is filled in stands behind it
_HETJOB = "#SBATCH hetjob"  # between the components of a heterogeneous job
# what a component does not take from the one before
_OF_A_COMPONENT = ("ntasks-per-node", "gpus-per-node", "exclusive", "mem")


def directives(script: str) -> dict[str, str | None]:
    """The options of its #SBATCH lines, of the first component's; None for one without a value.

    Example: "#SBATCH --nodes=1\\n#SBATCH --requeue\\n" -> {"nodes": "1", "requeue": None}
    """
    first = script.partition(f"\n{_HETJOB}\n")[0]
    found = (_DIRECTIVE.fullmatch(line) for line in first.splitlines())
    return {match[1]: match[2] and _unquoted(match[2]) for match in found if match}


def render(
    template: str,
    options: Mapping[str, str | None],
    leave_out: Sequence[str],
    variables: Mapping[str, str],
    flags: Sequence[str],
    second: Mapping[str, str | None] | None = None,
) -> str:
    """`template` with `options` in place of its own or behind them, without those of `leave_out`.

    `variables` are exported and `flags` become the script's arguments. With `second` it is a heterogeneous
    job, whose second component has these options, and the template's where SLURM does not hand them on.
    """
    assert template.count(_BEGIN) == 1, f"a job script says {_BEGIN!r} once"
    own = directives(template)
    lines = _header(own | dict(options), leave_out)
    if second is not None:
        of_both = {name: own[name] for name in _OF_A_COMPONENT if name in own}
        lines += [_HETJOB, *_header(of_both | dict(second), leave_out)]
    head, body = template.split(_BEGIN)
    head = "".join(f"{line}\n" for line in head.splitlines() if not line.startswith("#SBATCH "))
    exports = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    filled_in = "\n".join([*exports, "set -- \\\n" + " \\\n".join(_by_flag(flags))])
    return head + "\n".join(lines) + f"\n{_BEGIN}\n{filled_in}\n" + body


def _header(options: Mapping[str, str | None], leave_out: Sequence[str]) -> list[str]:
    return [
        f"#SBATCH --{name}" + ("" if value is None else f"={_quoted(value)}")
        for name, value in options.items()
        if name not in leave_out
    ]


def _quoted(value: str) -> str:
    """As sbatch reads an #SBATCH line: a backslash escapes, also within double quotes."""
    if "\n" in value or not value.isprintable():
        raise ValueError(f"--sbatch {value!r}: a value is one line of printable characters")
    if _PLAIN.fullmatch(value):
        return value
    return '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'


def _unquoted(text: str) -> str:
    return "".join(shlex.split(text))


def _by_flag(flags: Sequence[str]) -> list[str]:
    """A line for each flag with its values."""
    lines: list[str] = []
    for word in flags:
        if word.startswith("--") or not lines:
            lines.append("    " + shlex.quote(word))
        else:
            lines[-1] += " " + shlex.quote(word)
    return lines


def seconds_before_limit(script: str) -> int:
    """How long before its time limit the script is told, by --signal=B:USR1@SECONDS."""
    match = re.fullmatch(r"B:USR1@(\d+)", directives(script).get("signal") or "")
    if match is None:
        raise ValueError("--signal: the script's own form is B:USR1@SECONDS")
    return int(match[1])


def time_limit(text: str) -> float:
    """Seconds of a time limit as sbatch takes it; infinity for none.

    Example: "30" -> 1800, "10:00" -> 600, "1:00:00" -> 3600, "2-12" -> 216000. ValueError for another text.
    """
    if text.lower() in _NO_LIMIT:
        return math.inf
    match = _TIME.fullmatch(text)
    if match is None:
        raise ValueError(
            f"--time {text!r}: must be MINUTES, [HOURS:]MINUTES:SECONDS or DAYS-HOURS[:MINUTES[:SECONDS]]"
        )
    part = {name: int(digits or 0) for name, digits in match.groupdict().items()}
    days, hours = part["days"], part["h"] + part["hours"]
    minutes, seconds = part["m"] + part["minutes"], part["s"] + part["seconds"]
    return 60 * (60 * (24 * days + hours) + minutes) + seconds or math.inf  # 0: none


def checked_time_limit(template: str, options: Mapping[str, str | None], longer_than: int = 0) -> None:
    """ValueError for a job whose time limit is none of SLURM's, or is not longer than so many seconds."""
    text = (directives(template) | dict(options)).get("time") or ""
    if (limit := time_limit(text)) <= longer_than:
        raise ValueError(
            f"--time {text}: {limit:g} seconds, must be longer than the {longer_than} before its end at "
            "which the run is asked to save (--signal)"
        )
