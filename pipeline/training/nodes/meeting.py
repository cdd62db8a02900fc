"""How the processes of a run find each other: through a file on one node, through the launcher's store over several.

A file opens no port, so that two runs on a machine cannot collide. Over several nodes there is no such file, but a store
at MASTER_ADDR and MASTER_PORT: torchrun's own, or one that the first process opens under DeepSpeed's launcher. It is
connected before the data is read, so that a network that does not work is said within minutes and not after hours.
"""

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pipeline import processes
from pipeline.console import EXIT_PEER_LOST, RankError, UserError, complain, rank

# Of a collective. Longer than any pause of a whole run (Ctrl-Z, a container that is paused) and any step: who hangs is
# found out by peers.py, who has died by the connection.
TIMEOUT = timedelta(days=7)
CONNECT_S = 300.0  # of a connection between nodes, which takes less than a second where there is a way
POLL_S = 0.1
ATTEMPT, FAILED = (
    "attempt",
    "failed",
)  # keys of the store: a name that the first process gives to its life; what one failed in
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def file_in(folder: Path) -> Path:
    """The file through which this launch's processes on one node find each other; removes those of dead launches."""
    folder.mkdir(parents=True, exist_ok=True)
    own = folder.resolve() / f".rendezvous-{processes.launched_by()}"
    processes.remove_of_dead_launches(own.parent, ".rendezvous-")
    return own


def launchers_store() -> dist.Store | None:
    """A connection to the store of this launch over several nodes; None on one node. RankError if there is none."""
    if not processes.over_nodes():
        return None
    store = _connection(serves=rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True")
    if rank() == 0:
        store.set(ATTEMPT, uuid.uuid4().hex)
    return store


@contextlib.contextmanager
def telling(store: dist.Store | None) -> Iterator[None]:
    """An error in here is told to the processes on other nodes, which may wait for this one in `join`."""
    try:
        yield
    except Exception as error:
        with contextlib.suppress(RuntimeError):
            if store is not None and store.check([ATTEMPT]):
                store.set(f"{FAILED}/{rank()}", f"{store.get(ATTEMPT).decode()}{processes.host()}: {error}")
        raise


def join(store: dist.Store, backend: str, world: int) -> None:
    """Start torch's process group over the nodes, when all processes have come here. RankError if they cannot connect.

    Until then this waits without a limit: a node may have hours of data to prepare. What another one fails in meanwhile
    (`telling`) is a RankError here.
    """
    if dist.is_initialized():
        return
    try:
        own = dist.PrefixStore(_name_of_this_meeting(store, world), store)
        with _within(CONNECT_S):
            dist.init_process_group(backend, store=own, rank=rank(), world_size=world, timeout=TIMEOUT)
            dist.all_gather_object([None] * world, None)  # NCCL connects with the first collective
    except RuntimeError as error:  # torch's DistError is one
        raise RankError(_no_connection(error), EXIT_PEER_LOST) from error


def check_same(what: dict[str, str]) -> None:
    """UserError, everywhere, where a value of `what` is another than the first process's: say the digest of a file that each
    node has of its own. All processes call."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (processes.host(), what))
    first, expected = everyone[0]
    for key, value in expected.items():
        if other := sorted({name for name, has in everyone if has[key] != value}):
            raise UserError(
                f"{key} is another on {', '.join(other)} than on {first}; copy it from there, or use one on a shared disk"
            )


def store_for_a_thread() -> dist.Store:
    """A connection of its own, with keys of its own; call on all processes at the same time."""
    told: list[Any] = [uuid.uuid4().hex]
    dist.broadcast_object_list(told)
    return dist.PrefixStore(told[0], _connection(serves=False))


def _connection(serves: bool) -> dist.TCPStore:
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        wait = timedelta(seconds=CONNECT_S)
        return dist.TCPStore(address, port, is_master=serves, timeout=wait, wait_for_workers=False, multi_tenant=serves)
    except (RuntimeError, ValueError, KeyError) as error:
        raise RankError(_no_connection(error), EXIT_PEER_LOST) from error


def _name_of_this_meeting(store: dist.Store, world: int) -> str:
    """A name that all have when all have come, and no earlier attempt had.

    torchrun's store outlives its processes: what those before a restart left in it would be taken for this attempt's. So
    each asks under a name that nobody had, and the first process, which is alive now, answers it.
    """
    if rank() != 0:
        question = uuid.uuid4().hex
        store.set(f"question/{rank()}", question)
        while not store.check([f"answer/{question}"]):
            _raise_if_failed(store, world)
        name = store.get(f"answer/{question}").decode()
        store.set(f"{name}/has/{rank()}", "1")
        return name
    name = uuid.uuid4().hex
    missing, answered = set(range(1, world)), set[bytes]()
    while missing:
        for each in sorted(missing):
            if store.check([f"{name}/has/{each}"]):
                missing.discard(each)
            elif store.check([f"question/{each}"]) and (asked := store.get(f"question/{each}")) not in answered:
                store.set(f"answer/{asked.decode()}", name)
                answered.add(asked)
        _raise_if_failed(store, world)
    return name


def _raise_if_failed(store: dist.Store, world: int) -> None:
    """RankError with what another process of this attempt has failed in; otherwise a short sleep."""
    attempt = store.get(ATTEMPT)
    for each in range(world):
        if store.check([f"{FAILED}/{each}"]) and (said := store.get(f"{FAILED}/{each}")).startswith(attempt):
            raise RankError(f"rank {each} has ended on {said.removeprefix(attempt).decode()}", EXIT_PEER_LOST)
    time.sleep(POLL_S)


@contextlib.contextmanager
def _within(seconds: float) -> Iterator[None]:
    """End the process, and say why, if the block takes longer: a connection that does not come may not raise."""

    def end() -> None:
        complain(f"rank {rank()}: {_no_connection(None)}")
        os._exit(EXIT_PEER_LOST)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _no_connection(error: Exception | None) -> str:
    where = f"{os.environ.get('MASTER_ADDR', '(no MASTER_ADDR)')}:{os.environ.get('MASTER_PORT', '(no MASTER_PORT)')}"
    why = str(error).splitlines()[0] if error and str(error) else f"nothing after {CONNECT_S:.0f} s"
    given = ", ".join(f"{name} = {os.environ.get(name, 'not set')}" for name in INTERFACES)
    return (
        f"no connection from {processes.host()} to the processes on other nodes (address of the first: {where}): {why}\n"
        "Each node has to reach the others at their names, on all ports. Where a node has several network interfaces, name "
        f"the one between the nodes on each of them, as in export {INTERFACES[0]}=eth0 {INTERFACES[1]}=eth0 "
        f"('ip -br address' lists them). Here {given}."
    )
