"""What one stage holds and how long it takes, given what each of its layers keeps.

Takes the model's cost, a stage's layers and their keeping; gives its `StagePlan`: bytes at the schedule's peak, seconds
per micro-batch. Pure arithmetic.

Assumptions, which the end of a run checks:
- A part takes flops / flops_per_s + elementwise_bytes / memory_bytes_per_s. The head makes the hidden state's gradient in
  its forward, so all its time is forward's.
- Copies to and from the host overlap with computing: forward takes the longer of computing and copying out, backward the
  longer of computing and copying in. Two layers' kept tensors are on the device meanwhile, each way at its time.
- The peak is when the last micro-batch in flight has gone forward: all micro-batches' kept tensors, and what one layer's
  pass, or the head's block, works with. What backward computes again adds to that layer's.
- A trained embedding's backward comes when its micro-batch's kept tensors are gone, the others' still there.
- In the optimizer's update there are no activations: its gradients and what it works with are a peak of their own.
"""

from collections.abc import Iterable, Sequence

from pipeline.model.memory.levels import ActivationPolicy, RecomputeLevel
from pipeline.planning.quantities import LayerCost, ModelCost, Rates, Shape, StagePlan, Work, together
from pipeline.planning.timeline import in_flight


def seconds(work: Work, rates: Rates) -> float:
    """Of `work` for one token."""
    return work.flops / rates.flops_per_s + work.elementwise_bytes / rates.memory_bytes_per_s


def kept_bytes(layer: LayerCost, level: RecomputeLevel) -> float:
    """Per token; zero where nothing runs backward."""
    return layer.levels[level].kept_bytes if layer.levels else 0.0


def recomputed_bytes(layer: LayerCost, level: RecomputeLevel) -> float:
    """Per token: what is alive in backward beyond the kept tensors and the working ones."""
    return kept_bytes(layer, max(layer.levels)) - kept_bytes(layer, level) if layer.levels else 0.0


def first_trained_stage(model: ModelCost, ranges: Sequence[tuple[int, int]]) -> int:
    """The stage that owns the first layer with something to train."""
    return next((s for s, (_, end) in enumerate(ranges) if model.first_trained < end), len(ranges) - 1)


def flight_of(model: ModelCost, first: int, end: int, stage: int, shape: Shape) -> int:
    """Micro-batches whose activations layers [first, end) hold at once on `stage`."""
    return in_flight(stage, shape, stage if end > model.first_trained else stage + 1)


def weights_of(model: ModelCost, first: int, end: int) -> tuple[int, int]:
    """Bytes of weights and of what is trained (with gradient sums and optimizer state) on a stage, at any time."""
    layers = model.layers[first:end]
    weights, trained = sum(c.weight_bytes for c in layers), sum(c.trained_bytes for c in layers)
    is_first, is_last = first == 0, end == len(model.layers)
    has_embedding = is_first or model.embedding_everywhere
    if has_embedding:
        weights, trained = weights + model.embedding_bytes, trained + model.embedding_trained_bytes
    if is_last and not (model.tied and has_embedding):
        weights, trained = weights + model.head.weight_bytes, trained + model.head.trained_bytes
    return weights, trained


def update_bytes(model: ModelCost, first: int, end: int, tokens: int) -> int:
    """What a stage has, in the optimizer's update, beyond weights and what is trained.

    The buffers of DeepSpeed's engine for the states and the gradients that it receives stay where they are meanwhile.
    """
    is_first, is_last = first == 0, end == len(model.layers)
    parts = [c.update for c in model.layers[first:end]] + [model.embedding_update] * is_first
    parts += [model.head.update] * (is_last and not (model.tied and is_first))
    buffers = (not is_first) + (not is_last and end > model.first_trained)
    return (
        sum(together(parts)) + buffers * model.carried_bytes(tokens) + (not is_first) * model.reference_bytes * tokens
    )


def working_bytes(model: ModelCost, first: int, end: int, tokens: int, levels: Iterable[RecomputeLevel]) -> float:
    """What a pass of one of the stage's layers, kept at `levels`, or the head's block works with at most."""
    each = zip(model.layers[first:end], levels, strict=True)
    most = max(c.working_bytes + recomputed_bytes(c, level) for c, level in each) * tokens
    most += _waiting_bytes(model, first, end)
    return max(most, model.head.working_bytes) if end == len(model.layers) else most


def embedding_bytes(model: ModelCost, first: int, end: int) -> int:
    """Gradients that are alive in the backward of the stage's embedding; zero where there is none that is trained."""
    return (first == 0) * model.embedding_gradient_bytes + _waiting_bytes(model, first, end)


