"""Two nodes with processes, mounts, hosts and a network of their own (tests/helpers/namespaces.py): launched, and broken.

As root only, and all slow. What is killed here, and what is saved then, are the rows of a table in docs/clusters.md
(tests/house/test_clusters.py holds the two together).
"""

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.training.checkpoint import commit
from tests.helpers import namespaces, slurm
from tests.helpers.builders import metrics, only_run, train, write_config
from tests.helpers.faults import FAULTS, HANG_S
from tests.helpers.namespaces import LINK, Node
from tests.helpers.paths import ROOT
from tests.helpers.slow_folder import SlowFolder
from tests.house.test_clusters import SBATCH
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


def as_on_one_machine(tmp_path: Path, base: Path, two: Path, steps: int, **changes: Any) -> None:
    train(2, "--config", config(tmp_path, base, "one", steps, **changes))
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


def test_a_folder_that_shows_late_what_the_other_node_wrote(tmp_path: Path, base: Path, nodes: Nodes) -> None:
    """Each change is seen two seconds later: the start, checkpoints, adapters and a resumption wait for it, and no more."""
    own_disks(nodes, tmp_path / "two", "ramfs")
    here = [Path(f"/proc/{node.first}/root{tmp_path}/two") for node in nodes]
    saves = {"save_steps": 2, "checkpoint_on_save": True}
    with SlowFolder(here[0], here[1], 2.0, apart=("dataset_cache",)) as slow:
        for steps, more in ((2, ()), (4, ("--resume_from_checkpoint",))):
            path = config(tmp_path, base, "two", steps, **saves)
            launchers = namespaces.torchrun(nodes, "--config", path, *more)
            said = ended(launchers, 360)
            assert [launcher.returncode for launcher in launchers] == [0, 0], "\n".join(said)
            assert "another disk" not in said[0]
        assert slow.late > 20
    as_on_one_machine(tmp_path, base, only_run(here[0]), 4, **saves)


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


@pytest.mark.skipif(not slurm.available(), reason="takes SLURM's daemons and munge")
def test_the_page_s_file_under_slurm(tmp_path: Path, base: Path, nodes: Nodes) -> None:
    """`sbatch` and `srun torchrun` as docs/clusters.md has them: a stop by scancel saves, a new job goes on; the same numbers."""
    slurm.start(nodes, tmp_path / "slurm")
    script = SBATCH.replace("#SBATCH --gpus-per-node=2\n", "").replace("#SBATCH --cpus-per-task=16\n", "")
    for old, new in (
        ("GPUS_OF_A_NODE=2", "GPUS_OF_A_NODE=1"),
        ("=ib0", f"={LINK}"),
        ("%x-%j.out", f"{tmp_path}/job-%j.out"),
        ("--config my_run.toml", f"--config {config(tmp_path, base, 'two', 100)}"),
    ):
        assert old in script
        script = script.replace(old, new)
    (tmp_path / "run.sbatch").write_text(script)

    def submitted(*arguments: str) -> int:
        command = f"cd {ROOT}; export {slurm.variable(tmp_path / 'slurm')}; sbatch --parsable {tmp_path}/run.sbatch"
        started = nodes[0].start("bash", "-c", f"{command} {' '.join(arguments)}")
        return int(ended([started], 30)[0])

    def is_over(job: int) -> bool:
        asked = nodes[0].start("bash", "-c", f"{slurm.variable(tmp_path / 'slurm')} squeue -h -j {job}")
        return not ended([asked], 30)[0].strip().startswith(str(job))

    first = submitted()
    wait_for(lambda: is_over(first) or [f for f in (tmp_path / "two").glob("2*/metrics.jsonl") if f.read_text()])
    nodes[0].do(f"{slurm.variable(tmp_path / 'slurm')} scancel --signal=TERM {first}")
    wait_for(lambda: is_over(first), 90)
    said = (tmp_path / f"job-{first}.out").read_text()
    run = only_run(tmp_path / "two")
    last = max(line["step"] for line in metrics(run))
    assert last < 100, said
    assert f"stopped after step {last}; resume with\n  srun --nodes 2 --ntasks-per-node 1 torchrun" in said
    second = submitted("--resume_from_checkpoint")
    wait_for(lambda: is_over(second), 240)
    assert "done: 100 steps" in (tmp_path / f"job-{second}.out").read_text()
    as_on_one_machine(tmp_path, base, run, 100)


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
    for launcher in launchers:
        launcher.send_signal(signal.SIGCONT)  # nsenter has stopped with what it started, and reaps nothing
    nodes[1].signal(signal.SIGCONT)
    wait_for(lambda: not [rank for node in nodes for rank in node.ranks()], 60)
    for node in nodes:  # a torchrun waits for the other's, and for a store that is gone
        node.kill()
    said = ended(launchers, 60)
    waited = re.search(r"\nthe others wait:\n.*: step \d+, writing a checkpoint\n", said[fault.says])
    assert (fault.in_a_save if waited else fault.words) in said[fault.says], said[fault.says]
    assert commit.find(Path(f"/proc/self/fd/{kept}"), newest_run=False)[1]["step"] >= done - 2
    os.close(kept)
