"""A real Slurm of virtual nodes on this machine: real slurmctld, slurmd, srun and sbatch; no GPU, systemd or database.

    python tests/slurm/virtual.py [--nodes 4] COMMAND...   run a command on the login node of a fresh cluster, then end it

One process, started in namespaces of its own (mounts, network, host name, processes), is the login node: it runs slurmctld
and a bridge. Each compute node is one more set of namespaces under it, with its own host name, address on the bridge,
/dev/shm and process table, and a second interface, eth1, on another bridge. So nodes find each other by name, two nodes can use one port, and cutting a node's power is
one kill. The file system is shared, as on a cluster. The network has no way out, and leaves no interface behind.

The login node is process 1 of its namespace and ends when its standard input does: whatever ends this process, also
SIGKILL, the kernel ends all that runs in the cluster with it.

Needs root, and Debian's or Ubuntu's packages (`install`). Tested with Slurm 22.05 (Debian 12).
"""

import argparse
import contextlib
import ctypes
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Self

PACKAGES = (
    "slurmctld",
    "slurmd",
    "slurm-client",
    "slurm-wlm-basic-plugins",
    "iproute2",
    "util-linux",
    "shellcheck",
)
PROGRAMS = ("slurmctld", "slurmd", "srun", "sbatch", "scontrol", "ip", "unshare", "nsenter", "shellcheck")
NETWORK = "198.51.100"  # TEST-NET-2: nobody's addresses; eth0, by which Slurm reaches the nodes
FABRIC = "203.0.113"  # TEST-NET-3; eth1, for the ranks
LOGIN = "login"
GPUS = 4  # that each node pretends to have
NAMESPACES = ("unshare", "--mount", "--net", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
SLURM_CONF = """\
ClusterName=virtual
SlurmctldHost={login}({network}.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
# How long a launch credential is good. A requeued job does not start again before; the default is 120 s.
AuthInfo=cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
# Without cgroups: processes are found by their parents; nothing is bound or limited.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
# The queue is looked at at once, not every half minute.
SchedulerParameters=bf_interval=1,batch_sched_delay=1,sched_interval=1
# Nodes are what this file says, whatever the machine has.
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=10
KillWait=20
MinJobAge=3600
NodeName=node[1-{count}] NodeAddr={network}.[11-{last}] CPUs=16 RealMemory=64000 Gres=gpu:{gpus} State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
"""


class CannotRun(Exception):
    """This machine cannot bring up a virtual cluster; the text says why."""


def install() -> None:
    """Install the packages that are missing, by apt. Raises CannotRun where that is impossible."""
    if os.geteuid() != 0:
        raise CannotRun("a virtual Slurm needs root: namespaces with an address of their own")
    if all(map(shutil.which, PROGRAMS)):
        return
    if shutil.which("apt-get") is None:
        raise CannotRun(f"no apt-get here to install {', '.join(PACKAGES)}")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (
        ["apt-get", "update", "-qq"],
        ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES],
    ):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise CannotRun(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")


@dataclass
class VirtualSlurm:
    """A cluster that is up inside `with`. Its nodes are node1, node2, ...

    Args:
        root: an empty folder for configuration, state and logs.
        count: of compute nodes.
    """

    root: Path
    count: int = 4
    _login: subprocess.Popen[str] | None = field(default=None, init=False)
    _nodes: dict[str, int] = field(
        default_factory=dict, init=False
    )  # process ids as the login node sees them

    @property
    def nodes(self) -> list[str]:
        return [f"node{number}" for number in range(1, self.count + 1)]

    def __enter__(self) -> Self:
        _write_configuration(self.root, self.count)
        log = (self.root / "login.log").open("w")
        with log:
            self._login = subprocess.Popen(
                [*NAMESPACES, sys.executable, __file__, "--inside", LOGIN, str(self.root)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        try:
            self._expect("up")
            for node in self.nodes:
                self.power_on(node)
            self.wait_until_idle()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._login is None:
            return
        self._login.kill()  # unshare dies, and the kernel ends its child and all below
        self._login.wait()
        self._login.stdin.close()
        self._login.stdout.close()
        self._login = None

    def run(
        self,
        *command: str | Path,
        node: str | None = None,
        check: bool = True,
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout_s: float = 120,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the login node, or on another, and wait for it. Raises AssertionError if it fails."""
        done = subprocess.run(
            self.command(*command, node=node, cwd=cwd),
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def command(self, *command: str | Path, node: str | None = None, cwd: Path | None = None) -> list[str]:
        """The command line that runs a command on a node, from here."""
        there = ["env", f"--chdir={cwd or Path.cwd()}", *map(str, command)]
        if node is not None:
            there = [*_enter(self._nodes[node]), *there]
        return [*_enter(self._login.pid), *there]

    @contextlib.contextmanager
    def process(self, *command: str, node: str) -> Iterator[None]:
        """A process on a node that has said a line, until the end of this context, when its input ends and it should as well."""
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        started = subprocess.Popen(self.command(*command, node=node), text=True, **pipes)
        try:
            assert started.stdout.readline(), f"{command} ended"
            yield
        finally:
            started.communicate(timeout=30)

    def power_on(self, node: str) -> None:
        """Start a node."""
        self._nodes[node] = int(self._ask(f"on {node}"))

    def cut_power(self, node: str) -> None:
        """Every process of the node dies at once."""
        self._ask(f"off {node}")
        del self._nodes[node]

    def fabric_address(self, node: str) -> str:
        """Of its eth1."""
        return f"{FABRIC}.{10 + self.nodes.index(node) + 1}"

    def pull_cable(self, node: str) -> None:
        """Of the node's eth1: the interface keeps its address, and nothing comes through."""
        self.run("ip", "link", "set", _cable(node, "eth1"), "down")

    def plug_in_cable(self, node: str) -> None:
        self.run("ip", "link", "set", _cable(node, "eth1"), "up")

    def job(self, job_id: str | int) -> dict[str, str]:
        """What `scontrol show job` says, by key; of a heterogeneous job, of its first component, or (JOB+1) another."""
        text = self.run("scontrol", "--oneliner", "show", "job", str(job_id)).stdout.splitlines()[0]
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait_for_job(self, job_id: str | int, timeout_s: float = 240) -> dict[str, str]:
        """Wait until the job has ended for good; what `job` says then."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        deadline = time.monotonic() + timeout_s
        while (job := self.job(job_id))["JobState"] not in ended:
            assert time.monotonic() < deadline, (
                f"job {job_id} is {job['JobState']} after {timeout_s} s: {job}"
            )
            time.sleep(0.3)
        return job

    def _ask(self, line: str) -> str:
        self._login.stdin.write(f"{line}\n")
        self._login.stdin.flush()
        return self._expect("done")

    def _expect(self, word: str) -> str:
        line = self._login.stdout.readline()
        first, _, rest = line.strip().partition(" ")
        if first != word:
            log = (self.root / "login.log").read_text()[-2000:]
            raise CannotRun(f"the login node of the virtual Slurm did not come up: {line}{log}")
        return rest

    def wait_until_idle(self, timeout_s: float = 90) -> None:
        """Wait until Slurm has a use for every node."""
        deadline = time.monotonic() + timeout_s
        while True:
            shown = self.run("sinfo", "-h", "-t", "idle", "-o", "%D", check=False)
            if shown.stdout.strip() == str(self.count):
                return
            if time.monotonic() > deadline:
                state = self.run("sinfo", "-N", "-l", check=False)
                raise CannotRun(
                    f"not all virtual nodes are idle after {timeout_s} s:\n{state.stdout}{state.stderr}"
                )
            time.sleep(0.1)


def _write_configuration(root: Path, count: int) -> None:
    etc = root / "etc"
    for folder in (etc, root / "state", root / "devices"):
        folder.mkdir(parents=True)
    values = {
        "login": LOGIN,
        "network": NETWORK,
        "root": root,
        "count": count,
        "last": 10 + count,
        "gpus": GPUS,
    }
    (etc / "slurm.conf").write_text(SLURM_CONF.format(**values))
    (etc / "cgroup.conf").write_text(
        "CgroupPlugin=cgroup/v1\n"
    )  # slurmd loads one even where nothing uses it
    for number in range(GPUS):  # a count alone is not believed: slurmd wants device files
        (root / "devices" / f"gpu{number}").symlink_to("/dev/null")
    (etc / "gres.conf").write_text(f"Name=gpu File={root}/devices/gpu[0-{GPUS - 1}]\n")
    hosts = [f"127.0.0.1 localhost\n{NETWORK}.1 {LOGIN}\n"]
    hosts += [f"{_address(number)} node{number}\n" for number in range(1, count + 1)]
    (root / "hosts").write_text("".join(hosts))
    (root / "nsswitch.conf").write_text(
        "passwd: files\ngroup: files\nhosts: files\n"
    )  # there is no DNS server


def _address(number: int) -> str:
    return f"{NETWORK}.{10 + number}"


def _enter(pid: int) -> list[str]:
    """A command's first words that lead it into the namespaces made by the unshare of that process id."""
    return [
        "nsenter",
        f"--target={pid}",
        "--mount",
        "--net",
        "--uts",
        f"--pid=/proc/{pid}/ns/pid_for_children",
    ]


# ---- inside the namespaces: process 1 of the login node, and of each node ----


def _login_node(root: Path) -> None:
    _sh("mount --make-rprivate /")
    _sh("mkdir -p /etc/slurm")
    for source, target in (
        ("etc", "/etc/slurm"),
        ("hosts", "/etc/hosts"),
        ("nsswitch.conf", "/etc/nsswitch.conf"),
    ):
        _sh(f"mount --bind {root / source} {target}")
    _sh(
        f"ip link set lo up; ip link add br0 type bridge; ip addr add {NETWORK}.1/24 dev br0; ip link set br0 up; "
        "ip link add br1 type bridge; ip link set br1 up"
    )
    _start("slurmctld", "-D")
    print("up", flush=True)
    nodes: dict[str, subprocess.Popen[bytes]] = {}
    for line in _lines_while_reaping(sys.stdin):
        what, node = line.split()
        if what == "on":
            nodes[node] = _start(*NAMESPACES, sys.executable, __file__, "--inside", node, str(root))
            _connect(node, nodes[node].pid)
            print(f"done {nodes[node].pid}", flush=True)
        elif what == "off":
            nodes[node].kill()
            nodes[node].wait()
            print("done", flush=True)


def _connect(node: str, pid: int) -> None:
    """A cable from each bridge to the node."""
    own = os.readlink("/proc/self/ns/net")
    while os.readlink(f"/proc/{pid}/ns/net") == own:
        time.sleep(0.01)
    for bridge, interface in (("br1", "eth1"), ("br0", "eth0")):
        cable = _cable(node, interface)
        _sh(f"ip link delete {cable} 2>/dev/null || true")  # of the node's former life
        _sh(f"ip link add {cable} type veth peer name {interface} netns {pid}")
        _sh(f"ip link set {cable} master {bridge} up")


def _cable(node: str, interface: str) -> str:
    return f"{interface}-{node}"


def _node(name: str, root: Path) -> None:
    _sh("mount -t tmpfs tmpfs /dev/shm")
    while "eth0" not in (interface for _, interface in socket.if_nameindex()):
        time.sleep(0.01)
    address = _address(int(name.removeprefix("node")))
    fabric = f"{FABRIC}.{address.rpartition('.')[2]}"
    _sh(f"ip link set lo up; ip addr add {address}/24 dev eth0; ip link set eth0 up")
    _sh(f"ip addr add {fabric}/24 dev eth1; ip link set eth1 up")
    (root / f"spool-{name}").mkdir(exist_ok=True)
    _start("slurmd", "-D", "-N", name)
    for _ in _lines_while_reaping(None):
        pass


def _lines_while_reaping(source: IO[str] | None) -> Iterator[str]:
    """Lines until the end of `source` (None: for ever); meanwhile orphans, whose parent process 1 is, are reaped."""
    selector = selectors.DefaultSelector()
    if source is not None:
        selector.register(source, selectors.EVENT_READ)
    while True:
        if selector.select(0.5) if source is not None else time.sleep(0.5):
            if not (line := source.readline()):
                return
            yield line
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _start(*command: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def _sh(script: str) -> None:
    subprocess.run(["sh", "-ec", script], check=True, stdin=subprocess.DEVNULL)


def _inside(name: str, root: Path) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    libc = ctypes.CDLL(None, use_errno=True)
    encoded = name.encode()
    if libc.sethostname(encoded, len(encoded)):
        raise OSError(ctypes.get_errno(), "sethostname")
    if name == LOGIN:
        _login_node(root)
    else:
        _node(name, root)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    given = parser.parse_args(arguments)
    if not given.command:
        parser.error("say which command to run, e.g. bash")
    install()
    with (
        tempfile.TemporaryDirectory(prefix="virtual-slurm-") as folder,
        VirtualSlurm(Path(folder), given.nodes) as cluster,
    ):
        return subprocess.run(cluster.command(*given.command)).returncode


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        _inside(sys.argv[2], Path(sys.argv[3]))
    else:
        sys.exit(main())
