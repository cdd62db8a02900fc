"""Processes that hang or die are named by the others, from what each says of itself; and stop signals, without a model.

The processes are `tests/workers/peer_worker.py`: our watching thread and a main thread that steps, waits or sleeps.
"""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pipeline.training.nodes import records
from pipeline.training.nodes.records import Exchanged, Mapped
from pipeline.training.run import peers
from pipeline.training.run.peers import Peers, exit_of
from tests.helpers.paths import WORKERS

WORKER = WORKERS / "peer_worker.py"


@pytest.fixture
def run(tmp_path: Path) -> Iterator["Run"]:
    made = Run(tmp_path)
    yield made
    for process in made.processes:
        process.kill()
        process.communicate()


class Run:
    """Workers in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.processes = folder, list[subprocess.Popen[str]]()

    def start(self, *does: str) -> None:
        """One process for each; returns when all step."""
        for rank, what in enumerate(does):
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, WORKER, self.folder, str(rank), str(len(does)), what],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    start_new_session=True,
                )
            )
        assert becomes(lambda: all((self.folder / f"up{rank}").exists() for rank in range(len(does))))

    def ended(self, rank: int, within_s: float = 30) -> tuple[int, str]:
        """Exit code and output."""
        output, _ = self.processes[rank].communicate(timeout=within_s)
        return self.processes[rank].returncode, output

    def saved(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("saved*"))


def becomes(true: "object", within_s: float = 60) -> bool:
    deadline = time.monotonic() + within_s
    while not true():  # type: ignore[operator]
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_a_pause_is_no_stop_and_a_stop_signal_saves(run: Run, number: signal.Signals) -> None:
    run.start("work")
    for _ in range(3):  # each falls into the thread's wait, and lasts longer than it
        run.processes[0].send_signal(signal.SIGSTOP)
        time.sleep(0.4)
        run.processes[0].send_signal(signal.SIGCONT)
        time.sleep(0.2)
    assert run.processes[0].poll() is None
    assert not run.saved()
    assert not (run.folder / ".stop").exists()
    run.processes[0].send_signal(number)
    assert run.ended(0)[0] == 75
    assert run.saved() == ["saved0"]
    assert not (run.folder / "peers").exists(), "the file that the processes share has no name once they have met"


def test_who_hangs_is_told_from_who_waits_and_all_save(run: Run) -> None:
    run.start("wait", "hang")
    (run.folder / "go").touch()
    code, output = run.ended(0)
    assert code == 6
    assert "rank 1 hangs:\n  rank 1 (process " in output
    assert "): step " in output
    assert "the others wait:\n  rank 0 (process " in output
    assert "waiting for activations" in output
    code, output = run.ended(1)
    assert code == 6
    assert "rank 1 stands at peer_worker.py:" in output
    assert run.saved() == ["saved0", "saved1"]
    assert (run.folder / ".stop").read_text() == "6"


def test_a_process_that_is_stopped_is_named_and_nobody_waits_for_its_part(run: Run) -> None:
    (run.folder / "global_step4").mkdir()
    run.start("wait", "work")
    (run.folder / "go").touch()
    run.processes[1].send_signal(signal.SIGSTOP)
    code, output = run.ended(0)
    assert code == 6
    assert "rank 1 hangs:\n" in output
    assert "stopped by a signal " in output
    assert "rank 1's part of the last step cannot be saved; the newest checkpoint is that of step 4" in output
    assert not run.saved()


def test_a_pause_of_the_whole_run_is_nobody_s_hang(run: Run) -> None:
    run.start("work", "work")
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for process in run.processes:
            process.send_signal(number)
        time.sleep(3 if number == signal.SIGSTOP else 1)  # the timeout is 2 s
    assert all(process.poll() is None for process in run.processes)
    assert not (run.folder / ".stop").exists()


def test_a_process_that_died_is_named_with_its_signal(run: Run) -> None:
    run.start("wait", "work", "work")
    run.processes[2].kill()  # whose parent, this test, has not asked for it: the system still knows how it ended
    code, output = run.ended(0)
    assert code == 6
    assert f"error: rank 0: lost rank 2 (process {run.processes[2].pid}): step " in output
    assert "the forward pass: killed by SIGKILL, as the system does" in output
    assert "no checkpoint had been written yet" in output


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL, as the system does when memory runs out"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV"),
        ("os.kill(os.getpid(), signal.SIGRTMIN + 2)", f"killed by signal {signal.SIGRTMIN + 2}"),
        ("os._exit(5)", "ended with exit code 5"),
        ("os._exit(0)", "it has ended"),
    ],
)
def test_how_a_process_ended(ends: str, said: str) -> None:
    process = subprocess.Popen([sys.executable, "-c", f"import os, signal; {ends}"])
    assert becomes(lambda: psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE)
    assert exit_of(process.pid) == said
    process.wait()
    assert exit_of(process.pid) == "it is gone"


class TestPatience:
    """How long a process may be without progress."""

    def test_it_is_the_timeout_or_thrice_the_longest_of_its_kind(self, tmp_path: Path) -> None:
        mine = Peers(Mapped(tmp_path / "peers", peers.RECORD, 1), 0, 1, timeout_s=100.0)
        assert mine.patience_s() == 600  # starting
        with mine.phase("step", 1):
            assert mine.patience_s() == 600  # the first
            mine.sign(20.0)
        with mine.phase("step", 2):
            assert mine.patience_s() == 100
            mine.sign(70.0)
        with mine.phase("step", 3):
            assert mine.patience_s() == 210
            with mine.phase("evaluating x", 3):
                assert mine.patience_s() == 600
            assert mine.patience_s() == 210
        with mine.phase(peers.UNHURRIED, 0):
            assert mine.patience_s() == math.inf

    def test_zero_is_never(self, tmp_path: Path) -> None:
        mine = Peers(Mapped(tmp_path / "peers", peers.RECORD, 1), 0, 1, timeout_s=0)
        mine.sign(0.0)
        mine.sign(1e9)
        assert mine.hang() is None

    def test_progress_begins_it_anew_and_one_that_works_is_waited_for(self, tmp_path: Path) -> None:
        maps = [Mapped(tmp_path / "peers", peers.RECORD, 2) for _ in range(2)]
        first, second = (Peers(maps[rank], rank, 2, timeout_s=100.0) for rank in (0, 1))
        for each in (first, second):
            with each.phase("step", 1):
                pass
        with first.phase("step", 2), second.phase("step", 2):
            first.doing("waiting for gradients", True)
            for each in (first, second):
                each.sign(0.0)
            first.sign(101.0)
            second.sign(99.0)
            assert first.hang() is None, "the second may still be at work"
            second.doing("the backward pass")
            second.sign(10.0)  # got on
            second.sign(99.0)
            assert first.hang() is None
            assert second.hang() is None
            second.sign(2.0)
            found = first.hang()
            assert found
            assert found.speaker == 0
            assert not found.silent
            assert f"rank 1 hangs:\n  rank 1 (process {os.getpid()}): step 2, the backward pass\n" in found.text
            first.doing("the forward pass")
            first.sign(0.0)
            assert second.hang() is None, "the first got on"


class Store:
    """As much of torch's store as the exchange asks, in this process; `lost` as with the node that it was on."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.lost = False

    def set(self, key: str, value: str | bytes) -> None:
        if self.lost:
            raise RuntimeError("connection reset by peer")
        self.values[key] = value.encode() if isinstance(value, str) else value

    def get(self, key: str) -> bytes:
        assert becomes(lambda: key in self.values)
        return self.values[key]

    def wait(self, keys: list[str], limit: object) -> None:
        assert becomes(lambda: all(key in self.values for key in keys))

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self.values[key] for key in keys]


