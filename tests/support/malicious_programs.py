"""Programs that attack the sandbox of code rewards, as a table.

A script prints "escaped" where its attack worked. Its test expects just that, so that an attack that works
earns the reward. Words in capitals stand for what the test offers as targets, see `Targets`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Targets:
    """What exists outside of the sandbox. The field NAME replaces the word NAME in a program."""

    SECRET_FILE: str  # whose text is SECRET_TEXT
    SECRET_TEXT: str
    OPEN_FOLDER: str  # that everybody may write to
    TCP_PORT: str  # on which the host listens
    ABSTRACT_SOCKET: str
    SOCKET_FILE: str
    VICTIM_PID: str  # of a process of the host

    def put_into(self, source: str) -> str:
        for name, value in asdict(self).items():
            source = source.replace(name, value)
        return source


ESCAPED = "escaped\n"

_TRY_CALLS = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def worked(*arguments):
    if libc.syscall(*map(arg, arguments)) >= 0:
        print("escaped")
        sys.exit()
def arg(value):
    return ctypes.c_long(value) if isinstance(value, int) else value
"""
_FORGET_SIGNALS = """
import signal
for number in range(1, 64):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
"""

# name -> source; a line of comment where the attack is not plain
EXHAUSTION = {
    "fork bomb": "import os\nwhile True:\n    os.fork()",
    "fork bomb that ignores errors": """
import os
while True:
    try:
        os.fork()
    except OSError:
        pass
""",
    "vfork and clone": _TRY_CALLS
    + "worked(57)\nworked(58)\nworked(56, 17, 0, 0, 0, 0)\nworked(435, bytes(88), 88)",
    "a pool of processes": """
import multiprocessing
with multiprocessing.Pool(64) as pool:
    pool.map(abs, range(100))
print("escaped")
""",
    "endless threads": """
import threading, time
while True:
    try:
        threading.Thread(target=time.sleep, args=(1e6,)).start()
    except RuntimeError:
        pass
""",
    "threads that never end": """
import threading
def spin():
    while True:
        pass
for _ in range(8):
    threading.Thread(target=spin).start()
""",
    "a list that grows": "x = []\nwhile True:\n    x.append(' ' * 10**6)",
    "a list that grows again and again": """
while True:
    try:
        x = []
        while True:
            x.append(bytearray(10**7))
    except MemoryError:
        pass
""",
    "one large allocation": "x = bytearray(10**10)\nx[::4096] = b'x' * len(x[::4096])\nprint('escaped')",
    "shared memory without a file": """
import mmap
maps = []
for _ in range(64):
    maps.append(mmap.mmap(-1, 64 * 2**20))
    maps[-1].write(b"x" * 64 * 2**20)
print("escaped")
""",
    "memory files": _TRY_CALLS + "worked(319, b'x', 0)",
    "system v shared memory": _TRY_CALLS + "worked(29, 0, 2**28, 0o1666)",
    "message queues": _TRY_CALLS + "worked(68, 0, 0o1666)\nworked(240, b'/queue', 0o102, 0o600, None)",
    "a huge integer": "x = 10 ** (10 ** 8)\nprint(x * x)",
    "a tower of powers": "9 ** 9 ** 9",
    "a huge string": "x = 'x'\nwhile True:\n    x += x",
    "a huge range as a list": "list(range(10**11))",
    "a regular expression that backtracks": "import re\nre.match(r'(a+)+$', 'a' * 60 + 'b')",
    "deep recursion": """
import sys
sys.setrecursionlimit(10**9)
def f(n):
    return f(n + 1) + 1
f(0)
""",
    "a stack overflow in C": """
import sys
sys.setrecursionlimit(10**9)
class A:
    def __getattr__(self, name):
        return getattr(self, name + "x")
    __repr__ = lambda self: repr([self])
repr(A())
""",
    "deeply nested source": "x = " + "(" * 100_000 + ")" * 100_000,
    "a bomb for the compiler": "(" + "-" * 50_000 + "1)" + "+1" * 200_000,
    "an endless loop": "while True:\n    pass",
    "sleep": "import time\ntime.sleep(1e6)",
    "a wait for input": "import sys, select\nselect.select([], [], [])",
    "a deadlock": "import threading\nlock = threading.Lock()\nlock.acquire()\nlock.acquire()",
    "exceptions are all caught": """
while True:
    try:
        while True:
            pass
    except BaseException:
        pass
""",
    "a loop inside of C": "sum(iter(int, 1))",
    "a finalizer that never ends": """
import atexit, sys
class A:
    def __del__(self):
        while True:
            pass
a = A()
atexit.register(A.__del__, a)
del a
""",
    "a thread that outlives its program": """
import threading, time
threading.Thread(target=lambda: time.sleep(1e6)).start()
""",
}

OUTPUT_AND_FILES = {
    "endless output": "while True:\n    print('x' * 10**5)",
    "endless output without newline": "import os\nwhile True:\n    os.write(1, b'x' * 65536)",
    "endless output to stderr": "import os\nwhile True:\n    os.write(2, b'x' * 65536)",
    "one huge line": "print('x' * 10**8)",
    "output that is no text": "import os\nos.write(1, bytes(range(256)) * 1000)",
    "closed output": "import os\nos.close(1)\nos.close(2)\nwhile True:\n    pass",
    "output kept open by a thread": """
import os, threading, time
fd = os.dup(1)
threading.Thread(target=lambda: time.sleep(1e6), daemon=False).start()
""",
    "a file that fills the disk": """
with open("x", "wb") as file:
    for _ in range(100):
        file.write(b"x" * 2**20)
print("escaped")
""",
    "many files that fill the disk": """
for number in range(10**5):
    with open(f"x{number}", "wb") as file:
        file.write(b"x" * 2**20)
print("escaped")
""",
    "many empty files": "for number in range(10**6):\n    open(f'x{number}', 'w').close()\nprint('escaped')",
    "a sparse file": "import os\nopen('x', 'w').close()\nos.truncate('x', 2**40)\nprint('escaped')",
    "deep folders": "import os\nwhile True:\n    os.mkdir('x')\n    os.chdir('x')",
    "unlimited descriptors": """
import os
fds = []
while len(fds) < 10**4:
    fds.append(os.dup(0))
print("escaped")
""",
    "unlimited pipes": """
import fcntl, os
pipes = []
while len(pipes) < 1000:
    pipes.append(os.pipe())
    fcntl.fcntl(pipes[-1][1], 1031, 2**20)
print("escaped")
""",
    "higher limits": """
import resource
for kind in (resource.RLIMIT_AS, resource.RLIMIT_NPROC, resource.RLIMIT_CPU, resource.RLIMIT_NOFILE):
    try:
        resource.setrlimit(kind, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print("escaped")
    except (OSError, ValueError):
        pass
""",
}

