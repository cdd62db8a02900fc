"""A run whose nodes have disks of their own: what it keeps is carried to the first process's node, and back for a resumption.

Takes the run's folder, which has one name on every node; gives the first node's folder what other nodes write into theirs.
A save of what is trained, and a resumption, are the same moment for all processes, and carried there (`gather`,
`checkpoint`). Checkpoints are put together through their staging folder, maybe from a thread while the main thread hangs in
a step (commit.py): there a thread of one process a node keeps these folders alike, so that the protocol is the one of a
shared disk. Small notes go over the launcher's store, files in pieces over groups of their own.
"""

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pipeline.console import is_out_of_space
from pipeline.files import write_text
from pipeline.processes import host, launched_by
from pipeline.training.checkpoint import commit, manifest
from pipeline.training.checkpoint.manifest import CheckpointError
from pipeline.training.engine.engine import Place
from pipeline.training.nodes import meeting, pieces

LOOK_S = 0.1
SETTLE_S = 15.0  # for the other nodes to see what the first has done, before it may go
THERE = "there"


class Carrier:
    """All processes make one at the same time. `apart`: the nodes whose disk is not the first process's.

    Of each such node one process carries: its first.
    """

    def __init__(self, output_dir: Path, place: Place, apart: frozenset[int]) -> None:
        self._output_dir = output_dir
        self._place, self._apart = place, sorted(apart)
        self._carriers = {node: place.nodes.index(node) for node in self._apart}
        self.is_apart = place.node in apart
        self._carries = self.is_apart and self._carriers[place.node] == place.rank
        told: list[Any] = [host()]
        dist.broadcast_object_list(told)
        self.kept_on = str(told[0]) if self.is_apart else ""  # the host that has this process's checkpoints, if another
        self._calls, self._of_thread = (dist.new_group(backend="gloo", timeout=meeting.TIMEOUT) for _ in range(2))
        self._store = meeting.store_for_a_thread()
        self._one = threading.Lock()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._run_dir = Path()
        self._taken = dict.fromkeys(self._apart, 0)  # offers of each node that the first process has answered
        self._version, self._published = 0, ""
        self._offers = 0
        self._staged: dict[str, set[str]] = {}  # of the first's staging folders: the notes that were carried into each

    def begin(self, run_dir: Path) -> None:
        """The run has its folder `run_dir`, everywhere. All processes call."""
        self._run_dir = run_dir
        if self._place.rank == 0:
            self._publish()
        dist.barrier()
        if self._carries or self._place.rank == 0:
            turn = self._down_and_up if self._carries else self._serve
            self._thread = threading.Thread(target=self._run, args=(turn,), name="carrier", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """The run is over: no more is saved."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def gather(self, folder: Path) -> None:
        """Move the files of `folder`, on nodes apart, into the first process's. All processes call; OSError on those on which
        a file could not be read or written, and the others may go on."""
        found: list[tuple[str, int]] = []
        everyone: list[Any] = [None] * self._place.world
        with _first_error() as trying:
            if self._carries:
                trying(lambda: found.extend((path.name, path.stat().st_size) for path in sorted(folder.iterdir())))
            dist.all_gather_object(everyone, found)
            for sender, files in enumerate(everyone):
                for name, size in files:
                    if self._place.rank == sender:
                        trying(pieces.send, folder / name, size, 0, self._calls)
                    elif self._place.rank == 0:
                        trying(pieces.receive, folder / name, size, sender, self._calls)
        if self._carries:
            shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def checkpoint(
        self, folder: Path, saved: dict[str, Any], needs: Callable[[str], bool]
    ) -> Iterator[tuple[Path, dict[str, Any]]]:
        """The first process's checkpoint where this one can read it, and its manifest: on a node apart the shards with a tensor
        that it `needs`, for as long as the block lasts. All processes call. CheckpointError where they do not arrive whole.
        """
        told: list[Any] = [None]
        if self._place.rank == 0:
            told = [{name: commit.keys_of(folder / name) for name in saved["files"]}]
        dist.broadcast_object_list(told)
        own = [name for name, keys in told[0].items() if any(map(needs, keys))] if self.is_apart else []
        everyone: list[Any] = [None] * self._place.world
        dist.all_gather_object(everyone, own)
        here = self._output_dir / f".resumed-{launched_by()}-{self._place.rank}"
        try:
            try:
                self._bring(folder, saved, everyone, here)
            except OSError as error:
                raise CheckpointError(f"{folder} could not be brought from its disk to {host()}: {error}") from error
            known = {name: saved["files"][name] for name in own}
            if damaged := [name for name in known if manifest.sha256(here / name) != known[name]["sha256"]]:
                raise CheckpointError(f"{folder / damaged[0]} has not arrived as it was on {host()}")
            yield (here, saved | {"files": known}) if self.is_apart else (folder, saved)
        finally:
            shutil.rmtree(here, ignore_errors=True)

    def _bring(self, folder: Path, saved: dict[str, Any], wanted: list[list[str]], here: Path) -> None:
        with _first_error() as trying:
            if wanted[self._place.rank]:
                trying(here.mkdir, parents=True, exist_ok=True)
            for receiver, names in enumerate(wanted):
                for name in names:
                    size = saved["files"][name]["size"]
                    if self._place.rank == receiver:
                        trying(pieces.receive, here / name, size, 0, self._calls)
                    elif self._place.rank == 0:
                        trying(pieces.send, folder / name, size, receiver, self._calls)

    def settle(self) -> None:
        """Return when the other nodes have what this one's staging folders say, or after SETTLE_S: the process may end."""
        with suppress(RuntimeError):  # torch's errors of a store, or a process, that is gone
            if self._place.rank == 0:
                version, deadline = self._publish(), time.monotonic() + SETTLE_S
                while time.monotonic() < deadline and any(self._seen(node) < version for node in self._apart):
                    time.sleep(LOOK_S)
            elif self._carries:
                self._up()

    def _run(self, turn: Callable[[], None]) -> None:
        while not self._over.wait(LOOK_S):
            try:
                turn()
            except RuntimeError:  # as in settle
                return

    # The first process.

    def _serve(self) -> None:
        for node in self._apart:
            while self._store.check([offer := f"offer/{node}/{self._taken[node]}"]):
                answer = self._accept(json.loads(self._store.get(offer)), self._carriers[node])
                self._publish()
                self._store.set(f"answer/{node}/{self._taken[node]}", json.dumps(answer))
                self._taken[node] += 1
        self._publish()

    def _accept(self, offer: dict[str, Any], sender: int) -> list[Any]:
        """Why it could not be put here, and whether for want of room; empty if it was."""
        target = self._run_dir / offer["folder"] / offer["name"]
        try:
            target.parent.mkdir(exist_ok=True)
            if offer["name"]:
                pieces.receive(target, offer["size"], sender, self._of_thread)
        except OSError as error:
            return [f"{target}: {error}", is_out_of_space(error)]
        return []

    def _publish(self) -> int:
        """Say which staging folders are here and which have failed, if that has changed; the number of what is said."""
        with self._one:
            stagings = sorted(self._run_dir.glob(".staging-*"))
            there = {path.name: _read(path / commit.FAILED) for path in stagings}
            if (said := json.dumps(there)) != self._published or not self._version:
                self._version, self._published = self._version + 1, said
                self._store.set(THERE, json.dumps([self._version, there]))
            return self._version

    def _seen(self, node: int) -> int:
        return int(self._store.get(f"seen/{node}")) if self._store.check([f"seen/{node}"]) else 0

    # The carrying process of another node.

    def _down_and_up(self) -> None:
        self._up()
        self._down()

    def _down(self) -> None:
        """Make the staging folders those of the first process: appear, fail, go."""
        with self._one:
            version, there = json.loads(self._store.get(THERE))
            self._store.set(f"seen/{self._place.node}", str(version))  # before what may let this process end
            for name, failure in there.items():
                (self._run_dir / name).mkdir(exist_ok=True)
                self._staged.setdefault(name, set())
                if failure is not None and not (self._run_dir / name / commit.FAILED).exists():
                    write_text(self._run_dir / name / commit.FAILED, failure)
            for name in set(self._staged) - set(there):
                del self._staged[name]
                shutil.rmtree(self._run_dir / name, ignore_errors=True)

    def _up(self) -> None:
        """Carry what this node's processes have written since: a shard before the note that says so."""
        with self._one:
            for staging in sorted(self._run_dir.glob(".staging-*")):
                if staging.name not in self._staged:
                    self._offer(staging.name, "")
                    self._staged[staging.name] = set()
                for rank in (r for r, node in enumerate(self._place.nodes) if node == self._place.node):
                    note, shard = staging / f"rank-{rank}.json", staging / f"rank-{rank}.safetensors"
                    if note.exists() and note.name not in self._staged[staging.name]:
                        if shard.exists() and (why := self._offer(staging.name, shard.name, shard)):
                            manifest.write(note, {"error": why[0], "full": why[1]})
                        self._offer(staging.name, note.name, note)
                        self._staged[staging.name].add(note.name)

    def _offer(self, folder: str, name: str, file: Path | None = None) -> list[Any]:
        """Hand a file, or the folder alone, to the first process; what it answers (`_accept`)."""
        number = f"{self._place.node}/{self._offers}"
        self._offers += 1
        size = file.stat().st_size if file else 0
        self._store.set(f"offer/{number}", json.dumps({"folder": folder, "name": name, "size": size}))
        unread: list[Any] = []
        try:
            if file:
                pieces.send(file, size, 0, self._of_thread)
        except OSError as error:
            unread = [str(error), False]
        deadline = time.monotonic() + commit.PEER_TIMEOUT_S
        while not self._store.check([f"answer/{number}"]):
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"waited {commit.PEER_TIMEOUT_S:.0f} s for the first process to take {folder}/{name}"
                )
            time.sleep(LOOK_S / 5)
        answer: list[Any] = json.loads(self._store.get(f"answer/{number}"))
        for key in ("offer", "answer"):
            self._store.delete_key(f"{key}/{number}")
        return unread or answer


def brought(
    carrier: Carrier | None, folder: Path, saved: dict[str, Any], needs: Callable[[str], bool]
) -> AbstractContextManager[tuple[Path, dict[str, Any]]]:
    """`Carrier.checkpoint`; where all nodes share a disk, the checkpoint as it is."""
    return carrier.checkpoint(folder, saved, needs) if carrier else nullcontext((folder, saved))


@contextmanager
def _first_error() -> Iterator[Callable[..., None]]:
    """Yield `trying(call, *arguments)`; the first OSError of these calls is raised when the block ends, not before."""
    errors: list[OSError] = []

    def trying(call: Callable[..., Any], *arguments: Any, **named: Any) -> None:
        try:
            call(*arguments, **named)
        except OSError as error:
            errors.append(error)

    yield trying
    if errors:
        raise errors[0]


def _read(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
