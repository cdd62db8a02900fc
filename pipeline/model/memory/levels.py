"""How much of a decoder layer is kept between forward and backward, and where.

The vocabulary that the stage (which does it), the counting (which measures it) and the planner (which chooses) share.
"""

from enum import IntEnum
from typing import NamedTuple


class RecomputeLevel(IntEnum):
    """What is kept for backward; each level keeps what those below it keep, the rest is recomputed."""

    INPUT = 0  # x alone: the whole layer runs forward once more
    ADAPTER = 1  # and z = A·h: o_proj and down_proj are not needed again
    ATTENTION = 2  # and attention's output and log-sum-exp
    PROJECTIONS = 3  # and q, k, v
    EVERYTHING = 4  # and gate, up and all else: no product is computed twice


class ActivationPolicy(NamedTuple):
    """What one layer keeps for backward, and whether it does so in pinned host memory."""

    level: RecomputeLevel
    on_host: bool = False
