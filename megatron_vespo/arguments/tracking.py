"""Flags of experiment trackers and of the Prometheus endpoint."""

from __future__ import annotations

import argparse
import re
from argparse import Namespace
from collections.abc import Sequence, Set
from dataclasses import dataclass

from megatron_vespo.observability.trackers.packages import NAMES, PACKAGES, PROMETHEUS, check_installed
from megatron_vespo.system.settings import Settings


def add_tracking_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "trackers",
        "--tracker NAME (wandb, mlflow, swanlab ...), --prometheus-port PORT: see docs/guides/tracking.md",
    )
    add = group.add_argument
    add("--tracker", action="append", choices=NAMES, metavar="NAME", dest="trackers",
        help="wandb, mlflow, swanlab, tensorboard or none; repeatable; default: tensorboard")  # fmt: skip
    add("--tracker-project", default="megatron-vespo", metavar="NAME",
        help="project, in MLflow the experiment, of the run")  # fmt: skip
    add(
        "--tracker-run-name", metavar="NAME", help="name of the run; default: that of the folder --output-dir"
    )
    add("--tracker-group", metavar="NAME", help="group of runs that this one belongs to")
    add("--tracker-tag", action="append", metavar="TAG", dest="tracker_tags", help="a tag; may be repeated")
    add("--tracker-offline", action="store_true", help="write files in --output-dir, contact no server")
    add("--prometheus-port", type=int, metavar="PORT",
        help="serve the newest metrics and the run's health at /metrics; 0: a free port")  # fmt: skip
    add("--prometheus-host", default="127.0.0.1", metavar="ADDRESS", help="the address that it listens on")


@dataclass(frozen=True)
class TrackingSettings(Settings):
    """Named like the flags; `trackers` is None where --tracker is not given."""

    trackers: tuple[str, ...] | None
    tracker_project: str
    tracker_run_name: str | None
    tracker_group: str | None
    tracker_tags: tuple[str, ...] | None
    tracker_offline: bool
    prometheus_port: int | None
    prometheus_host: str

    @property
    def names(self) -> tuple[str, ...]:
        """The trackers without `none`, each once."""
        given = ("tensorboard",) if self.trackers is None else self.trackers
        return tuple(dict.fromkeys(name for name in given if name != "none"))


def check_tracking(args: Namespace) -> None:
    """ValueError for flags that contradict each other. It asks for no package."""
    names = set(args.trackers or ())
    if "none" in names and names - {"none"}:
        others = ", ".join(sorted(names - {"none"}))
        raise ValueError(f"--tracker none contradicts --tracker {others}: leave one of them out")
    for flag in ("tracker_project", "tracker_run_name", "tracker_group", "tracker_tags"):
        value = getattr(args, flag)
        for text in value if isinstance(value, list) else [value]:
            if text is not None and not text.strip():
                raise ValueError(
                    f"--{flag.removesuffix('s').replace('_', '-')} is empty: give a name or leave it out"
                )
    _check_names(names, args.tracker_project, args.tracker_tags or ())
    port = args.prometheus_port
    if port is not None and not 0 <= port <= 65535:
        raise ValueError(f"--prometheus-port is {port}, must be between 0 and 65535")


def _check_names(trackers: Set[str], project: str, tags: Sequence[str]) -> None:
    """ValueError for what a package would refuse only after the run has begun, or when it is sent later."""
    rules = {
        "wandb": (r"[^/\\#?%:]{1,128}", "at most 128 characters, none of / \\ # ? % :"),
        "swanlab": (r"[0-9a-zA-Z_+.-]{1,100}", "at most 100 letters, digits and _ - + ."),
    }
    for name, (pattern, allowed) in rules.items():
        if name in trackers and not re.fullmatch(pattern, project):
            raise ValueError(f"--tracker-project is {project!r}; --tracker {name} allows {allowed}")
    if "wandb" in trackers and (long := [tag for tag in tags if len(tag) > 64]):
        raise ValueError(f"--tracker-tag is {long[0]!r}; --tracker wandb allows at most 64 characters")


def check_tracker_packages(settings: TrackingSettings) -> None:
    """ValueError with the pip command for a package that this machine lacks."""
    for name in settings.names:
        if name in PACKAGES:
            check_installed(f"--tracker {name}", *PACKAGES[name])
    if settings.prometheus_port is not None:
        check_installed("--prometheus-port", *PROMETHEUS)
