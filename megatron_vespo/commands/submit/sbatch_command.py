"""Builds the sbatch command line for a script of slurm/. Pure text."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

_DIRECTIVE = re.compile(r"#SBATCH --([a-z-]+)(?:=(.+))?")
# minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes, days-hours:minutes:seconds
_TIME = re.compile(
    r"(?P<days>\d+)-(?P<h>\d+)(:(?P<m>\d+)(:(?P<s>\d+))?)?"
    r"|((?P<hours>\d+):(?=\d+:))?(?P<minutes>\d+)(:(?P<seconds>\d+))?"
)
_NO_LIMIT = ("infinite", "unlimited")
# sbatch applies these lines of a script only to the first component of a heterogeneous job
_OF_A_COMPONENT = ("ntasks-per-node", "exclusive", "mem")


def directives(script: str) -> dict[str, str | None]:
    """The options of the #SBATCH lines; None for an option without a value.

    Example: "#SBATCH --nodes=1\\n#SBATCH --requeue\\n" -> {"nodes": "1", "requeue": None}
    """
    found = (_DIRECTIVE.fullmatch(line) for line in script.splitlines())
    return {match[1]: match[2] and "".join(shlex.split(match[2])) for match in found if match}


def sbatch_command(
    script: Path,
    options: Mapping[str, str | None],
    variables: Mapping[str, str],
    flags: Sequence[str],
    second: Mapping[str, str | None] | None = None,
) -> list[str]:
    """The words of the sbatch command; `options` override the script's #SBATCH lines.

    The script exports `variables`, so the job has them with any --export. With `second` the job has two
    components. The second one gets these options, and those of the script that SLURM applies only to the
    first. ValueError for flags that sbatch would change.
    """
    words = ["sbatch", "--parsable", *_words(options)]
    if second is not None:
        own = directives(script.read_text())
        of_both = {name: own[name] for name in _OF_A_COMPONENT if name in own}
        words += [":", *_words(of_both | dict(second))]
    assignments = [f"{name}={value}" for name, value in variables.items()]
    return [*words, str(script), *assignments, *_without_lone_colons(flags)]


def _words(options: Mapping[str, str | None]) -> list[str]:
    return [f"--{name}" + ("" if value is None else f"={value}") for name, value in options.items()]


def _without_lone_colons(flags: Sequence[str]) -> list[str]:
    """Joins a flag and its value `:` into one word, because sbatch drops every word that is only a colon."""
    words: list[str] = []
    for word in flags:
        if word != ":":
            words.append(word)
        elif words and words[-1].startswith("--") and "=" not in words[-1]:
            words[-1] += "=:"
        else:
            raise ValueError(f"{' '.join([*words[-2:], word])}: sbatch drops the word ':'")
    return words


def shown(command: Sequence[str]) -> str:
    """The command for pasting: one line for each option, and for each flag with its values."""
    lines = [command[0]]
    for word in command[1:]:
        begins = word == ":" or word.startswith(("--", "VESPO_")) or word.endswith(".sbatch")
        if begins or not lines[-1].startswith("--"):
            lines.append(shlex.quote(word))
        else:
            lines[-1] += f" {shlex.quote(word)}"
    return " \\\n    ".join(lines)


def seconds_before_limit(options: Mapping[str, str | None]) -> int:
    """How many seconds before the time limit SLURM signals the script: --signal=B:USR1@SECONDS."""
    match = re.fullmatch(r"B:USR1@(\d+)", options.get("signal") or "")
    if match is None:
        raise ValueError("--signal: the script's own form is B:USR1@SECONDS")
    return int(match[1])


def time_limit(text: str) -> float:
    """Seconds of a time limit in sbatch's format; infinity for no limit.

    Example: "30" -> 1800, "10:00" -> 600, "1:00:00" -> 3600, "2-12" -> 216000. ValueError for other texts.
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
    return 60 * (60 * (24 * days + hours) + minutes) + seconds or math.inf  # 0: no limit


def check_time_limit(options: Mapping[str, str | None], longer_than: int = 0) -> None:
    """ValueError if the time limit is no SLURM format, or not longer than `longer_than` seconds."""
    text = options.get("time") or ""
    if (limit := time_limit(text)) <= longer_than:
        raise ValueError(
            f"--time {text}: {limit:g} seconds, must be longer than the {longer_than} before its end at "
            "which the run is asked to save (--signal)"
        )
