"""A real SLURM on one machine: every node has namespaces of its own, as if it were a machine.

A node is a slurmd with its own host name, network, processes, /tmp/ray and /dev/shm; it dies like one, too.
Needs root. GPUs are device files that nothing drives.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "nsenter", "unshare")
GPUS = 8
FIRST_PORT = 16800  # of controllers
CONFIG = """\
ClusterName=vespo
SlurmctldHost={host}({network}.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
# cred_expire: so long a requeued job waits at least; SLURM's default is two minutes
AuthInfo=socket={root}/munge.sock,cred_expire=10
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
SlurmctldPort={port}
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
ReturnToService=2
KillWait=5
MessageTimeout=10
SlurmdTimeout=20
JobRequeue=1
LaunchParameters=disable_send_gids
SlurmdParameters=config_overrides
GresTypes=gpu
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""
NODE = """\
NodeName={name} NodeHostname={name} NodeAddr={address} Port=6818 CPUs=2 RealMemory=4000 Gres=gpu:{gpus}
"""
# the end of `unshare` is the end of all processes of its node
ENTER = "nsenter --net=/run/netns/{namespace} unshare --uts --mount --pid --fork --kill-child --mount-proc"
BOOT = """\
hostname {name} && mount --bind {root}/hosts /etc/hosts && mount -t tmpfs -o size=2g tmpfs /dev/shm &&
mkdir -p /tmp/ray && mount -t tmpfs -o size=2g tmpfs /tmp/ray && {{ slurmd -D -N {name} & wait; }}
"""
# what a node is made of, in namespaces that go with the shell
PROBE = """\
set -e; hostname probe; mount -t tmpfs tmpfs /dev/shm; mknod /dev/shm/gpu0 c 195 0
ip link add bridge type bridge; ip link add one type veth peer name other
"""


def why_not() -> str | None:
    """Why no SLURM can be started here."""
    missing = [program for program in PROGRAMS if shutil.which(program, path=_path()) is None]
    if missing:
        return f"{', '.join(missing)} missing: see tests/slurm/install.sh"
    if os.geteuid() != 0:
        return "a node needs namespaces of its own, and only root makes them"
    probe = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "bash", "-c", PROBE],
        env=os.environ | {"PATH": _path()}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return f"no node can be made here: {probe.stderr.strip()}" if probe.returncode else None


def _path() -> str:
    return os.environ["PATH"] + ":/usr/sbin:/sbin"


