"""Checks of this machine: limits, shared memory, disks, ports."""

from __future__ import annotations

import resource
import shutil
import socket
import tempfile
from pathlib import Path

from megatron_vespo.commands.doctor.finding import Finding
from megatron_vespo.system.ports import PORT_RANGE, RENDEZVOUS_PORT_OFFSET

GIB = 2**30
OPEN_FILES = 65536  # what Ray asks for; a checkpoint of many shards and hundreds of requests need thousands
FEWEST_OPEN_FILES = 1024
SHM_BYTES = 8 * GIB  # Ray's object store and NCCL's buffers between processes
FEWEST_SHM_BYTES = GIB
DISK_BYTES = 10 * GIB  # logs of Ray and of the run
FEWEST_DISK_BYTES = GIB
FREE_PORTS = 64
EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
INFINIBAND = Path("/sys/class/infiniband")


def open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return judge_open_files(soft, hard)


def judge_open_files(soft: int, hard: int) -> Finding:
    if soft == resource.RLIM_INFINITY or soft >= OPEN_FILES:
        return Finding("open files", "ok", f"at most {_limit(soft)}")
    more = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    fix = f"ulimit -n {more} before the start" if more > soft else f"have the hard limit of {hard} raised"
    status = "FAIL" if soft < FEWEST_OPEN_FILES else "warn"
    return Finding("open files", status, f"at most {soft}, {OPEN_FILES} is safe", fix)


def locked_memory() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return judge_locked_memory(soft, INFINIBAND.is_dir() and any(INFINIBAND.iterdir()))


def judge_locked_memory(soft: int, infiniband: bool) -> Finding:
    if soft == resource.RLIM_INFINITY or not infiniband:
        text = f"at most {_limit(soft, 2**20, ' MiB')}" + ("" if infiniband else ", no InfiniBand to need it")
        return Finding("locked memory", "ok", text)
    fix = "ulimit -l unlimited; in SLURM: PropagateResourceLimitsExcept=MEMLOCK, LimitMEMLOCK of slurmd"
    text = f"at most {soft // 2**20} MiB, but InfiniBand locks what it sends"
    return Finding("locked memory", "FAIL", text, fix)


def shared_memory() -> Finding:
    return judge_space(
        "/dev/shm", shutil.disk_usage("/dev/shm").free, FEWEST_SHM_BYTES, SHM_BYTES,
        "a container needs --shm-size or --ipc=host",
    )  # fmt: skip


def free_disk(folder: Path) -> Finding:
    """Checks the fuller one of `folder` and the temporary folder, where Ray keeps its sessions."""
    folders = [place for place in (Path(tempfile.gettempdir()), folder) if place.is_dir()]
    free, where = min((shutil.disk_usage(place).free, str(place)) for place in folders)
    fix = "make room, or set TMPDIR to a larger disk"
    found = judge_space("disk", free, FEWEST_DISK_BYTES, DISK_BYTES, fix)
    return Finding("disk", found.status, f"{found.text} in {where}", found.fix)


def judge_space(name: str, free: int, fewest: int, enough: int, fix: str) -> Finding:
    text = f"{free / GIB:.0f} GiB free" if free >= GIB else f"{free / 2**20:.0f} MiB free"
    if free >= enough:
        return Finding(name, "ok", text)
    return Finding(name, "FAIL" if free < fewest else "warn", f"{text}, {enough / GIB:g} are safe", fix)


def free_ports() -> Finding:
    """Checks the ports that engines and their rendezvous choose from."""
    last = PORT_RANGE.stop - 1 + RENDEZVOUS_PORT_OFFSET
    free = sum(_is_free(port) and _is_free(port + RENDEZVOUS_PORT_OFFSET) for port in PORT_RANGE)
    try:
        first_ephemeral = int(EPHEMERAL.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        first_ephemeral = last + 1  # not a Linux kernel
    return judge_ports(free, PORT_RANGE.start, last, first_ephemeral)


def judge_ports(free: int, first: int, last: int, first_ephemeral: int) -> Finding:
    text = f"{free} of {len(PORT_RANGE)} pairs in {first}..{last} are free"
    if free == 0:
        return Finding("ports", "FAIL", text, "end what listens there (ss -ltnp)")
    if free < FREE_PORTS:
        return Finding("ports", "warn", text, "see what listens there (ss -ltnp)")
    if first_ephemeral <= last:
        fix = f"sysctl net.ipv4.ip_local_port_range: begin above {last}"
        text += f", but outgoing connections take ports from {first_ephemeral} on"
        return Finding("ports", "warn", text, fix)
    return Finding("ports", "ok", text)


def _is_free(port: int) -> bool:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError:
            return False
    return True


def _limit(value: int, unit: int = 1, name: str = "") -> str:
    return "any number" if value == resource.RLIM_INFINITY else f"{value // unit}{name}"
