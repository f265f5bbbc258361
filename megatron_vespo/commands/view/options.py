"""The flags of `megatron-vespo view`, parsed."""

from __future__ import annotations

import argparse
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from megatron_vespo.arguments.parser import FlagParser
from megatron_vespo.system.paths import user_path
from megatron_vespo.system.settings import Settings

PORT = 6066


@dataclass(frozen=True)
class ViewOptions(Settings):
    runs: tuple[Path, ...]
    host: str  # a loopback address
    port: int  # 0: a free one


def parse(argv: list[str]) -> ViewOptions:
    return ViewOptions.of(_parser().parse_args(argv))


def _parser() -> FlagParser:
    parser = FlagParser(
        prog="megatron-vespo view",
        description="Show runs on a local web page, also while they go on. It prints the page's address.",
    )
    parser.add_argument(
        "runs", nargs="+", type=user_path, metavar="RUN", help="--output-dir of a run, or a folder of runs"
    )
    parser.add_argument("--port", type=_port, default=PORT, metavar="N", help="0: a free one; default: 6066")
    parser.add_argument(
        "--host", type=_loopback, default="127.0.0.1", metavar="ADDRESS",
        help="loopback address to listen on; default: 127.0.0.1",
    )  # fmt: skip
    return parser


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: a number from 0 to 65535")
    return int(text)


def _loopback(text: str) -> str:
    """Responses may be confidential, and the page has no TLS: other machines come through ssh."""
    try:
        local = text == "localhost" or ipaddress.ip_address(text).is_loopback
    except ValueError:
        local = False
    if not local:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no loopback address; from another machine use ssh -L {PORT}:127.0.0.1:{PORT}"
        )
    return text
