"""Two nodes with processes, mounts, hosts and a network of their own (tests/helpers/namespaces.py): launched, and broken.

As root only, and all slow. What is killed here, and what is saved then, are the rows of a table in docs/clusters.md
(tests/house/test_clusters.py holds the two together).
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pipeline.training.checkpoint import commit
from tests.helpers import namespaces
from tests.helpers.builders import metrics, only_run, train, write_config
from tests.helpers.namespaces import LINK, Node
from tests.training.checkpoint.test_resume import assert_equal, final_state, numbers
from tests.training.run.test_nodes import adapter_of, wait_for
from tests.training.run.test_stop import gone

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not namespaces.available(), reason="takes root, and namespaces of networks, processes and mounts"
    ),
]
Nodes = tuple[Node, Node]
HANG_S = 12.0


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    with namespaces.two_nodes(tmp_path) as made:
        yield made


def config(folder: Path, base: Path, output: str, steps: int, **changes: Any) -> str:
    settings = {
        "model": str(base),
        "output_dir": str(folder / output),
        "max_steps": steps,
        "epochs": 100000,
        "lora_dropout": 0.2,
        "hang_timeout_minutes": HANG_S / 60,
    }
    return str(write_config(folder / f"{output}.toml", **{**settings, **changes}))


def own_disks(nodes: Nodes, folder: Path, kind: str) -> None:
    """`folder` is on another file system on each node."""
    folder.mkdir()
    for node in nodes:
        node.do(f"mount -t {kind} none {folder}")


def ended(launchers: list[subprocess.Popen[str]], within_s: float) -> list[str]:
    try:
        return [launcher.communicate(timeout=within_s)[0] for launcher in launchers]
    except subprocess.TimeoutExpired:
        for launcher in launchers:
            launcher.kill()
        raise AssertionError("timed out:\n" + "\n".join(one.communicate()[0] for one in launchers)) from None


def as_on_one_machine(tmp_path: Path, base: Path, two: Path, steps: int) -> None:
    train(2, "--config", config(tmp_path, base, "one", steps))
    one = only_run(tmp_path / "one")
    assert adapter_of(two, steps) == adapter_of(one, steps)
    assert numbers(str(two)) == numbers(str(one))
    assert_equal(final_state(str(two), steps), final_state(str(one), steps))


def test_torchrun_over_a_network_trains_what_one_machine_does(tmp_path: Path, base: Path, nodes: Nodes) -> None:
    launchers = namespaces.torchrun(nodes, "--config", config(tmp_path, base, "two", 3))
    said = ended(launchers, 240)
    assert [launcher.returncode for launcher in launchers] == [0, 0], "\n".join(said)
    as_on_one_machine(tmp_path, base, only_run(tmp_path / "two"), 3)


def test_torchrun_with_mounts_of_their_own(tmp_path: Path, base: Path, nodes: Nodes) -> None:
    """The same path is two file systems; the second has looked for a server's delay before it is taken as its own."""
    own_disks(nodes, tmp_path / "two", "ramfs")  # none of those that are one machine's for certain
    said = ended(namespaces.torchrun(nodes, "--config", config(tmp_path, base, "two", 3)), 360)
    assert "output_dir: node-b has another disk there than node-a" in said[0]
    of_first = Path(f"/proc/{nodes[0].first}/root{tmp_path}/two")
    as_on_one_machine(tmp_path, base, only_run(of_first), 3)


@pytest.mark.skipif(not namespaces.has_ssh(), reason="takes sshd, ssh-keygen and pdsh")
def test_deepspeed_s_launcher_through_ssh(tmp_path: Path, base: Path, nodes: Nodes) -> None:
    """pdsh, on one node, starts both; then the same once more, told to stop: both save."""
    namespaces.ssh(nodes, tmp_path)
    hosts = nodes[0].folder / "hosts"
    hosts.write_text("".join(f"{node.name} slots=1\n" for node in nodes))
    (nodes[0].folder / ".deepspeed_env").write_text(f"GLOO_SOCKET_IFNAME={LINK}\nHF_HUB_OFFLINE=1\nOMP_NUM_THREADS=1\n")
    launch = ("--hostfile", str(hosts), "--master_addr", nodes[0].address)
    path = config(tmp_path, base, "two", 3)
    said = ended([launched := nodes[0].start(*namespaces.deepspeed(*launch), "--config", path)], 240)
    assert launched.returncode == 0, said
    as_on_one_machine(tmp_path, base, only_run(tmp_path / "two"), 3)
    path = config(tmp_path, base, "stopped", 100000)
    launched = nodes[0].start(*namespaces.deepspeed(*launch), "--config", path)
    run = under_way(tmp_path / "stopped", [launched])
    ranks = [rank for node in nodes for rank in node.ranks()]
    assert len(ranks) == 2
    os.kill(launcher_in(nodes[0]), signal.SIGTERM)
    assert gone(ranks, 60), "orphans"
    last = max(line["step"] for line in metrics(run))
    assert commit.find(run, newest_run=False)[1]["step"] == last