class Cluster:
    """`start` and, whatever happened, `stop`."""

    def __init__(self, root: Path, num_nodes: int):
        self.root = root
        self.names = [f"n{i + 1}" for i in range(num_nodes)]
        self._tag = f"vs{os.getpid() % 100_000}"  # of links and namespaces; names of links are short
        self._network = f"10.77.{os.getpid() % 250}"
        self._nodes: dict[str, subprocess.Popen] = {}
        self.environment = os.environ | {"SLURM_CONF": str(root / "slurm.conf"), "PATH": _path()}

    def start(self, timeout_s: float = 60.0) -> None:
        for folder in ("state", "dev", "logs"):
            (self.root / folder).mkdir(parents=True)
        self._write_files()
        self._start_network()
        files = {
            "key-file": "key",
            "socket": "sock",
            "pid-file": "pid",
            "log-file": "log",
            "seed-file": "seed",
        }
        options = [f"--{option}={self.root}/munge.{suffix}" for option, suffix in files.items()]
        self.call("munged", "--force", *options)
        self.call("slurmctld", "-i")
        for name in self.names:
            self.start_node(name)
        self._wait_until_idle(timeout_s)

    def stop(self) -> None:
        for node in self._nodes.values():
            node.kill()
            node.wait(30)
        for file in ("slurmctld.pid", "munge.pid"):
            if (self.root / file).exists():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int((self.root / file).read_text()), signal.SIGTERM)
        for name in self.names:
            self.call("ip", "netns", "del", self._namespace(name), check=False)
        self.call("ip", "link", "del", self._tag, check=False)

    def start_node(self, name: str) -> None:
        command = ENTER.format(namespace=self._namespace(name)).split()
        with (self.root / f"logs/{name}").open("ab") as log:
            self._nodes[name] = subprocess.Popen(
                [*command, "bash", "-c", BOOT.format(name=name, root=self.root)],
                env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )  # fmt: skip

    def kill_node(self, name: str) -> None:
        """As a power cut does."""
        self._nodes[name].kill()
        self._nodes[name].wait(30)

    def revive(self, timeout_s: float = 90.0) -> None:
        """All jobs are cancelled, all nodes run."""
        self.call("scancel", "--user=root", check=False)
        for name, node in self._nodes.items():
            if node.poll() is not None:
                self.start_node(name)
        self._wait_until_idle(timeout_s)

    def call(self, *command: str, check: bool = True, **options) -> str:
        options = {"env": self.environment, "timeout": 60} | options
        done = subprocess.run(command, capture_output=True, text=True, **options)
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)}: {done.stderr}")
        return done.stdout.strip()

    def job(self, number: int) -> dict[str, str]:
        """What scontrol says about it; of a heterogeneous job about its first component."""
        told = self.call("scontrol", "--oneliner", "show", "job", str(number)).splitlines()[0]
        return dict(re.findall(r"(\S+?)=(\S*)", told))

    def wait_for_state(self, number: int, states: set[str], timeout_s: float) -> dict[str, str]:
        deadline = time.monotonic() + timeout_s
        while (job := self.job(number))["JobState"] not in states:
            if time.monotonic() > deadline:
                raise AssertionError(f"job {number} is not {states} within {timeout_s:g} s but {job}")
            time.sleep(0.5)
        return job

    def _namespace(self, name: str) -> str:
        return f"{self._tag}{name}"

    def address(self, name: str) -> str:
        return f"{self._network}.{10 + int(name[1:])}"

    def _write_files(self) -> None:
        host = os.uname().nodename.split(".")[0]
        nodes = [NODE.format(name=name, address=self.address(name), gpus=GPUS) for name in self.names]
        config = CONFIG.format(
            root=self.root, host=host, network=self._network, port=FIRST_PORT + os.getpid() % 1000
        )
        (self.root / "slurm.conf").write_text("".join(nodes) + config)
        (self.root / "gres.conf").write_text(
            f"AutoDetect=off\nName=gpu File={self.root}/dev/gpu[0-{GPUS - 1}]\n"
        )
        (self.root / "cgroup.conf").write_text("# none\n")
        hosts = [f"{self.address(name)} {name}\n" for name in self.names]
        (self.root / "hosts").write_text(f"127.0.0.1 localhost\n{self._network}.1 {host}\n" + "".join(hosts))
        for gpu in range(GPUS):
            self.call("mknod", str(self.root / f"dev/gpu{gpu}"), "c", "195", str(gpu))
        key = self.root / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)

    def _start_network(self) -> None:
        bridge = self._tag
        self.call("ip", "link", "add", bridge, "type", "bridge")
        self.call("ip", "addr", "add", f"{self._network}.1/24", "dev", bridge)
        self.call("ip", "link", "set", bridge, "up")
        for name in self.names:
            namespace, link = self._namespace(name), f"{bridge}v{name}"
            self.call("ip", "netns", "add", namespace)
            self.call("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", namespace)
            self.call("ip", "link", "set", link, "master", bridge, "up")
            self.call("ip", "-n", namespace, "addr", "add", f"{self.address(name)}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                self.call("ip", "-n", namespace, "link", "set", device, "up")

    def _wait_until_idle(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while self.call("sinfo", "-h", "-N", "-o", "%t", check=False).split() != ["idle"] * len(self.names):
            if time.monotonic() > deadline:
                logs = "\n".join(
                    log.read_text() for log in [*self.root.glob("*.log"), *self.root.glob("logs/*")]
                )
                raise AssertionError(
                    f"no SLURM within {timeout_s:g} s: {self.call('sinfo', check=False)}\n{logs}"
                )
            time.sleep(0.1)
