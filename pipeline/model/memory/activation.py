"""Activation memory: what each decoder layer of a stage keeps for backward, and where.

Takes a stage and a `ActivationPolicy` for each of its layers; each layer then keeps what it says, on the device or in the pinned
host arena, and recomputes the rest in backward (replay.py). Recomputation is non-reentrant, so gradients need not reach
the embedding and the RNG state is restored: dropout in a recomputed layer drops the same elements. No level changes a
number: what is computed twice is computed by the same code from the same values.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.model.memory import replay
from pipeline.model.memory.host_arena import HostArena, Ticket
from pipeline.model.memory.levels import ActivationPolicy, RecomputeLevel
from pipeline.model.stage import Stage
from pipeline.model.structure.parts import carried_width, embedding_of_model

PROBE_TOKENS = 32


def apply(
    stage: Stage, keeping: Mapping[int, ActivationPolicy], arena: HostArena | None = None, gradients_enter: bool = True
) -> None:
    """Wrap the layers of `stage`; what a layer without an entry keeps is not changed.

    `arena`: where layers on the host keep theirs. `gradients_enter`: whether the hidden state that the stage receives
    needs a gradient, which decides what its first layers save.
    """
    chain = _Chain(arena)
    between = {index for index in stage.layers if _is_between(keeping.get(index))}
    actions = _actions(stage, between, gradients_enter) if between else {}
    for index, layer in stage.layers.items():
        if (wanted := keeping.get(index)) is None or wanted == ActivationPolicy(RecomputeLevel.EVERYTHING):
            if arena is not None:
                layer.forward = functools.partial(_kept, layer.forward, chain)  # type: ignore[method-assign]
            continue
        trains = any(p.requires_grad for p in layer.parameters())
        again = (
            functools.partial(replay.recompute, layer.forward, layer, actions[index].get(wanted.level, {}))
            if (index in between)
            else functools.partial(whole_layer, layer.forward)
        )
        layer.forward = functools.partial(_recomputed, layer.forward, again, chain, wanted.on_host, trains)  # type: ignore[method-assign]
    stage.register_forward_pre_hook(lambda *_: chain.begin())


def _is_between(wanted: ActivationPolicy | None) -> bool:
    """Whether a layer needs to know which of its products to run again."""
    return (
        wanted is not None
        and wanted.level > RecomputeLevel.INPUT
        and wanted != ActivationPolicy(RecomputeLevel.EVERYTHING)
    )


class _Chain:
    """The tickets of one forward pass through the stage, so that backward can fetch one layer ahead."""

    def __init__(self, arena: HostArena | None) -> None:
        self.arena = arena
        self.last: Ticket | None = None

    def begin(self) -> None:
        self.last = None

    def advance(self) -> None:
        """A layer that keeps its tensors on the device begins: those that have left it may be let go."""
        if self.arena is not None:
            self.arena.advance()

    def ticket(self) -> Ticket:
        if self.arena is None:
            raise ValueError("a layer is kept on the host, but there is no arena")
        self.last = self.arena.ticket(self.last)
        return self.last


def whole_layer(forward: Callable[..., Any], store: replay.Store, *args: Any, **kwargs: Any) -> Any:
    """The whole layer runs again; `store` gets its input."""
    with torch.autograd.graph.saved_tensors_hooks(store.put, store.get):
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _recomputed(
    forward: Callable[..., Any],
    again: Callable[..., Any],
    chain: _Chain,
    on_host: bool,
    trains: bool,
    hidden: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if not torch.is_grad_enabled() or not (trains or hidden.requires_grad):  # nothing runs backward through here
        return forward(hidden, *args, **kwargs)
    before = chain.last
    if on_host:
        store: replay.Store = chain.ticket()
    else:
        chain.advance()
        store = replay.OnDevice()
    return _announced(again(store, hidden, *args, **kwargs), before)


def _kept(forward: Callable[..., Any], chain: _Chain, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    chain.advance()
    return _announced(forward(hidden, *args, **kwargs), chain.last)


def _announced(output: Any, before: Ticket | None) -> Any:
    """When backward comes to this layer, what the layer before it keeps on the host starts to come back."""
    hidden = output[0] if isinstance(output, tuple) else output
    if before is not None and hidden.requires_grad:
        hidden.register_hook(lambda gradient: before.prefetch())
    return output


def _actions(
    stage: Stage, wanted: Iterable[int], gradients_enter: bool
) -> dict[int, dict[RecomputeLevel, replay.Actions]]:
    """What each of the `wanted` layers runs again at each level, from short forwards of each alone."""
    was_training = stage.training
    calls = _calls(stage.train())
    trained_before = embedding_of_model(stage.model).parameters() if stage.is_first else ()
    enters = any(p.requires_grad for p in trained_before) or (gradients_enter and not stage.is_first)
    found: dict[int, dict[RecomputeLevel, replay.Actions]] = {}
    known: dict[tuple[Any, ...], dict[RecomputeLevel, replay.Actions]] = {}
    wanted = set(wanted)
    for index, layer in stage.layers.items():
        kind = (enters, type(layer), *((name, tuple(p.shape), p.requires_grad) for name, p in layer.named_parameters()))
        if index in wanted:
            if kind not in known:
                known[kind] = replay.analyse(layer, functools.partial(_call, layer, enters, *calls[index]))
            found[index] = known[kind]
        enters = enters or any(p.requires_grad for p in layer.parameters())
    stage.train(was_training)
    return found


def _call(layer: nn.Module, enters: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
    hidden, *others = args
    with torch.enable_grad():
        return layer(hidden.detach().requires_grad_(enters), *others, **kwargs)


@torch.no_grad()
def _calls(stage: Stage) -> dict[int, tuple[tuple[Any, ...], dict[str, Any]]]:
    """What the stage's layers are called with for one short row."""
    calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def note(index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[index] = args, kwargs

    hooks = [
        layer.register_forward_pre_hook(functools.partial(note, index), with_kwargs=True)
        for index, layer in stage.layers.items()
    ]
    like = next(p for p in stage.parameters() if p.is_floating_point())
    positions = torch.arange(PROBE_TOKENS, device=like.device).unsqueeze(0)
    if stage.is_first:
        x = torch.zeros_like(positions)
    else:
        x = torch.ones(1, PROBE_TOKENS, carried_width(stage.model), device=like.device, dtype=stage.model.dtype)
    with torch.random.fork_rng(devices=[like.device] if like.is_cuda else []):
        stage(stage.handed(x, positions, torch.zeros_like(positions)))
    for hook in hooks:
        hook.remove()
    return calls
