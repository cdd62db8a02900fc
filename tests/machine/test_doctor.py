"""What doctor.py finds. Oracles: limits and files made for the test; the machine that runs it."""

import json
import resource
import sys
from pathlib import Path

import pytest

from pipeline.machine import accelerators, system
from pipeline.machine.findings import Finding, lines, verdict
from pipeline.planning import link

GIB = 2**30


def states(findings: list[Finding]) -> dict[str, str]:
    return {finding.what: finding.state for finding in findings}


def test_versions_are_compared_with_those_that_were_tested() -> None:
    tested = system.tested_versions()
    assert {"torch", "deepspeed", "transformers"} <= {*tested} & {*system.required()}
    (same,) = system.packages({"pytest": pytest.__version__}, ["pytest"])
    assert (same.state, same.found) == ("ok", "1 of 1 in the versions that were tested")
    other, none = system.packages({"pytest": "1.0"}, ["pytest"])
    assert other.found == f"{pytest.__version__}; tested was 1.0"
    assert "constraints.txt" in other.mend
    assert none.found.startswith("0 of 1")
    missing, _ = system.packages({}, ["no-such-package"])
    assert (missing.state, missing.found) == ("broken", "is not installed")


def test_this_machine_has_what_the_tests_need() -> None:
    found = states([system.python(), *system.packages(system.tested_versions(), system.required())])
    assert "broken" not in found.values()


@pytest.mark.parametrize(
    ("finding", "state"),
    [
        (system.open_files(1024), "slow"),
        (system.open_files(65536), "ok"),
        (system.open_files(resource.RLIM_INFINITY), "ok"),
        (system.file_size(GIB), "slow"),
        (system.file_size(resource.RLIM_INFINITY), "ok"),
        (system.shared_memory(Path("/no/such/folder")), "none"),
    ],
)
def test_limits(finding: Finding, state: str) -> None:
    assert finding.state == state
    assert bool(finding.mend) == (state == "slow")


def test_the_disk_is_written_and_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "LITTLE_ROOM_BYTES", 0)
    monkeypatch.setattr(system, "SLOW_DISK_BYTES_PER_S", 1.0)
    room, disk = system.disk(tmp_path / "not" / "there", 2**23)
    assert (room.state, disk.state) == ("ok", "ok")
    assert not [*tmp_path.iterdir()]
    monkeypatch.setattr(system, "SLOW_DISK_BYTES_PER_S", 1e15)
    monkeypatch.setattr(system, "LITTLE_ROOM_BYTES", 2**60)
    assert [one.state for one in system.disk(tmp_path, 2**22)] == ["slow", "slow"]
    (only,) = system.disk(tmp_path, 2**60)  # there is no room to measure it
    assert only.state == "slow"


def test_two_processes_and_what_a_plan_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert link.rate("the CPU") is None
    found = link.measure(2, n_bytes=2**20)
    assert found.backend == "gloo"
    assert found.bytes_per_s > 1e6
    link.remember(found, "the CPU")
    assert link.rate("the CPU") == found.bytes_per_s
    assert link.rate("another device") is None
    (tmp_path / "mulora-pipe" / link.FILE).write_text(json.dumps({"machine": "the CPU", "bytes_per_s": "fast"}))
    assert link.rate("the CPU") is None


def test_processes_that_do_not_start_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(processes: int) -> link.Link:
        raise RuntimeError("no route to host")

    with monkeypatch.context() as patched:
        patched.setattr(link, "measure", fails)
        found = accelerators.neighbours(0)
    assert (found.state, found.found) == ("broken", "no route to host")
    assert "GLOO_SOCKET_IFNAME" in found.mend
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="exit code 1"):
        link.measure(2)


def test_libraries_that_work_here() -> None:
    import torch

    cpu = torch.device("cpu")
    assert accelerators.bitsandbytes(cpu).state == "ok"
    assert accelerators.triton(on_gpu=False).state == "none"
    assert accelerators.sixteen_bits(cpu).state in ("ok", "slow")
    if not torch.cuda.is_available():
        assert accelerators.no_gpu().state == "none"


def test_lines_have_their_mends_below() -> None:
    findings = [Finding("disk", "ok", "fast"), Finding("copies", "slow", "4 GB/s", "another slot")]
    assert lines(findings).splitlines() == [
        "ok      disk    fast",
        "slow    copies  4 GB/s",
        "                → another slot",
    ]
    assert verdict(findings) == "A run works here. Slow: copies."
    assert verdict([*findings, Finding("NCCL", "broken", "hangs")]).startswith("Broken: NCCL, and slow: copies.")
    assert verdict(findings[:1]).startswith("A run works here, and nothing is slower")
