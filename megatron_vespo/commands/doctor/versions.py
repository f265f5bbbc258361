"""Package versions that this program was tested with."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version

from megatron_vespo.commands.doctor.finding import Finding

TESTED = {
    "python": "3.12",
    "torch": "2.14.1",
    "megatron-core": "0.19.2",
    "sglang": "0.5.23",
    "ray": "2.60.0",
    "transformer-engine": "2.20.2",
    "transformers": "5.19.0",
}
# package -> what runs without it
OPTIONAL = {
    "transformer-engine": "Megatron's local layers run",
    "deep-ep": "only --moe-token-dispatcher-type flex needs it",
    "apex": "torch's or Transformer Engine's kernels run",
    "nvidia-modelopt": "only convert modelopt needs it",
}


# the same modules under another package name
_ALSO = {"deep-ep": "sgl-deep-ep"}


def installed(package: str) -> str | None:
    """Its version, without a build suffix (such as the +cu130 of 2.14.1+cu130)."""
    for name in filter(None, (package, _ALSO.get(package))):
        try:
            return version(name).partition("+")[0]
        except PackageNotFoundError:
            continue
    return None


def python_version() -> Finding:
    found = ".".join(str(part) for part in sys.version_info[:3])
    tested = TESTED["python"]
    if f"{found}.".startswith(f"{tested}."):
        return Finding("python", "ok", found, alike=True)
    return Finding("python", "warn", f"{found}, tested with {tested}", f"use Python {tested}", alike=True)
