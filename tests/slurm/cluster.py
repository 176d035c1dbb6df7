"""A Slurm cluster on this machine: a head and some nodes, each in namespaces of its own.

Every node has its own host name, address, process table and /dev/shm, so that ranks on two nodes
can only meet over the bridge, a node can be switched off by one SIGKILL, and its cable pulled. The
file system is shared, as a cluster's is. Needs root and slurmctld, slurmd, munged and ip; nothing
else of the machine is touched, and the cluster dies with the process that made it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import textwrap
import time
from collections.abc import Callable, Mapping
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "ip", "unshare", "nsenter", "setpriv")
PACKAGES = "slurmctld slurmd slurm-client munge iproute2"
NETWORK = "10.88.4"
NODE_LOST_S = 8
"""Seconds without an answer after which Slurm takes a node for lost."""

# What both kinds of machine do first; $1 the cluster's folder, $2 the machine's name. The number of
# this process outside of its namespace can be read only before /proc is mounted anew.
_BOOT = """
read -r pid _ </proc/self/stat
hostname "$2"
mount --bind "$1/hosts" /etc/hosts
mount --bind "$1/nsswitch.conf" /etc/nsswitch.conf
mount -t proc proc /proc
mount -t tmpfs tmpfs /dev/shm
ip link set lo up
echo "$pid" >"$1/$2.pid.new" && mv "$1/$2.pid.new" "$1/$2.pid"
export PATH=/usr/sbin:/sbin:$PATH
"""
_HEAD = (
    _BOOT
    + """
ip link add bridge type bridge
ip addr add NETWORK.1/24 dev bridge
ip link set bridge up
munged --foreground --force --key-file="$1/munge.key" --socket="$1/munge.socket" \
    --pid-file="$1/munged.pid" --seed-file="$1/munge.seed" --log-file="$1/munged.log" &
until [ -S "$1/munge.socket" ]; do sleep 0.05; done
slurmctld -D -f "$1/slurm.conf" >>"$1/slurmctld.out" 2>&1 &
touch "$1/head.ready"
while :; do wait; sleep 1; done
""".replace("NETWORK", NETWORK)
)
_NODE = (
    _BOOT
    + """