def _waiting_bytes(model: ModelCost, first: int, end: int) -> int:
    """Of an embedding that is also the stage's head: autograd holds the head's gradient until it has the embedding's."""
    both = model.tied and first == 0 and end == len(model.layers)
    return model.embedding_gradient_bytes if both else 0


def passing_bytes(model: ModelCost, first: int, end: int, flight: int, tokens: int, first_on_host: bool) -> int:
    """Hidden states and gradients that a stage holds for its neighbours, as DeepSpeed's engine keeps them.

    Received: the receive buffer, and the gradient that goes back (where none does, the state during forward). Beyond that
    the received state is what the first layer keeps, unless that one is on the host: then the engine still holds it.
    Handed on: one output for each micro-batch in flight, until its backward, and the buffer of the gradient that comes.
    A reference's state goes as soon as it has been read or sent: the receive buffer, what was received, what is handed on.
    """
    backward, sends_gradient = end > model.first_trained, first > model.first_trained
    count = 0
    if first > 0:
        count += 2 + (flight if first_on_host and sends_gradient else 0)
    if end < len(model.layers):
        count += flight + backward
    of_reference = 2 * (first > 0) + (end < len(model.layers))
    return count * model.carried_bytes(tokens) + of_reference * model.reference_bytes * tokens


def compute_seconds(model: ModelCost, first: int, end: int, rates: Rates, tokens: int) -> tuple[float, float]:
    """Forward and backward of one micro-batch, head included, copies and recomputation left out."""
    forward = sum(seconds(c.forward, rates) for c in model.layers[first:end])
    backward = sum(seconds(c.backward, rates) for c in model.layers[first:end])
    if end == len(model.layers):
        forward += seconds(model.head.work, rates)
    return forward * tokens, backward * tokens


def copied(compute_s: tuple[float, float], host_bytes: float, rates: Rates) -> tuple[float, float]:
    """Forward and backward where `host_bytes` of each micro-batch go out beside the one and come in beside the other."""
    forward, backward = compute_s
    return max(forward, host_bytes / rates.copy_out_bytes_per_s), max(backward, host_bytes / rates.copy_in_bytes_per_s)


def evaluate(
    model: ModelCost,
    first: int,
    end: int,
    stage: int,
    keeping: Sequence[ActivationPolicy],
    device_bytes: int,
    rates: Rates,
    shape: Shape,
) -> StagePlan:
    """Layers [first, end) on `stage` of `shape.stages`, layer first + i kept as keeping[i] says.

    `keeping` of a layer that runs no backward is not used. Raises KeyError where a layer has no such level.
    """
    layers, tokens = model.layers[first:end], shape.tokens
    flight = flight_of(model, first, end, stage, shape)
    pairs = [(c, k) for c, k in zip(layers, keeping, strict=True) if c.levels]
    resident = sum(kept_bytes(c, k.level) for c, k in pairs if not k.on_host)
    hosted = [kept_bytes(c, k.level) for c, k in pairs if k.on_host]
    again = [c.levels[k.level].recomputed for c, k in pairs]
    staging = 2 * max(hosted, default=0.0) * tokens
    working = working_bytes(model, first, end, tokens, [k.level for k in keeping]) + staging
    working = max(working, embedding_bytes(model, first, end) - resident * tokens)
    weight_bytes, trained_bytes = weights_of(model, first, end)
    compute = compute_seconds(model, first, end, rates, tokens)
    compute = compute[0], compute[1] + sum(seconds(work, rates) for work in again) * tokens
    forward_s, backward_s = copied(compute, sum(hosted) * tokens, rates)
    flops = sum(c.forward.flops + c.backward.flops for c in layers) + sum(work.flops for work in again)
    first_on_host = bool(layers) and bool(layers[0].levels) and keeping[0].on_host
    return StagePlan(
        first=first,
        end=end,
        keeping=list(keeping),
        in_flight=flight,
        weight_bytes=weight_bytes,
        trained_bytes=trained_bytes,
        activation_bytes=round(resident * tokens * flight)
        + passing_bytes(model, first, end, flight, tokens, first_on_host),
        working_bytes=round(working),
        update_bytes=update_bytes(model, first, end, tokens),
        host_bytes=round(sum(hosted) * tokens * flight),
        device_bytes=device_bytes,
        forward_s=forward_s,
        backward_s=backward_s,
        flops=flops + (model.head.work.flops if end == len(model.layers) else 0.0),
    )
