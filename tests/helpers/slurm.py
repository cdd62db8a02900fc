"""SLURM's own daemons on two nodes of namespaces: a controller on the first, one that starts jobs on each."""

import os
import shutil
from pathlib import Path

from tests.helpers.namespaces import Node

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scancel", "sinfo", "squeue")
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={first}({address})
AuthInfo=socket=/run/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
"""
PARTITION = "PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP\n"


def available() -> bool:
    """Whether the daemons are installed."""
    return all(map(shutil.which, PROGRAMS))


def start(nodes: tuple[Node, Node], folder: Path) -> None:
    """Start them, and wait until both nodes take jobs. SLURM's commands know the cluster by `variable`."""
    folder.mkdir()
    (folder / "state").mkdir()
    lines = [f"NodeName={node.name} NodeAddr={node.address} CPUs=1\n" for node in nodes]
    text = CONFIGURATION.format(first=nodes[0].name, address=nodes[0].address, folder=folder)
    (folder / "slurm.conf").write_text("".join([text, *lines, PARTITION]))
    (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    known = f"export {variable(folder)}"
    at = "--socket=/run/munge.socket --pid-file=/run/munged.pid --log-file=/run/munged.log --seed-file=/run/munge.seed"
    for node in nodes:
        node.do(f"mount -t tmpfs none /run; munged --force --key-file={folder}/munge.key {at}")
    nodes[0].do(f"{known}; slurmctld")
    for node in nodes:
        node.do(f"{known}; slurmd -N {node.name}")
    nodes[0].do(
        f"{known}; for i in $(seq 100); do [ $(sinfo -hN -t idle | wc -l) = 2 ] && exit; sleep 0.2; done; exit 1"
    )


def variable(folder: Path) -> str:
    """As a shell's line begins with it."""
    return f"SLURM_CONF={folder}/slurm.conf"
