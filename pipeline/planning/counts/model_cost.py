"""What each part of a model costs: counted on fake tensors by running the code that a training step runs.

Takes the whole model as one stage on `meta`, with adapters and kernels put in; gives its `ModelCost`. Layers that are
alike (modules, shapes, what is trained, whether a gradient enters) are counted once.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pipeline.kernels.cross_entropy import LogitTransform, linear_cross_entropy, tokens_per_block
from pipeline.model.memory import replay
from pipeline.model.memory.activation import whole_layer
from pipeline.model.memory.levels import RecomputeLevel
from pipeline.model.quantized import dequantised_bytes, dequantising_traffic, saved_bytes
from pipeline.model.stage import Stage, tied_head
from pipeline.model.structure.parts import carried_width, parts_of, text_config
from pipeline.planning.counts.counting import Measured, measure, received
from pipeline.planning.counts.fake_layers import fake_parameters, layer_alone
from pipeline.planning.quantities import HeadCost, LayerCost, LevelCost, ModelCost, Update, Work, together

# Of a trained parameter: its bytes with gradient sum and optimizer state, and what its update takes besides.
Training = Callable[[nn.Parameter], tuple[int, Update]]
FEW_ROWS = 8  # of a head whose block of logits is next to nothing


def model_cost(
    stage: Stage,
    *,
    rows: int,
    tokens: int,
    levels: Iterable[RecomputeLevel],
    training: Training,
    transform: LogitTransform,
    on_gpu: bool,
) -> ModelCost:
    """Count `stage`, which is the whole model on `meta`, for micro-batches of `rows` rows of `tokens` tokens.

    `levels`: those to count, of layers that run backward; EVERYTHING is always among them, as what is computed again is
    the difference to it. `training`: what a trained parameter takes. `on_gpu`: our kernels count as
    on a GPU (counting.py).
    """
    embedding = _entry(stage.model)
    trains = [index for index, layer in stage.layers.items() if _trained(layer)]
    first = 0 if _trained(embedding) else min(trains, default=len(stage.layers))
    known: dict[tuple[Any, ...], LayerCost] = {}
    layers = []
    for index, layer in stage.layers.items():
        enters = index > first or _trained(embedding)
        kind = (enters, *_form(layer))
        if kind not in known:
            known[kind] = _layer_cost(
                stage, index, rows, tokens, enters, {*levels, RecomputeLevel.EVERYTHING}, training, on_gpu
            )
        layers.append(known[kind])
    tied = bool(tied_head(stage.model))
    state, update = _held(embedding, training)
    return ModelCost(
        layers,
        _bytes(embedding),
        state,
        _head_cost(stage, rows * tokens, training, transform, gradient=first < len(layers), on_gpu=on_gpu),
        carried_width(stage.model) * stage.model.dtype.itemsize,
        first,
        tied,
        sum(p.nbytes for p in embedding.parameters() if p.requires_grad),
        update,
        embedding_everywhere=parts_of(stage.model).rereads_ids,
    )


def _layer_cost(
    stage: Stage,
    index: int,
    rows: int,
    tokens: int,
    enters: bool,
    levels: set[RecomputeLevel],
    training: Training,
    on_gpu: bool,
) -> LayerCost:
    layer, n = stage.layers[index], rows * tokens
    with layer_alone(stage.model, index, tokens, rows=rows, gradients_enter=enters) as run:
        _free_gradients(layer)
        plain = measure(run, on_gpu=on_gpu)
        measured = dict(_by_level(layer, run, plain, levels, on_gpu))
    backward = Work(plain.backward.flops / n, plain.backward.elementwise_bytes / n)
    forward = Work(plain.forward.flops / n, plain.forward.elementwise_bytes / n)
    unpacked, unpacked_again = (traffic / n for traffic in dequantising_traffic(layer))
    costs = {}
    for level, m in measured.items():
        flops, moved = (
            m.backward.flops / n - backward.flops,
            m.backward.elementwise_bytes / n - backward.elementwise_bytes,
        )
        # The share of the products that is computed again is about that of the weights that are unpacked for it.
        costs[level] = LevelCost(m.kept_bytes / n, Work(flops, moved + unpacked * flops / forward.flops))
    peak = max(plain.forward_peak_bytes, plain.backward_peak_bytes) + dequantised_bytes(layer)
    working = (peak - plain.kept_bytes) / n
    forward = forward._replace(elementwise_bytes=forward.elementwise_bytes + unpacked)
    if plain.backward.kernels:
        backward = backward._replace(elementwise_bytes=backward.elementwise_bytes + unpacked_again)
    state, update = _held(layer, training)
    return LayerCost(_bytes(layer), state, forward, backward, costs, working, update)


def _by_level(
    layer: nn.Module, run: Callable[[], Tensor], plain: Measured, levels: set[RecomputeLevel], on_gpu: bool
) -> Iterable[tuple[RecomputeLevel, Measured]]:
    """The layer measured at each of `levels`; none where nothing runs backward through it."""
    if not plain.backward.kernels:
        return
    forward = layer.forward
    actions = replay.analyse(layer, run) if levels - {RecomputeLevel.INPUT, RecomputeLevel.EVERYTHING} else {}
    for level in sorted(levels):
        if level == RecomputeLevel.EVERYTHING:
            yield level, plain
            continue
        again = (
            functools.partial(replay.recompute, forward, layer, actions[level])
            if level
            else (functools.partial(whole_layer, forward))
        )
        layer.forward = functools.partial(again, replay.OnDevice())  # type: ignore[method-assign]
        try:
            yield level, measure(run, on_gpu=on_gpu)
        finally:
            layer.forward = forward  # type: ignore[method-assign]


def _head_cost(
    stage: Stage, tokens: int, training: Training, transform: LogitTransform, gradient: bool, on_gpu: bool
) -> HeadCost:
    """The last norm, the head's products and the loss, of one micro-batch.

    One block of logits is counted, and what grows with the tokens beside it with a head of a few rows: the blocks are alike.
    """
    norm = nn.Sequential(*map(stage.model.get_submodule, parts_of(stage.model).leaving))
    head, width = stage.head, text_config(stage.model.config).hidden_size
    block = min(tokens, tokens_per_block(head.out_features, stage.model.dtype))
    with FakeTensorMode(allow_non_fake_inputs=True), fake_parameters(norm), fake_parameters(head):
        few = nn.Parameter(torch.empty(FEW_ROWS, head.in_features, dtype=head.weight.dtype), head.weight.requires_grad)

        def of(weight: Tensor, n: int) -> Measured:
            labels = torch.empty(n, dtype=torch.int64)

            def loss() -> Tensor:
                hidden = norm(received((1, n, width), stage.model.dtype, gradient))
                return linear_cross_entropy(hidden.flatten(0, 1), weight, None, labels, transform).sum()

            return measure(loss, excluded=[labels], on_gpu=on_gpu)

        one, beside, beside_all = of(head.weight, block), of(few, block), of(few, tokens)
    work = Work(
        (one.forward.flops + one.backward.flops) / block,
        (one.forward.elementwise_bytes + one.backward.elementwise_bytes) / block,
    )
    forward = one.forward_peak_bytes + beside_all.forward_peak_bytes - beside.forward_peak_bytes
    backward = one.backward_peak_bytes + beside_all.backward_peak_bytes - beside.backward_peak_bytes
    (state, update), (of_norm, update_of_norm) = _held(head, training), _held(norm, training)
    working = max(forward, backward)
    return HeadCost(_bytes(head) + _bytes(norm), state + of_norm, work, working, together([update, update_of_norm]))


def _entry(model: nn.Module) -> nn.Module:
    """The embedding, and what else has weights and runs before the layers, together."""
    parts = parts_of(model)
    return nn.ModuleList(map(model.get_submodule, (parts.embedding, *parts.entry)))


def _trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _bytes(module: nn.Module) -> int:
    """Of the weights that are loaded, as they will be stored; an adapter's are with what is trained."""
    return sum(p.numel() * p.element_size() for p in module.parameters() if not p.requires_grad) - saved_bytes(module)


def _held(module: nn.Module, training: Training) -> tuple[int, Update]:
    """What all that is trained of `module` takes."""
    each = [training(p) for p in module.parameters() if p.requires_grad]
    return sum(n for n, _ in each), together(update for _, update in each)


def _free_gradients(layer: nn.Module) -> None:
    """As training/optim/pipeline_optimizer.py does: a gradient is added to its sum as soon as autograd has it, and is gone."""

    def free(parameter: Tensor) -> None:
        parameter.grad = None

    for parameter in layer.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(free)


def _form(layer: nn.Module) -> tuple[Any, ...]:
    parameters = ((name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in layer.named_parameters())
    return type(layer), getattr(layer, "attention_type", None), *parameters
