"""docs/clusters.md: its SLURM file runs in a shell where `srun` and `scontrol` are stand-ins, and its commands are ours."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from pipeline.config.schema import Config
from tests.helpers.faults import FAULTS
from tests.helpers.paths import ROOT

PAGE = (ROOT / "docs/clusters.md").read_text(encoding="utf-8")
SBATCH = re.search(r"(?s)```bash\n(.*?)```", PAGE)[1]  # type: ignore[index]


def options(text: str) -> dict[str, str]:
    return dict(re.findall(r"(?m)^#SBATCH --([\w-]+)=(\S+)$", text))


@pytest.fixture
def typed(tmp_path: Path) -> list[str]:
    """What the file has srun start, as SLURM would run it with an argument of its own."""
    for name, says in (("scontrol", "printf 'box-3\\nbox-4\\n'"), ("srun", 'printf "%s\\n" "$@"')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{says}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "run.sbatch").write_text(SBATCH)
    slurm = {"SLURM_JOB_NODELIST": "box-[3-4]", "SLURM_NNODES": options(SBATCH)["nodes"], "SLURM_JOB_ID": "77"}
    environment = {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", str(tmp_path / "run.sbatch"), "--resume_from_checkpoint"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()


def test_the_sbatch_file_starts_torchrun_once_a_node(typed: list[str]) -> None:
    """torchrun's own parser reads the line; the options before the commands are those that sbatch reads, and fit each other."""
    given = options(SBATCH)
    assert SBATCH.startswith("#!/bin/bash\n#SBATCH "), "sbatch reads options before the first command only"
    assert "#SBATCH" not in SBATCH.partition("set -euo pipefail")[2]
    assert given["ntasks-per-node"] == "1"
    assert given["signal"].startswith("TERM@"), "to the steps, not to the batch shell alone (B:)"
    assert typed[0] == "torchrun"
    parsed = get_args_parser().parse_args(typed[1:])
    assert (parsed.nnodes, parsed.nproc_per_node) == (given["nodes"], given["gpus-per-node"])
    assert (parsed.rdzv_backend, parsed.rdzv_id, parsed.rdzv_endpoint) == ("c10d", "77", "box-3:29500")
    assert parsed.training_script == "train.py"
    assert parsed.training_script_args == ["--config", "my_run.toml", "--resume_from_checkpoint"]


def test_torchrun_reads_the_other_lines_and_keys_exist() -> None:
    lines = [line.strip() for line in PAGE.splitlines() if line.startswith("    torchrun ")]
    assert len(lines) == 2
    for line in lines:
        assert get_args_parser().parse_args(shlex.split(line)[1:]).training_script == "train.py"
    for key in ("host_memory_gib", "link_gbit_per_s", "use_column_major_topology", "hang_timeout_minutes"):
        assert f"`{key}`" in PAGE
        assert key in Config.model_fields


def test_the_table_of_faults_has_what_is_broken_in_tests() -> None:
    """Each row of it is a case of tests/training/run/test_namespaces.py, with the limit that is held there."""
    table = PAGE.partition("## What was broken")[2]
    rows = {cells[1].strip(): cells[3].strip() for line in table.splitlines() if len(cells := line.split("|")) == 6}
    del rows["broken"], rows["---"]
    assert rows == {what: f"{fault.within_s:.0f} s" for what, fault in FAULTS.items()}
