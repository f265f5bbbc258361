"""The system calls that a program may not make, as a seccomp filter.

Namespaces and resource limits are the sandbox. The filter closes what they leave open:
* processes: memory limits hold per process, so that a program may have threads but no further process;
* memory that no limit counts: System V shared memory, memfd_create;
* what would undo the sandbox's own settings: the parent-death signal, core dumps;
* what all processes of the machine share: writing disks back, asynchronous I/O;
* parts of the kernel that no solution of a task needs, and that have had many security bugs.
"""

from __future__ import annotations

import errno
import platform
import struct

from megatron_vespo.rewards.jail.kernel import CLONE_THREAD, PR_SET_DUMPABLE, PR_SET_PDEATHSIG

# name -> number on x86_64, on aarch64; None: that architecture has no such call
_REFUSED = {
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "semget": (64, 190), "msgget": (68, 186),
    "mq_open": (240, 180), "memfd_create": (319, 279), "memfd_secret": (447, 447),
    "socket": (41, 198), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "unshare": (272, 97), "setns": (308, 268), "open_tree": (428, 428),
    "move_mount": (429, 429), "fsopen": (430, 430), "fsmount": (432, 432), "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "mknod": (133, None),
    "mknodat": (259, 33), "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "sync": (162, 81), "syncfs": (306, 267), "io_setup": (206, 0),
    "fanotify_init": (300, 262), "inotify_init": (253, None), "inotify_init1": (294, 26),
    "kcmp": (312, 272), "personality": (135, 92), "syslog": (103, 116), "acct": (163, 89),
    "swapon": (167, 224), "reboot": (169, 142), "kexec_load": (246, 104), "init_module": (175, 105),
    "finit_module": (313, 273), "quotactl": (179, 60), "iopl": (172, None), "ioperm": (173, None),
    "modify_ldt": (154, None), "vhangup": (153, 58), "move_pages": (279, 239), "migrate_pages": (256, 238),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438),
}  # fmt: skip
_CLONE, _CLONE3, _PRCTL = (56, 220), (435, 435), (157, 167)
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32_BIT = 0x40000000  # x86_64 has a second table of calls under these numbers

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data; both are little-endian
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000


def filter_instructions() -> bytes:
    """The filter for this machine's architecture; ValueError if it is neither x86_64 nor aarch64."""
    machine = platform.machine()
    if machine not in _ARCHITECTURES:
        raise ValueError(f"the system call filter does not know the architecture {machine}")
    column = list(_ARCHITECTURES).index(machine)
    refuse = _step(_RETURN, _ERROR | errno.EPERM)
    code = [_step(_LOAD, _ARCHITECTURE), _step(_EQUAL, _ARCHITECTURES[machine], 1, 0), _step(_RETURN, _KILL)]
    code += [_step(_LOAD, _NUMBER), _step(_AT_LEAST, _X32_BIT, 0, 1), _step(_RETURN, _KILL)]
    for numbers in _REFUSED.values():
        if (number := numbers[column]) is not None:
            code += [_step(_EQUAL, number, 0, 1), refuse]
    # libc makes threads with clone where clone3, whose flags a filter cannot read, does not exist
    code += [_step(_EQUAL, _CLONE3[column], 0, 1), _step(_RETURN, _ERROR | errno.ENOSYS)]
    code += [_step(_EQUAL, _CLONE[column], 0, 4), _step(_LOAD, _FIRST_ARGUMENT)]
    code += [_step(_ANY_BIT, CLONE_THREAD, 1, 0), refuse, _step(_RETURN, _ALLOW)]
    code += [_step(_EQUAL, _PRCTL[column], 0, 4), _step(_LOAD, _FIRST_ARGUMENT)]
    code += [_step(_EQUAL, PR_SET_PDEATHSIG, 1, 0), _step(_EQUAL, PR_SET_DUMPABLE, 0, 1), refuse]
    code += [_step(_RETURN, _ALLOW)]
    return b"".join(code)


def _step(operation: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """One instruction of classic BPF; a jump skips so many of the following instructions."""
    return struct.pack("HBBI", operation, if_true, if_false, value)