until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
ip addr add "$3/24" dev eth0
ip link set eth0 up
slurmd -D -f "$1/slurm.conf" -N "$2" >>"$1/slurmd.$2.out" 2>&1 &
while :; do wait; sleep 1; done
"""
)

_SLURM_CONF = """
ClusterName=tests
SlurmctldHost=head({network}.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# a requeued job waits as long as its old credential is valid
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
# neither cgroups nor systemd nor a database
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0
EnforcePartLimits=ALL
ReturnToService=2
SlurmdTimeout={lost_s}
BatchStartTimeout=10
MessageTimeout=5
TCPTimeout=2
KillWait=5
# jobs that are over are asked for much later
MinJobAge=86400
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{gres}
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=spare Nodes=ALL MaxTime=60 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=one Nodes=node1 MaxTime=10 MaxNodes=1 State=UP PriorityTier=10 PreemptMode=OFF
"""


class Cluster:
    """A running cluster; `stop` ends it, and so does the end of this process.

    Args:
        folder: where everything is written; a short path, it holds a socket.
        num_nodes: machines beside the head: node1, node2, ...
        cpus: of each node, whatever the machine has.
        gpus: fake GPUs of each node: they are granted and numbered, but cannot compute.
    """

    def __init__(self, folder: Path, num_nodes: int = 3, cpus: int = 4, gpus: int = 0) -> None:
        self.folder = folder
        self.nodes = [f"node{i + 1}" for i in range(num_nodes)]
        self._cpus, self._gpus = cpus, gpus
        self._processes: list[subprocess.Popen[bytes]] = []
        self._write_files()
        self._start("head", _HEAD)
        wait_until(lambda: (folder / "head.ready").exists(), 15, "the head to start")
        for name in self.nodes:
            self.power_on(name)
        wait_until(lambda: len(self.idle()) == num_nodes, 30, "all nodes to be idle")

    @property
    def environment(self) -> dict[str, str]:
        """For programs on the head: no job's variables, this cluster's configuration."""
        strange = ("SLURM_", "SBATCH_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(strange)}
        kept["SLURM_CONF"] = str(self.folder / "slurm.conf")
        kept["OMP_NUM_THREADS"] = "1"
        return kept

    def run(
        self,
        *command: object,
        node: str = "head",
        check: bool = True,
        input: str = "",
        **environment: str,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the head, or on a node outside of any job."""
        enter = ["nsenter", "-t", str(self._pid(node)), "-n", "-u", "-m", "-i", "-p"]
        done = subprocess.run(
            [*enter, f"--wdns={os.getcwd()}", "--", *map(str, command)],
            env={**self.environment, **environment},
            input=input,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        if check and done.returncode:
            raise AssertionError(f"{command} on {node}: {done.returncode}\n{done.stderr}")
        return done

    def idle(self) -> list[str]:
        """Nodes that wait for work."""
        done = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N %t", check=False)
        return [line.split()[0] for line in done.stdout.splitlines() if line.endswith(" idle")]

    def job(self, number: str) -> dict[str, str]:
        """What scontrol says of a job."""
        done = self.run("scontrol", "show", "job", number, check=False)
        return dict(re.findall(r"(\w+)=(\S*)", done.stdout))

    def wait(self, number: str, timeout_s: float = 300) -> dict[str, str]:
        """Wait for the end of a job, requeues included."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "DEADLINE")
        return self.wait_for(number, lambda job: job.get("JobState") in ended, timeout_s)

    def wait_for(
        self, number: str, wanted: Callable[[Mapping[str, str]], bool], timeout_s: float = 60
    ) -> dict[str, str]:
        """Wait until a job is as wanted; returns what scontrol says of it."""
        seen: dict[str, str] = {}

        def look() -> bool:
            seen.clear()
            seen.update(self.job(number))
            return wanted(seen)

        wait_until(look, timeout_s, lambda: f"job {number}, which is {seen}")
        return seen

    def lost(self, number: str, record_property: Callable[[str, object], None]) -> float:
        """Wait until Slurm has noticed that a machine of a job is gone; when it had, epoch s."""
        cut = time.time()
        self.wait_for(number, lambda job: job.get("Restarts") == "1", 15 * NODE_LOST_S)
        record_property("detection_s", time.time() - cut)
        return time.time()

    # Faults -----------------------------------------------------------------------------------

    def power_off(self, node: str) -> None:
        """As when the plug is pulled: no process of the node says a word any more."""
        pid = self._pid(node)
        self.unplug(node)
        os.kill(pid, signal.SIGKILL)
        (self.folder / f"{node}.pid").unlink()
        wait_until(lambda: not Path(f"/proc/{pid}/ns/net").exists(), 5, f"{node} to be off")

    def power_on(self, node: str) -> None:
        """Boot a node and connect it to the bridge."""
        if (self.folder / f"{node}.pid").exists():
            return
        self._on_head("ip", "link", "del", f"to-{node}", check=False)
        (self.folder / f"spool.{node}").mkdir(exist_ok=True)
        address = f"{NETWORK}.{10 + self.nodes.index(node)}"
        pid = self._start(node, _NODE, address)
        cable = ["type", "veth", "peer", "name", "eth0", "netns", str(pid)]
        self._on_head("ip", "link", "add", f"to-{node}", *cable)
        self._on_head("ip", "link", "set", f"to-{node}", "master", "bridge", "up")

    def unplug(self, node: str) -> None:
        """Cut the node's network; its processes go on."""
        self._on_head("ip", "link", "set", f"to-{node}", "down")

    def replug(self, node: str) -> None:
        """The inverse of `unplug`."""
        self._on_head("ip", "link", "set", f"to-{node}", "up")

    def stop_controller(self) -> None:
        """Kill slurmctld; jobs go on."""
        pid = (self.folder / "slurmctld.pid").read_text().strip()
        self.run("kill", "-KILL", pid)

    def start_controller(self) -> None:
        """Start slurmctld again, with the state it saved."""
        self.run("sh", "-c", f"setsid slurmctld -f {self.folder}/slurm.conf >/dev/null 2>&1")

    def repair(self) -> None:
        """Cancel every job, switch on and connect every node; between two tests."""
        self.run("scancel", "-u", "root", check=False)
        for node in self.nodes:
            self.power_on(node)
            self.replug(node)
            if node not in self.idle():
                self.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)
        wait_until(lambda: len(self.idle()) == len(self.nodes), 60, "all nodes to be idle")

    def stop(self) -> None:
        """End everything."""
        with contextlib.suppress(OSError, ValueError):
            os.kill(self._pid("head"), signal.SIGKILL)
        for process in self._processes:
            process.kill()
            process.wait()

    # ------------------------------------------------------------------------------------------

    def _pid(self, name: str) -> int:
        return int((self.folder / f"{name}.pid").read_text())

    def _on_head(self, *command: str, check: bool = True) -> None:
        enter = ["nsenter", "-t", str(self._pid("head")), "-n", "--"]
        subprocess.run([*enter, *command], check=check, capture_output=not check)

    def _start(self, name: str, script: str, *arguments: str) -> int:
        """Start a machine's first process; nodes live below the head, and die with it."""
        below = [] if name == "head" else ["nsenter", "-t", str(self._pid("head")), "-p", "--"]
        spaces = ["--net", "--uts", "--mount", "--ipc", "--pid", "--fork", "--kill-child"]
        init = ["bash", "-c", script, "bash", str(self.folder), name, *arguments]
        with open(self.folder / f"{name}.out", "ab") as log:
            self._processes.append(
                subprocess.Popen(
                    ["setpriv", "--pdeathsig", "KILL", *below, "unshare", *spaces, "--", *init],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    env={"PATH": os.environ["PATH"], "LANG": "C"},
                )
            )
        pid = self.folder / f"{name}.pid"
        wait_until(pid.exists, 10, f"{name} to boot")
        return self._pid(name)

    def _write_files(self) -> None:
        folder = self.folder
        (folder / "state").mkdir(parents=True)
        (folder / "munge.key").write_bytes(os.urandom(64))
        (folder / "munge.key").chmod(0o600)
        hosts = ["127.0.0.1 localhost", f"{NETWORK}.1 head"]
        hosts += [f"{NETWORK}.{10 + i} {name}" for i, name in enumerate(self.nodes)]
        (folder / "hosts").write_text("\n".join(hosts) + "\n")
        (folder / "nsswitch.conf").write_text(
            "passwd: files\ngroup: files\nshadow: files\nhosts: files\n"
        )
        gres = f" Gres=gpu:{self._gpus}" if self._gpus else ""
        nodes = "\n".join(
            f"NodeName={name} NodeAddr={NETWORK}.{10 + i} CPUs={self._cpus} RealMemory=65536{gres}"
            for i, name in enumerate(self.nodes)
        )
        if self._gpus:
            devices = [folder / f"gpu{i}" for i in range(self._gpus)]
            for device in devices:  # slurmd wants a character device; these are /dev/null
                os.mknod(device, 0o20666, os.makedev(1, 3))
            (folder / "gres.conf").write_text(
                f"Name=gpu AutoDetect=off File={folder}/gpu[0-{self._gpus - 1}]\n"
            )
        text = _SLURM_CONF.format(
            network=NETWORK,
            folder=folder,
            lost_s=NODE_LOST_S,
            nodes=nodes,
            gres="GresTypes=gpu" if self._gpus else "",
        )
        (folder / "slurm.conf").write_text(textwrap.dedent(text))


def missing() -> str:
    """Why there can be no cluster here; "" if there can."""
    if os.geteuid():
        return "namespaces and Slurm's daemons need root"
    path = f"/usr/sbin:/sbin:{os.environ.get('PATH', '')}"
    absent = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if absent:
        return f"no {', '.join(absent)}: apt-get install {PACKAGES} util-linux"
    spaces = ["unshare", "--net", "--uts", "--mount", "--ipc", "--pid", "--fork"]
    probe = "mount -t tmpfs tmpfs /dev/shm && ip link add bridge type bridge"
    done = subprocess.run([*spaces, "sh", "-c", probe], capture_output=True, text=True, check=False)
    return f"no namespaces or bridges: {done.stderr.strip()}" if done.returncode else ""


def wait_until(
    condition: Callable[[], bool], timeout_s: float, what: str | Callable[[], str]
) -> None:
    """Poll until a condition holds.

    Raises:
        TimeoutError: it does not hold in time.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            text = what if isinstance(what, str) else what()
            raise TimeoutError(f"{timeout_s} s passed while waiting for {text}")
        time.sleep(0.2)