def launcher_in(node: Node) -> int:
    """The process of the `deepspeed` command."""
    for process in sorted(node.processes()):
        words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
        if any(word.endswith(b"/deepspeed") for word in words[:2]):
            return process
    raise AssertionError("there is none")


def under_way(output: Path, launchers: list[subprocess.Popen[str]]) -> Path:
    """The run's folder, when it has done some steps."""
    deadline = time.monotonic() + 240
    while not [f for f in output.glob("2*/metrics.jsonl") if f.read_text().count("\n") >= 6]:
        if any(one.poll() is not None for one in launchers) or time.monotonic() > deadline:
            raise AssertionError("\n".join(ended(launchers, 5)))
        time.sleep(0.1)
    return next(output.glob("2*"))


class Fault(NamedTuple):
    """`breaks` two nodes; then the ranks of the nodes `left` end within `within_s`, of which `says` says `words`."""

    breaks: Callable[[Nodes], object]
    left: tuple[int, ...]
    within_s: float
    says: int
    words: str


# By what docs/clusters.md calls them.
FAULTS = {
    "kill -9 of all processes of the second node": Fault(
        lambda nodes: nodes[1].kill(), (0,), 30, 0, "lost rank 1 on node-b"
    ),
    "kill -9 of all processes of the first node, which has the store": Fault(
        lambda nodes: nodes[0].kill(), (1,), 30, 1, "lost rank 0 on node-a"
    ),
    "SIGSTOP of all processes of the second node": Fault(
        lambda nodes: nodes[1].signal(signal.SIGSTOP), (0,), 60, 0, "rank 1 hangs:\n  rank 1 on node-b"
    ),
    "the link goes down": Fault(
        lambda nodes: nodes[1].do(f"ip link set {LINK} down"), (0, 1), 60, 0, "rank 1 hangs:\n  rank 1 on node-b"
    ),
}


@pytest.mark.parametrize("disks", ["shared", "apart"])
@pytest.mark.parametrize("what", FAULTS)
def test_what_is_broken_is_named_and_the_last_checkpoint_is_whole(
    tmp_path: Path, base: Path, nodes: Nodes, what: str, disks: str
) -> None:
    fault = FAULTS[what]
    saves = {"save_steps": 2, "checkpoint_on_save": True, "keep_states": 3}
    path = config(tmp_path, base, "two", 100000, **saves)
    output = tmp_path / "two"
    if disks == "apart":
        own_disks(nodes, output, "tmpfs")
        output = Path(f"/proc/{nodes[0].first}/root{output}")
    launchers = namespaces.torchrun(nodes, "--config", path)
    run = under_way(output, launchers)
    kept = os.open(run, os.O_RDONLY)  # also when the node that has it mounted is gone
    ranks = [rank for node in fault.left for rank in nodes[node].ranks()]
    assert len(ranks) == len(fault.left)
    done = max(line["step"] for line in metrics(run))
    fault.breaks(nodes)
    assert gone(ranks, fault.within_s), "orphans"
    nodes[1].signal(signal.SIGCONT)
    wait_for(lambda: not [rank for node in nodes for rank in node.ranks()], 60)
    for node in nodes:
        node.signal(signal.SIGTERM)  # a torchrun that waits for the other's
    said = ended(launchers, 60)
    assert fault.words in said[fault.says], said[fault.says]
    assert commit.find(Path(f"/proc/self/fd/{kept}"), newest_run=False)[1]["step"] >= done - 2
    os.close(kept)
