"""Hosts on one machine: each has namespaces of its own for the network, host name, processes, mounts and shared memory.

A host is its sshd, which is process 1 there: when that one ends, so does every process of the host, and the system takes back
its network, its mounts and its shared memory. It ends with this process, however this one ends. The hosts are plugged into
a bridge that is in a network namespace too, so nothing of the machine's own network, nor /etc/ssh or ~/.ssh, is touched.

The hosts share the machine's file system, as over NFS, but for ``Network.local``: there each has a disk of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.launch import until

TOOLS = ("bash", "ip", "nsenter", "pdsh", "setpriv", "ssh", "ssh-keygen", "sshd", "unshare")
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
SUBNET = "10.77.0"
_NAMESPACES = ("--net", "--uts", "--ipc", "--pid", "--mount")

_SSHD_CONFIG = """
HostKey /etc/ssh/key
AuthorizedKeysFile /etc/ssh/key.pub
PermitRootLogin yes
UsePAM no
StrictModes no
MaxStartups 100
"""
_SSH_CONFIG = """
IdentityFile /etc/ssh/key
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
"""
_BOOT = """
set -e
name=$1 place=$2
hostname "$name"
ip link set lo up
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir /run/sshd
mount --bind "$place/ssh" /etc/ssh
mount --bind "$place/hosts_file" /etc/hosts
mount --bind "$place/disks/$name" "$place/local"
exec "$(command -v sshd)" -D -E "$place/disks/$name/sshd.log"
"""


def why_not() -> str | None:
    """Why there can be no hosts here, None when there can."""
    if missing := [tool for tool in TOOLS if shutil.which(tool, path=PATH) is None]:
        return f"not installed: {', '.join(missing)} (apt-get install openssh-server pdsh iproute2)"
    tried = subprocess.run(
        ["unshare", *_NAMESPACES, "--fork", "--mount-proc", "ip", "link", "add", "type", "bridge"],
        env={**os.environ, "PATH": PATH},
        capture_output=True,
        text=True,
        check=False,
    )
    return f"no right to make namespaces: {tried.stderr.strip()}" if tried.returncode else None


@dataclass
class Host:
    """One of them: process 1 of it as the machine sees it, and its disk as the machine sees it."""

    name: str
    pid: int
    disk: Path

    def start(self, command: Sequence[str], environment: Mapping[str, str], **options: Any) -> subprocess.Popen[bytes]:
        """Start a command there, as if from its terminal."""
        enter = ["nsenter", "--target", str(self.pid), *_NAMESPACES, f"--wd={os.getcwd()}", "--"]
        return subprocess.Popen([*enter, *command], env=dict(environment), **options)

    def ranks(self) -> list[psutil.Process]:
        """The processes of its ranks, in the order in which they were started."""
        found = (rank for launcher in self._launchers() for rank in launcher.children())
        return sorted(found, key=lambda process: process.pid)

    def launched(self) -> list[psutil.Process]:
        """Launchers, ranks, and whatever these started."""
        return [p for p in self.processes() if any("python" in word for word in _words(p)[:1])]

    def kill_launched(self) -> None:
        """As if the system had killed them all."""
        for process in self.launched():
            process.kill()

    def _launchers(self) -> list[psutil.Process]:
        return [p for p in self.processes() if _words(p)[1:4] == ["-u", "-m", "deepspeed.launcher.launch"]]

    def processes(self) -> list[psutil.Process]:
        """All of its processes."""
        return [p for p in psutil.process_iter() if _namespace(p.pid) == _namespace(self.pid) is not None]


@dataclass
class Network:
    """Hosts that reach each other; the first one's ``start`` is where a user sits."""

    place: Path
    switch: int
    hosts: list[Host]

    @property
    def local(self) -> Path:
        """A folder that is another one on each host."""
        return self.place / "local"

    def hostfile(self, slots: int) -> Path:
        """DeepSpeed's, of all hosts."""
        path = self.place / "hostfile"
        path.write_text("".join(f"{host.name} slots={slots}\n" for host in self.hosts))
        return path

    @contextmanager
    def cut(self, host: Host) -> Iterator[None]:
        """The cable of a host is out: no packet comes through, and nobody is told."""
        _in(self.switch, f"ip link set {host.name} down")
        try:
            yield
        finally:
            _in(self.switch, f"ip link set {host.name} up")


@contextmanager
def network(place: Path, names: Sequence[str]) -> Iterator[Network]:
    """Hosts of these names. place: an empty folder of theirs; what is written to ``local`` is in ``place/disks/<name>``."""
    _write_files(place, names)
    with ExitStack() as alive:
        switch = alive.enter_context(_namespaced(["--net"], ["sleep", "infinity"]))
        _in(switch, "ip link add bridge type bridge && ip link set bridge up")
        hosts = []
        for number, name in enumerate(names, 1):
            boot = ["bash", "-c", _BOOT, "boot", name, str(place)]
            pid = alive.enter_context(_namespaced([*_NAMESPACES, "--mount-proc"], boot))
            _in(switch, f"ip link add {name} type veth peer name eth0 netns {pid}")
            _in(switch, f"ip link set {name} master bridge up")
            _in(pid, f"ip address add {SUBNET}.{number}/24 dev eth0 && ip link set eth0 up")
            hosts.append(Host(name, pid, place / "disks" / name))
        for host in hosts:
            log = host.disk / "sshd.log"
            until(lambda log=log: log.exists() and "Server listening" in log.read_text(), 20)  # type: ignore[misc]
        yield Network(place, switch, hosts)


def _write_files(place: Path, names: Sequence[str]) -> None:
    ssh = place / "ssh"
    for folder in (ssh, place / "local", *(place / "disks" / name for name in names)):
        folder.mkdir(parents=True)
    lines = ["127.0.0.1 localhost", *(f"{SUBNET}.{number} {name}" for number, name in enumerate(names, 1))]
    (place / "hosts_file").write_text("\n".join(lines) + "\n")
    (ssh / "sshd_config").write_text(_SSHD_CONFIG)
    (ssh / "ssh_config").write_text(_SSH_CONFIG)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(ssh / "key")], check=True)


@contextmanager
def _namespaced(kinds: Sequence[str], command: Sequence[str]) -> Iterator[int]:
    """A command as the first process of new namespaces, which end with it; its number."""
    keeper = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", "unshare", *kinds, "--fork", "--kill-child=KILL", *command],
        env={**os.environ, "PATH": PATH},
        stdin=subprocess.DEVNULL,
    )
    try:
        until(lambda: bool(psutil.Process(keeper.pid).children()), 20)
        (first,) = psutil.Process(keeper.pid).children()
        yield first.pid
    finally:
        keeper.kill()
        keeper.wait()
        until(lambda: _ended(first), 20)


def _in(pid: int, script: str) -> None:
    """Run a line of shell in the network of a process."""
    command = ["nsenter", "--target", str(pid), "--net", "bash", "-ec", script]
    subprocess.run(command, env={**os.environ, "PATH": PATH}, check=True)


def _namespace(pid: int) -> str | None:
    """The process namespace that a process is in."""
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return None


def _ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []
