"""Two nodes made of namespaces: each has processes, a network, mounts, hosts and a name of its own. Takes root.

The two are joined by a pair of virtual interfaces, and nothing else: what they send each other leaves neither the machine
nor the pair. A node's first process holds all of it; killed, it takes every other process of the node with it.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.helpers.builders import ROOT, environment

LINK = "link0"
WAIT_S = 10.0


def available() -> bool:
    """Whether this user may make them here."""
    wanted = ("unshare", "nsenter", "ip", "mount")
    if os.geteuid() != 0 or not all(map(shutil.which, wanted)):
        return False
    command = [
        "unshare",
        "--fork",
        "--pid",
        "--mount-proc",
        "--net",
        "--mount",
        "--uts",
        "ip",
        "link",
        "set",
        "lo",
        "up",
    ]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def has_ssh() -> bool:
    """Whether nodes could start commands on each other."""
    return all(map(shutil.which, ("/usr/sbin/sshd", "ssh", "ssh-keygen", "pdsh")))


class Node:
    """`name` is its host's, `address` that of its end of the link; `folder` is where its commands run."""

    def __init__(self, name: str, address: str, folder: Path) -> None:
        self.name, self.address, self.folder = name, address, folder
        folder.mkdir(exist_ok=True)
        kinds = ("--pid", "--mount-proc", "--net", "--mount", "--uts")
        self._holder = subprocess.Popen(
            ["unshare", "--fork", "--kill-child", *kinds, "sleep", "infinity"], stderr=subprocess.DEVNULL
        )
        self.first = _child_of(self._holder.pid)
        self.do(f"hostname {name} && ip link set lo up")

    def command(self, *words: str) -> list[str]:
        """What starts `words` on this node."""
        return [
            "nsenter",
            "--target",
            str(self.first),
            "--pid",
            "--net",
            "--mount",
            "--uts",
            f"--wd={self.folder}",
            *words,
        ]

    def do(self, script: str) -> None:
        """A shell's lines, as root of this node, to their end."""
        subprocess.run(self.command("bash", "-euc", script), check=True, capture_output=True, text=True)

    def start(self, *words: str) -> subprocess.Popen[str]:
        """A command whose output is read, over the link."""
        return subprocess.Popen(
            self.command(*words),
            env=environment(GLOO_SOCKET_IFNAME=LINK),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def processes(self) -> list[int]:
        """All but the first, by their ids outside."""
        found: list[int] = []
        if not Path(f"/proc/{self.first}").exists():
            return found
        own = os.readlink(f"/proc/{self.first}/ns/pid")
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if entry.name.isdigit() and os.readlink(entry / "ns" / "pid") == own:
                    found.append(int(entry.name))
        return [process for process in found if process != self.first]

    def ranks(self) -> list[int]:
        """Those that train: the ids of processes with a rank that no other of them has started."""
        return [process for process in self.processes() if _has_rank(process) and not _has_rank(_parent(process))]

    def signal(self, number: signal.Signals) -> None:
        """To all processes of the node."""
        for process in self.processes():
            with suppress(ProcessLookupError):
                os.kill(process, number)

    def kill(self) -> None:
        """As if switched off: every process is killed at once."""
        with suppress(ProcessLookupError):
            os.kill(self.first, signal.SIGKILL)
        self._holder.wait()


@contextmanager
def two_nodes(folder: Path) -> Iterator[tuple[Node, Node]]:
    """`node-a` and `node-b`, which know each other by name; gone at the end, with all that runs on them."""
    made: list[Node] = []
    try:
        for letter, address in (("a", "10.77.0.1"), ("b", "10.77.0.2")):
            made.append(Node(f"node-{letter}", address, folder / f"node-{letter}"))
        a, b = made
        pair = f"mlr{os.getpid() % 100000}"
        subprocess.run(["ip", "link", "add", pair, "type", "veth", "peer", "name", f"{pair}p"], check=True)
        (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{n.address} {n.name}\n" for n in made))
        for node, end in ((a, pair), (b, f"{pair}p")):
            subprocess.run(["ip", "link", "set", end, "netns", str(node.first), "name", LINK], check=True)
            node.do(f"ip address add {node.address}/24 dev {LINK}; ip link set {LINK} up")
            node.do(f"mount --bind {folder}/hosts /etc/hosts")
        yield a, b
    finally:
        for node in made:
            node.kill()


def torchrun(nodes: tuple[Node, Node], *arguments: str, options: tuple[str, ...] = ()) -> list[subprocess.Popen[str]]:
    """A launcher on each node, with one process."""
    program = str(Path(sys.executable).with_name("torchrun"))
    where = ("--master-addr", nodes[0].name, "--master-port", "29500")
    return [
        node.start(
            program,
            *("--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(number), *where, *options),
            *(str(ROOT / "train.py"), *arguments),
        )
        for number, node in enumerate(nodes)
    ]


def deepspeed(*options: str) -> tuple[str, ...]:
    """DeepSpeed's command with its own options, to start train.py."""
    return (str(Path(sys.executable).with_name("deepspeed")), *options, str(ROOT / "train.py"))


def ssh(nodes: tuple[Node, Node], folder: Path) -> None:
    """A server of ssh on each node, and keys that let root of each in; none of the machine's own keys are touched."""
    keys = folder / "ssh"
    keys.mkdir(mode=0o700)
    for name in ("id_ed25519", "host"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(keys / name)], check=True)
    (keys / "authorized_keys").write_text((keys / "id_ed25519.pub").read_text())
    (keys / "config").write_text("Host *\n StrictHostKeyChecking no\n UserKnownHostsFile /dev/null\n LogLevel ERROR\n")
    (keys / "sshd").write_text(
        f"HostKey {keys}/host\nAuthorizedKeysFile {keys}/authorized_keys\nStrictModes no\nUsePAM no\nPidFile none\n"
    )
    for node in nodes:
        node.do(f"mkdir -p /root/.ssh; mount --bind {keys} /root/.ssh; mount -t tmpfs none /run; mkdir /run/sshd")
        node.do(f"/usr/sbin/sshd -f {keys}/sshd -o ListenAddress={node.address}")


def _child_of(process: int) -> int:
    children, deadline = Path(f"/proc/{process}/task/{process}/children"), time.monotonic() + WAIT_S
    while not (found := children.read_text().split()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    while os.readlink(f"/proc/{found[0]}/exe").endswith(
        "unshare"
    ):  # it has its namespaces when it is what was asked for
        time.sleep(0.01)
    return int(found[0])


def _parent(process: int) -> int:
    with suppress(OSError):
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def _has_rank(process: int) -> bool:
    with suppress(OSError):
        return b"\0RANK=" in Path(f"/proc/{process}/environ").read_bytes()
    return False