WHAT_IS_OUTSIDE = {
    "reads a secret file": "print('escaped' if open('SECRET_FILE').read() else '')",
    "follows a symlink to a secret": """
import os
os.symlink('SECRET_FILE', 'x')
open('x').read()
print('escaped')
""",
    "climbs out of its root": """
import os
for depth in range(1, 40):
    path = "../" * depth + "SECRET_FILE"
    if os.path.exists(path):
        print("escaped")
        break
""",
    "looks for keys in home folders": """
import glob, os
found = []
for folder in ("/root", "/home", os.path.expanduser("~")):
    for pattern in (".ssh/*", ".aws/*", ".netrc", ".bash_history", ".cache/huggingface/token", ".config/*"):
        found += glob.glob(f"{folder}/**/{pattern}", recursive=False) + glob.glob(f"{folder}/{pattern}")
print("escaped" if found else "")
""",
    "reads passwords": "open('/etc/passwd').read()\nprint('escaped')",
    "reads its environment for secrets": """
import os
print("escaped" if "SECRET_TEXT" in str(os.environ) or len(os.environ) > 12 else "")
""",
    "reads the environment of the host's processes": """
import glob
for path in glob.glob("/proc/*/environ"):
    print("escaped" if open(path, "rb").read() else "")
""",
    "mounts proc": _TRY_CALLS + "os.mkdir('p')\nworked(165, b'proc', b'p', b'proc', 0, None)",
    "reads memory of others": "print('escaped' if open('/proc/VICTIM_PID/mem', 'rb') else '')",
    "reads its own maps": "open('/proc/self/maps').read()\nprint('escaped')",
    "looks for descriptors that were left open": """
import os
for fd in range(3, 1024):
    try:
        os.fstat(fd)
        print("escaped")
        break
    except OSError:
        pass
""",
    "reads descriptors above its limit": """
import ctypes
libc = ctypes.CDLL(None)
for fd in range(3, 5000):
    if libc.fcntl(fd, 1) >= 0:
        print("escaped")
        break
""",
    "lists what is there": """
import os
names = set(os.listdir("/"))
print("escaped" if names & {"home", "sys", "proc", "boot", "var", "mnt", "opt", "run", "srv"} else "")
""",
    "reads the kernel's settings": "import os\nos.listdir('/sys')\nprint('escaped')",
    "opens disks and terminals": """
import glob
names = {path.rsplit("/")[-1] for path in glob.glob("/dev/*")}
print("escaped" if names - {"null", "zero", "full", "random", "urandom"} else "")
""",
    "makes a device": """
import os
try:
    os.mknod("disk", 0o60666, os.makedev(254, 0))
except OSError:
    os.mknod("disk", 0o20666, os.makedev(1, 1))
print("escaped")
""",
    "writes outside": "open('OPEN_FOLDER/x', 'w').write('x')\nprint('escaped')",
    "deletes files": """
import os, shutil
shutil.rmtree("/", ignore_errors=True)
shutil.rmtree("OPEN_FOLDER")
print("escaped")
""",
    "changes Python for the next program": """
import json, os, sys
with open(json.__file__, "a") as file:
    file.write("\\n")
print("escaped")
""",
    "writes a .pth file for the next program": """
import os, sys
for folder in sys.path:
    try:
        open(f"{folder}/x.pth", "w").write("import os")
        print("escaped")
    except OSError:
        pass
""",
    "changes modes and owners": """
import os, sys
for path in ("/", "/tmp/../", sys.prefix, os.__file__):
    try:
        os.chmod(path, 0o777)
        print("escaped")
    except OSError:
        pass
""",
    "becomes root": "import os\nos.setuid(0)\nprint('escaped')",
    "makes itself a file of root": """
import os
open("x", "w").close()
os.chown("x", 0, 0)
print("escaped")
""",
    "remounts its root writable": _TRY_CALLS + "worked(165, b'none', b'/', None, 0x1020, None)",
    "unmounts its folders": _TRY_CALLS + "worked(166, b'/usr/lib', 2)\nworked(166, b'/tmp', 2)",
    "changes its root": _TRY_CALLS + "os.mkdir('r')\nworked(161, b'r')\nworked(155, b'.', b'.')",
    "makes namespaces": _TRY_CALLS
    + "worked(272, 0x10000000)\nworked(272, 0x10020000)\nworked(56, 0x10000011, 0)",
    "enters namespaces of others": _TRY_CALLS + "worked(308, 0, 0)\nworked(434, VICTIM_PID, 0)",
    "opens files by handle": _TRY_CALLS
    + "worked(304, -100, bytes(128), 0)\nworked(303, -100, b'/', bytes(128), bytes(8), 0)",
    "mounts with the new calls": _TRY_CALLS + "worked(430, b'tmpfs', 0)\nworked(428, -100, b'/', 1)",
    "slows the disks of the machine": _TRY_CALLS
    + "worked(162)\nworked(306, 0)\nworked(206, 65536, bytes(8))",
    "asks for keys": _TRY_CALLS + "worked(250, 0, -3, 0)\nworked(248, b'user', b'x', b'y', 1, -4)",
    "loads code into the kernel": _TRY_CALLS + "worked(321, 0, bytes(128), 128)\nworked(313, 0, b'', 0)",
    "opens rings and faults": _TRY_CALLS
    + "worked(425, 8, bytes(120))\nworked(323, 0)\nworked(298, bytes(128), 0, -1, -1, 0)",
    "calls of the 32-bit kind": """
import ctypes
print("escaped" if ctypes.CDLL(None).syscall(0x40000000 + 39) > 0 else "")
""",
    "runs a shell": """
import subprocess
print(subprocess.run('echo escaped', shell=True, capture_output=True, text=True).stdout)
""",
    "becomes a shell": "import os\nos.execv('/bin/sh', ['sh', '-c', 'echo escaped'])",
    "becomes another Python": """
import os, sys
os.execv(sys.executable, [sys.executable, '-c', 'print("escaped")'])
""",
    "system": "import os\nif os.system('true') == 0:\n    print('escaped')",
}

