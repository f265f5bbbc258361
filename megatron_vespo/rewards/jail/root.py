"""Builds the file system and the identities of the sandbox, once for all programs of a zygote."""

from __future__ import annotations

import contextlib
import os
import sys

from megatron_vespo.rewards.jail import kernel

_DEVICES = ("null", "zero", "full", "random", "urandom")
_LIBRARIES = ("/usr/lib", "/usr/lib64", "/usr/local/lib", "/lib", "/lib64", "/usr/share/zoneinfo",
              "/etc/ld.so.cache")  # fmt: skip
_NOBODY = 65534  # the user that programs run as if this process is root
SCRATCH = "/scratch"  # the only writable folder of a program; also named /tmp, unless Python itself is there


def enter_outer_user_namespace() -> None:
    """Become root of a new user namespace; with the right to, one that also has the user nobody.

    The kernel does not limit the processes and threads of the real root: programs must be somebody else.
    """
    kernel.set_process_option(kernel.PR_SET_DUMPABLE, 1)
    ids = os.geteuid(), os.getegid()
    ready, mapped = os.pipe(), os.pipe()
    helper = os.fork()
    if helper == 0:  # has this user namespace's rights to write the map
        os.close(ready[1])
        os.read(ready[0], 1)
        os._exit(0 if _map_root_and_nobody(os.getppid()) else 1)
    kernel.unshare(kernel.CLONE_NEWUSER)
    os.close(ready[1])
    for fd in (ready[0], *mapped):
        os.close(fd)
    if os.waitstatus_to_exitcode(os.waitpid(helper, 0)[1]) != 0:
        map_one_identity("/proc", inside=(0, 0), outside=ids)
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)


def _map_root_and_nobody(process: int) -> bool:
    if os.geteuid() != 0:
        return False
    try:
        for name in ("uid_map", "gid_map"):
            with open(f"/proc/{process}/{name}", "w") as file:
                file.write(f"0 0 1\n{_NOBODY} {_NOBODY} 1\n")
    except OSError:  # root of a container whose own map has no such user
        return False
    return True


def become_nobody() -> None:
    """Change to the user nobody if this user namespace has one; capabilities end."""
    with contextlib.suppress(OSError):
        os.setgroups([])
    try:
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    except OSError:
        return
    kernel.set_process_option(
        kernel.PR_SET_DUMPABLE, 1
    )  # else /proc/self belongs to root: no map can be written


def map_one_identity(proc: str | int, inside: tuple[int, int], outside: tuple[int, int]) -> None:
    """Write the maps of this process's new user namespace. `proc`: path or file descriptor of /proc."""
    folder = proc if isinstance(proc, int) else os.open(proc, os.O_PATH | os.O_DIRECTORY)
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{inside[0]} {outside[0]} 1"),
        ("gid_map", f"{inside[1]} {outside[1]} 1"),
    ):
        file = os.open(f"self/{name}", os.O_WRONLY, dir_fd=folder)
        os.write(file, text.encode())
        os.close(file)
    if folder is not proc:
        os.close(folder)


def enter_read_only_root() -> int:
    """Move into a root of Python, the system's libraries and five devices; return a descriptor of /proc.

    Only the zygote holds the descriptor: a program closes it before it begins, and has no /proc.
    """
    kernel.unshare(kernel.CLONE_NEWNS | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS | kernel.CLONE_NEWCGROUP)
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    sources = {path: os.open(path, os.O_PATH) for path in _shown_paths() if os.path.exists(path)}
    links = {path: os.readlink(path) for path in ("/lib", "/lib64") if os.path.islink(path)}
    devices = {name: os.open(f"/dev/{name}", os.O_PATH) for name in _DEVICES}
    proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY)
    root = "/tmp"
    kernel.mount("none", root, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "size=1m,nr_inodes=1k,mode=755")
    os.mkdir(f"{root}{SCRATCH}")
    for path, target in links.items():
        os.symlink(target, root + path)
    for path, source in sources.items():
        if path not in links:
            _show(source, proc, root + path)
            kernel.restrict_mount(root + path, _RESTRICTED, recursive=True)
    for name, source in devices.items():
        _show(source, proc, f"{root}/dev/{name}")
    if not os.path.exists(f"{root}/tmp"):
        os.symlink(SCRATCH, f"{root}/tmp")
    kernel.restrict_mount(root, _RESTRICTED, recursive=False)
    for fd in (*sources.values(), *devices.values()):
        os.close(fd)
    kernel.enter_root(root)
    return proc


_RESTRICTED = kernel.MOUNT_ATTR_RDONLY | kernel.MOUNT_ATTR_NOSUID | kernel.MOUNT_ATTR_NODEV


def _shown_paths() -> list[str]:
    """The folders that Python needs, parents before what is below them."""
    wanted = {*_LIBRARIES, sys.base_prefix, sys.prefix, sys.exec_prefix}
    return sorted(path for path in map(os.path.abspath, wanted) if path not in ("/", "/usr/local"))


def _show(source: int, proc: int, target: str) -> None:
    """Bind the file or folder behind the descriptor to `target`."""
    link = f"/proc/self/fd/{source}"
    if not os.path.exists(target):
        if os.path.isdir(link):
            os.makedirs(target)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
    kernel.mount(link, target, None, kernel.MS_BIND | kernel.MS_REC)
