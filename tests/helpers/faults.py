"""What is broken of two nodes of namespaces, and what is said of it: the rows of a table in docs/clusters.md."""

import signal
from collections.abc import Callable
from typing import NamedTuple

from tests.helpers.namespaces import LINK, Node

Nodes = tuple[Node, Node]
HANG_S = 12.0
HANG_1 = "rank 1 hangs:\n  rank 1 on node-b"


class Fault(NamedTuple):
    """`breaks` two nodes; then the ranks of the nodes `left` end within `within_s`, of which `says` says `words`.

    `in_a_save`: what it says where it was waiting for the other's part of a checkpoint. Nodes meet through a folder there,
    and no connection tells that one has gone.
    """

    breaks: Callable[[Nodes], object]
    left: tuple[int, ...]
    within_s: float
    says: int
    words: str
    in_a_save: str


# By what docs/clusters.md calls them.
FAULTS = {
    "kill -9 of all processes of the second node": Fault(
        lambda nodes: nodes[1].kill(), (0,), 30, 0, "lost rank 1 on node-b", HANG_1
    ),
    "kill -9 of all processes of the first node, which has the store": Fault(
        lambda nodes: nodes[0].kill(), (1,), 30, 1, "lost rank 0 on node-a", "rank 0 hangs:\n  rank 0 on node-a"
    ),
    "SIGSTOP of all processes of the second node": Fault(
        lambda nodes: nodes[1].signal(signal.SIGSTOP), (0,), 60, 0, HANG_1, HANG_1
    ),
    "the link goes down": Fault(lambda nodes: nodes[1].do(f"ip link set {LINK} down"), (0, 1), 60, 0, HANG_1, HANG_1),
}