NETWORK = {
    "connects to the host": """
import socket
socket.create_connection(('127.0.0.1', TCP_PORT), 1)
print('escaped')
""",
    "connects to the world": "import socket\nsocket.create_connection(('192.0.2.1', 9), 1)\nprint('escaped')",
    "asks for names": "import socket\nsocket.getaddrinfo('host.invalid', 80)\nprint('escaped')",
    "fetches a page": """
import urllib.request
urllib.request.urlopen('http://127.0.0.1:TCP_PORT', timeout=1)
print('escaped')
""",
    "raw packets": "import socket\nsocket.socket(socket.AF_PACKET, socket.SOCK_RAW, 3)\nprint('escaped')",
    "an abstract socket of the host": """
import socket
s = socket.socket(socket.AF_UNIX)
s.connect("\\0ABSTRACT_SOCKET")
print("escaped")
""",
    "an abstract socket by a call of C": _TRY_CALLS
    + "worked(41, 1, 1, 0)\nworked(41, 2, 1, 0)\nworked(41, 16, 3, 0)",
    "a socket file of the host": """
import socket
s = socket.socket(socket.AF_UNIX)
s.connect("SOCKET_FILE")
print("escaped")
""",
}

PROCESSES = {
    "kills everything": "import os, signal\nos.kill(-1, signal.SIGKILL)\nprint('survived')",
    "kills its group": """
import os, signal
os.killpg(0, signal.SIGKILL)
os.kill(0, signal.SIGKILL)
print('survived')
""",
    "kills the host's processes": """
import os, signal
for pid in [VICTIM_PID, *range(2, 5000)]:
    try:
        os.kill(pid, signal.SIGKILL)
        print("escaped")
    except OSError:
        pass
""",
    "stops itself": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\nwhile True:\n    pass",
    "ignores all signals": _FORGET_SIGNALS + "while True:\n    pass",
    "ignores all signals and sleeps": _FORGET_SIGNALS + "import time\nwhile True:\n    time.sleep(1)",
    "a daemon": """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(1e6)
""",
    "a daemon by a thread that ends its leader": """
import ctypes, threading, time
def stay():
    while True:
        time.sleep(1)
threading.Thread(target=stay).start()
ctypes.CDLL(None).syscall(60, 0)
""",
    "outlives its guard": _TRY_CALLS + "worked(157, 1, 0, 0, 0, 0)",
    "writes a core dump": _TRY_CALLS + "worked(157, 4, 1, 0, 0, 0)",
    "crashes": "import ctypes\nctypes.string_at(0)",
    "aborts": "import os\nos.abort()",
    "traces its parent": _TRY_CALLS
    + "worked(101, 16, VICTIM_PID, 0, 0)\nworked(101, 0, 0, 0, 0)\nworked(310, VICTIM_PID, 0, 0, 0, 0, 0)",
    "a higher priority": "import os\nos.nice(-10)\nprint('escaped')",
    "a real-time scheduler": """
import os
os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))
print("escaped")
""",
    "changes the clock": "import time\ntime.clock_settime(time.CLOCK_REALTIME, 0)\nprint('escaped')",
    "changes the host's name": "import socket\nsocket.sethostname('x')\nprint('escaped')",
}

