"""GPUs as torch and the driver see them, asked in separate processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from megatron_vespo.commands.doctor.finding import Finding
from megatron_vespo.system.time_limits import IMPORT_TIMEOUT_S

GIB = 2**30
_SEEN_BY_TORCH = """
import json, torch
count = torch.cuda.device_count() if torch.cuda.is_available() else 0
properties = [torch.cuda.get_device_properties(i) for i in range(count)]
pairs = [(i, j) for i in range(count) for j in range(count) if i != j]
print(json.dumps({
    "names": [p.name for p in properties],
    "bytes": [p.total_memory for p in properties],
    "built_for": torch.version.cuda,
    "without_peer": [p for p in pairs if not torch.cuda.can_device_access_peer(*p)],
}))
"""


def has_gpu_files() -> bool:
    return any(Path("/dev").glob("nvidia[0-9]*"))


def num_gpus() -> int:
    """Number of GPUs that this process may use."""
    if not has_gpu_files():
        return 0
    program = "import torch; print(torch.cuda.device_count())"
    try:
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=IMPORT_TIMEOUT_S
        )
        return int(done.stdout.split()[-1])
    except (subprocess.TimeoutExpired, IndexError, ValueError):
        return 0  # `gpus` reports the reason


def gpus() -> Finding:
    try:
        command = [sys.executable, "-c", _SEEN_BY_TORCH]
        done = subprocess.run(command, capture_output=True, text=True, timeout=IMPORT_TIMEOUT_S)
        seen = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, IndexError, ValueError) as error:
        fix = "nvidia-smi on this node; torch has to import"
        return Finding("GPUs", "FAIL", f"torch cannot say: {type(error).__name__}", fix)
    allocated = os.environ.get("SLURM_GPUS_ON_NODE", "")
    wanted = int(allocated) if allocated.isdecimal() else 0
    return judge_gpus(seen, driver_version(), nvlink_topology(), has_gpu_files(), wanted)


def judge_gpus(seen: dict, driver: str | None, topology: str, files: bool, wanted: int) -> Finding:
    """`seen` is torch's answer, `topology` the text of nvidia-smi topo -m, `wanted` SLURM's GPU count."""
    count = len(seen["names"])
    if count == 0 and not files and not wanted:
        return Finding("GPUs", "ok", "none: everything runs on CPU, over gloo", alike=True)
    if count == 0:
        built = seen["built_for"]
        cause = f"torch is built for CUDA {built}" if built else "torch is built without CUDA"
        fix = "compare with the driver in nvidia-smi, and look at CUDA_VISIBLE_DEVICES"
        return Finding("GPUs", "FAIL", f"there are some, but torch sees none ({cause})", fix)
    kinds = sorted(set(seen["names"]))
    memory = min(seen["bytes"]) / GIB
    text = f"{count} x {' and '.join(kinds)}, {memory:.0f} GiB, driver {driver or 'unknown'}"
    if count < wanted:
        fix = "look at CUDA_VISIBLE_DEVICES and nvidia-smi"
        return Finding("GPUs", "FAIL", f"{text}, but SLURM has allocated {wanted}", fix)
    if len(kinds) > 1:
        return Finding("GPUs", "warn", text, "use GPUs of one kind: the slowest sets the pace")
    if count > 1:
        link = "NVLink" if "NV" in _links(topology) else "no NVLink"
        if seen["without_peer"]:
            pairs = len(seen["without_peer"])
            fix = "tensor parallelism will be slow: look at nvidia-smi topo -p2p r, and IOMMU/ACS"
            return Finding("GPUs", "warn", f"{text}, {link}, {pairs} pairs without peer access", fix, True)
        text += f", {link}, peer access"
    return Finding("GPUs", "ok", text, alike=True)


def driver_version() -> str | None:
    lines = _nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader").split()
    return lines[0] if lines else None


def nvlink_topology() -> str:
    return _nvidia_smi("topo", "-m")


def _nvidia_smi(*arguments: str) -> str:
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _links(topology: str) -> set[str]:
    """Kinds of links in the GPU rows, without their numbers: {"NV", "SYS", "PIX", ...}."""
    rows = [line.split()[1:] for line in topology.splitlines() if line.startswith("GPU")]
    return {word.rstrip("0123456789") for row in rows for word in row}
