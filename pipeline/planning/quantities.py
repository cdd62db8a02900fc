"""What the planner knows and what it decides, as plain numbers.

`ModelCost` comes from counting, `Rates` from a calibration or from given figures, `Plan` from solving. All FLOPs and
bytes of activations are per token (of one micro-batch); weights are bytes.
"""

from collections.abc import Iterable
from typing import NamedTuple

from pipeline.model.memory.levels import ActivationPolicy, RecomputeLevel


class Work(NamedTuple):
    """Of one direction through a part: products in FLOPs, everything else as bytes read and written, per token."""

    flops: float
    elementwise_bytes: float = 0.0


class LevelCost(NamedTuple):
    """A level's price: bytes kept from forward to backward, and what backward computes once more."""

    kept_bytes: float
    recomputed: Work


class Update(NamedTuple):
    """What is on the device only while the optimizer updates: of all that is trained together (`all_bytes`: its gradients),
    and of one parameter after another (`one_bytes`, the largest's), with what the optimizer computes."""

    all_bytes: int = 0
    one_bytes: int = 0


def together(updates: Iterable[Update]) -> Update:
    """Of several parameters, or parts of a model, in one update."""
    every = list(updates)
    return Update(sum(u.all_bytes for u in every), max((u.one_bytes for u in every), default=0))


class LayerCost(NamedTuple):
    """One decoder layer. `backward` is without recomputation and zero where nothing runs backward."""

    weight_bytes: int
    trained_bytes: int  # adapter, its fp32 gradient sum and optimizer state; not what only the update has
    forward: Work
    backward: Work
    levels: dict[RecomputeLevel, LevelCost]  # empty where nothing runs backward
    # Most that is alive within one pass of the layer, in either direction, beyond what is kept where everything is kept.
    # A layer that keeps less also has alive, in its backward, what it computes again.
    working_bytes: float
    update: Update = Update()


class HeadCost(NamedTuple):
    """Loss and hidden gradient, on the last stage. `working_bytes` is for the whole micro-batch: a block of logits."""

    weight_bytes: int
    trained_bytes: int
    work: Work
    working_bytes: int
    update: Update = Update()


class ModelCost(NamedTuple):
    """The whole model. `hidden_bytes`: of one token's hidden state; a stage holds it as received and as handed on.
    `behind_bytes`: of a micro-batch, what travels behind its hidden state: the routers' sums (model/router_loss.py).
    `reference_bytes`: of a token's, what a reference that runs in every step hands on beside it.

    `embedding_gradient_bytes`: of one micro-batch, which the embedding's backward makes where it is trained, else 0.
    `embedding_everywhere`: each stage has the embedding, frozen, because its layers need the token ids (structure/handed.py).
    """

    layers: list[LayerCost]
    embedding_bytes: int
    embedding_trained_bytes: int
    head: HeadCost
    hidden_bytes: int
    first_trained: int  # below this layer nothing runs backward
    tied: bool = False  # the head's weight is the embedding's: one stage has it once
    embedding_gradient_bytes: int = 0
    embedding_update: Update = Update()
    behind_bytes: int = 0
    reference_bytes: int = 0
    embedding_everywhere: bool = False

    def carried_bytes(self, tokens: int) -> int:
        """Of a micro-batch of so many tokens, what goes from stage to stage and, as its gradient, back."""
        return self.hidden_bytes * tokens + self.behind_bytes


class Rates(NamedTuple):
    """Of one device. Where they come from (measured here, given, or a data sheet) is said in `source`."""

    flops_per_s: float
    memory_bytes_per_s: float
    copy_out_bytes_per_s: float
    copy_in_bytes_per_s: float
    link_bytes_per_s: float
    source: str


class Link(NamedTuple):
    """Between two stages that follow on each other. `over_network`: they are on two nodes. `source`: of the rate, as in
    `Rates`."""

    bytes_per_s: float
    over_network: bool
    source: str


class Shape(NamedTuple):
    """A step of the run: micro-batches of one replica, and tokens of one micro-batch."""

    tokens: int
    micro_batches: int
    stages: int


class StagePlan(NamedTuple):
    """One stage of a plan. Bytes are at the schedule's peak, or the update's, which is at another time; seconds
    are per micro-batch."""

    first: int
    end: int
    keeping: list[ActivationPolicy]  # of layers first … end − 1
    in_flight: int  # micro-batches whose activations are held at once
    weight_bytes: int
    trained_bytes: int
    activation_bytes: (
        int  # kept on the device, all in-flight micro-batches, hidden states received and handed on included
    )
    working_bytes: int  # within a layer, or the head's block, and staging buffers of what comes back from the host
    update_bytes: int  # on the device while the optimizer updates, when there are no activations
    host_bytes: int
    device_bytes: int  # what the device has for the run
    forward_s: float
    backward_s: float
    flops: float  # executed per token, forward, backward and recomputation, head included

    @property
    def total_bytes(self) -> int:
        passing = self.activation_bytes + self.working_bytes
        return self.weight_bytes + self.trained_bytes + max(passing, self.update_bytes)

    @property
    def headroom_bytes(self) -> int:
        return self.device_bytes - self.total_bytes


class Plan(NamedTuple):
    """All stages and what they make together."""

    stages: list[StagePlan]
    step_s: float
    bubble: float  # share of the stages' time in which they wait, 0 to 1
    tokens_per_s: float
    flops: float  # executed per token
    least_flops: float  # per token, were nothing recomputed
    fits: bool