# against the test of a function add(a, b) that returns the sum
CHEATS = {
    "exits with 0": "import os\nos._exit(0)",
    "raises SystemExit(0)": "raise SystemExit(0)",
    "raises SystemExit(0) when called": "def add(a, b):\n    raise SystemExit(0)",
    "prints passed": "print('passed')\nprint('111.')\ndef add(a, b):\n    print('1' * 100 + '.')",
    "writes verdicts to every descriptor": """
import os
for fd in range(64):
    try:
        os.write(fd, b"111.")
    except OSError:
        pass
def add(a, b):
    return None
""",
    "a value that equals everything": """
class Equal:
    __eq__ = lambda self, other: True
    __ne__ = lambda self, other: False
    __hash__ = lambda self: 0
def add(a, b):
    return Equal()
""",
    "a number that equals everything": """
class Equal(int):
    __eq__ = lambda self, other: True
    __ne__ = lambda self, other: False
    __hash__ = int.__hash__
    def __int__(self):
        return self
    def __index__(self):
        return self
    def __reduce__(self):
        return (print, ("escaped",))
def add(a, b):
    return Equal(0)
""",
    "a text that equals everything": """
class Equal(str):
    __eq__ = lambda self, other: True
    __hash__ = str.__hash__
    __str__ = lambda self: self
def add(a, b):
    return Equal("x")
""",
    "a list that equals everything": """
class Equal(list):
    __eq__ = lambda self, other: True
    __len__ = lambda self: 1
    __iter__ = lambda self: iter([3])
def add(a, b):
    return Equal()
""",
    "patches builtins": """
import builtins, json, operator
builtins.all = lambda items: True
builtins.isinstance = lambda value, kind: True
json.loads = lambda text: True
operator.eq = lambda a, b: True
def add(a, b):
    return None
""",
    "patches the tester": """
from megatron_vespo.rewards.jail import tester, values
tester.same = lambda value, expected: True
values.encode = lambda value: {"value": True}
values.decode = lambda data: 3
def add(a, b):
    return None
""",
    "answers in the protocol's place": """
import json, os, struct
text = json.dumps({"value": True, "passed": True}).encode()
def add(a, b):
    for fd in range(3, 10):
        try:
            os.write(fd, struct.pack("<Q", len(text)) + text)
        except OSError:
            pass
    os._exit(0)
""",
    "floods the protocol": """
import os
def add(a, b):
    while True:
        os.write(3, b"\\xff" * 65536)
""",
    "claims a huge message": """
import os, struct, time
def add(a, b):
    os.write(3, struct.pack("<Q", 2**63))
    time.sleep(1e6)
""",
    "sends deeply nested JSON": """
import os, struct
text = b"[" * 10**6 + b"]" * 10**6
def add(a, b):
    os.write(3, struct.pack("<Q", len(text)) + text)
""",
    "sends a pickle": """
import os, pickle, struct
class Run:
    def __reduce__(self):
        return (os.system, ("true",))
text = pickle.dumps(Run())
def add(a, b):
    os.write(3, struct.pack("<Q", len(text)) + text)
""",
    "an endless iterator": "import itertools\ndef add(a, b):\n    return itertools.count()",
    "a list inside of itself": "def add(a, b):\n    x = []\n    x.append(x)\n    return x",
    "looks for expected values": """
import gc, inspect, sys
def add(a, b):
    for frame in inspect.stack():
        for value in [*frame.frame.f_locals.values(), *frame.frame.f_globals.values()]:
            if isinstance(value, dict) and "cases" in value:
                return next(expected for arguments, expected in value["cases"] if arguments == [a, b])
    for value in gc.get_objects():
        if isinstance(value, dict) and "cases" in value:
            return next(expected for arguments, expected in value["cases"] if arguments == [a, b])
""",
    "raises AssertionError": "def add(a, b):\n    raise AssertionError",
    "raises an exception of its own": "class E(BaseException):\n    pass\ndef add(a, b):\n    raise E",
    "stops answering": "import time\ndef add(a, b):\n    time.sleep(1e6)",
    "leaves a thread that answers": """
import os, struct, threading, time
def flood():
    while True:
        os.write(3, struct.pack("<Q", 13) + b'{"value": 3}\\n')
threading.Thread(target=flood, daemon=True).start()
def add(a, b):
    time.sleep(1e6)
""",
}

SCRIPTS = EXHAUSTION | OUTPUT_AND_FILES | WHAT_IS_OUTSIDE | NETWORK | PROCESSES