class TestOverNodes:
    """What one process learns, those on other hosts read over the store."""

    @pytest.fixture
    def three(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Store, list[Peers]]]:
        """Two processes on host a, one on host b."""
        monkeypatch.setattr(records, "EXCHANGE_S", 0.05)
        monkeypatch.setattr(peers, "UNHEARD_S", 0.4)
        store, made = Store(), list[Exchanged]()

        def make(rank: int) -> None:
            made.append(Exchanged(store, peers.RECORD, rank, 3))

        names = {"MainThread": "a", "two": "a", "three": "b"}
        monkeypatch.setattr(records.processes, "host", lambda: names[threading.current_thread().name])
        others = [threading.Thread(target=make, args=(rank,), name=name) for rank, name in ((1, "two"), (2, "three"))]
        for other in others:
            other.start()
        make(0)
        for other in others:
            other.join()
        made.sort(key=lambda one: one._rank)
        yield store, [Peers(one, rank, 3, timeout_s=100.0) for rank, one in enumerate(made)]
        for one in made:
            one.close()

    def test_a_death_is_told_across_hosts(self, three: tuple[Store, list[Peers]]) -> None:
        _, (first, second, third) = three
        ended = subprocess.Popen([sys.executable, "-c", "import os; os._exit(5)"])
        assert becomes(lambda: psutil.Process(ended.pid).status() == psutil.STATUS_ZOMBIE)
        peers.SIGN.pack_into(second._memory, peers.RECORD + peers.MAIN.size, ended.pid, time.monotonic(), False)
        assert becomes(lambda: first.all()[1].pid == ended.pid, 5)
        assert first.dead()
        assert becomes(lambda: bool(third.dead()), 5), "what rank 0, on its host, has said"
        assert third.dead()[0] == f"rank 1 on a (process {ended.pid}): starting: ended with exit code 5"
        ended.wait()

    def test_who_is_on_another_host_is_unheard_when_the_store_is_lost(self, three: tuple[Store, list[Peers]]) -> None:
        store, (first, _, third) = three
        assert becomes(lambda: all(peer.pid for one in three[1] for peer in one.all()), 5), "all have met"
        third.tell_stop(75)
        assert becomes(lambda: first.told_stop() == 75, 5)
        store.lost = True
        assert becomes(lambda: bool(first.unheard()), 5)
        assert first.unheard()[0].startswith(f"rank 2 on b (process {os.getpid()}): starting: no sign of life for ")
        assert becomes(lambda: len(third.unheard()) == 2, 5)
