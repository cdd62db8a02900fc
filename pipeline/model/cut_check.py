"""Does the model, cut into stages and with adapters put in, compute what the uncut one does? Asked before a weight is read.

Takes the model's config and each stage's layers; runs a tiny copy (tiny_copy.py) whole, and once more through the `Stage`
that training uses, one stage after another, with nothing but what crosses stages between them. Then the adapters: each
kind of module that has one must run, and its parameters must get a gradient. UserError with the reason where not.
"""

from collections.abc import Callable, Sequence
from copy import copy, deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from pipeline.console import UserError, warn
from pipeline.model.adapters.base import trainable
from pipeline.model.router_loss import RouterLoss
from pipeline.model.stage import Stage
from pipeline.model.structure.build import logit_transform
from pipeline.model.structure.parts import layers_of_model, parts_of
from pipeline.model.tiny_copy import NoCopyError, tiny_copy, token_ids
from pipeline.model.unsupported import named
from pipeline.names import any_layer

TOLERANCE = (
    1e-5  # of the largest logit. A cut of a model that allows it is exact; one that does not is off by percents.
)


def check(
    config: PretrainedConfig,
    ranges: Sequence[tuple[int, int]],
    put: Callable[[Stage], None] | None = None,
    *,
    router_loss: bool = False,
) -> None:
    """Compare stages of layers [first, end) each with the whole model; `put`, if any, puts small adapters into a stage.
    `router_loss`: whether the loss of a mixture's routers is trained, which is compared as well.

    Raises UserError where they differ by more than rounding, where an adapter has no effect, and where a model that is to be
    cut has no tiny copy, so that it cannot be known what its stages compute.
    """
    kind = config.model_type
    try:
        whole, logits = tiny_copy(config)
    except NoCopyError as error:
        what = f"model_type '{kind}': no tiny copy of it can be run to try out how it trains ({error})"
        if len(ranges) > 1:
            raise UserError(
                f"{what}, and stages that compute something else would train in silence; use pipeline_stages = 1"
            ) from error
        warn(f"{what}; what is wrong with it, if anything is, shows in training")
        return
    _check_cut(whole, logits, ranges)
    if put is not None:
        _check_adapters(whole, logits, ranges, put)
    if router_loss:
        _check_router_loss(whole, ranges)


def _check_cut(whole: PreTrainedModel, logits: Tensor, ranges: Sequence[tuple[int, int]]) -> None:
    kind, n_layers = whole.config.model_type, len(layers_of_model(whole))
    try:
        with torch.no_grad(), named(kind, "running it as one stage, tried on a tiny copy,"):
            alone = difference(_logits(stages_of(whole, [(0, n_layers)])), logits)
        with torch.no_grad(), named(kind, f"cutting it into {len(ranges)} stages, tried on a tiny copy,"):
            off = difference(_logits(stages_of(whole, ranges)), logits) if len(ranges) > 1 else alone
    except UserError as error:
        if len(ranges) > 1 and parts_of(whole).second:
            raise UserError(_second_tensor(kind)) from error
        raise UserError(f"{error}; use pipeline_stages = 1" if len(ranges) > 1 else str(error)) from error
    if alone > TOLERANCE:
        raise UserError(
            f"model_type '{kind}' changes its logits in a way this program does not know; "
            "training it would minimise another loss than the model's own"
        )
    if off > TOLERANCE and parts_of(whole).second:
        raise UserError(_second_tensor(kind))
    if off > TOLERANCE:
        raise UserError(
            f"model_type '{kind}' cannot be cut into stages: on a tiny copy the logits of {len(ranges)} stages differ from "
            f"the whole model's by {off:.2g} of the largest. More than one hidden state goes from layer to layer, or what "
            "comes before the first layer or after the last is done on every stage; use pipeline_stages = 1"
        )


def _second_tensor(kind: str) -> str:
    return (
        f"model_type '{kind}' cannot be cut into stages here: a layer hands the next one a second tensor beside the hidden "
        "state, and one alone crosses from stage to stage; cut it elsewhere (layers_per_stage), or use pipeline_stages = 1"
    )


def _check_adapters(
    whole: PreTrainedModel, logits: Tensor, ranges: Sequence[tuple[int, int]], put: Callable[[Stage], None]
) -> None:
    """The same with adapters at their start, which change nothing, and backward through them."""
    kind = whole.config.model_type
    with named(kind, "training with adapters in these modules, tried on a tiny copy,"):
        stages = stages_of(whole, ranges)
        for stage in stages:
            put(stage)
        found = _logits(stages, backward=True)
    if (off := difference(found, logits)) > TOLERANCE:
        raise UserError(
            f"model_type '{kind}': adapters change what the model computes before they are trained, on a tiny copy by "
            f"{off:.2g} of the largest logit; choose other target_modules"
        )
    reached: dict[str, bool] = {}
    for name, parameter in ((n, p) for stage in stages for n, p in trainable(stage).items()):
        module = any_layer(name.rpartition(".")[0])
        reached[module] = reached.get(module, False) or parameter.grad is not None
    if idle := [module for module, has_gradient in reached.items() if not has_gradient]:
        raise UserError(
            f"target_modules: an adapter in {', '.join(idle)} gets no gradient, because model_type '{kind}' does not run "
            "it as a module, or only chooses by what it gives; leave it out"
        )


@torch.no_grad()
def _check_router_loss(whole: PreTrainedModel, ranges: Sequence[tuple[int, int]]) -> None:
    kind = whole.config.model_type
    with named(kind, "computing the loss of its routers, tried on a tiny copy,"):
        right = whole(input_ids=token_ids(), labels=token_ids(), output_router_logits=True, use_cache=False).aux_loss
        stages = stages_of(whole, ranges)
        routers = [RouterLoss(stage, 1.0) for stage in stages]
        for stage in stages:
            stage.training = True  # the stage alone: its layers stay as they are
        _logits(stages)
        off = difference(routers[-1].take(), right)
    if off > TOLERANCE:
        raise UserError(
            f"model_type '{kind}' computes the loss of its routers in a way this program does not know (on a tiny copy it is "
            f"off by {off:.2g}); set load_balancing_loss_coef = 0"
        )


def stages_of(whole: PreTrainedModel, ranges: Sequence[tuple[int, int]]) -> list[Stage]:
    """Stages of layers [first, end) each, in eval mode, that share the tensors of `whole`, which stays as it is."""
    return [Stage(_to_cut(whole, first, end), first, end).eval() for first, end in ranges]


def _to_cut(whole: PreTrainedModel, first: int, end: int) -> PreTrainedModel:
    """A copy that shares the model's tensors, of which a Stage of layers [first, end) may be made and given adapters.

    Only what that changes is copied: the model, its base, and these layers.
    """
    parts, layers = parts_of(whole), layers_of_model(whole)
    shared = {id(t): t for t in (*layers.parameters(), *layers.buffers())} | {id(whole.config): whole.config}
    own = [deepcopy(layer, dict(shared)) if first <= i < end else layer for i, layer in enumerate(layers)]
    model = _with_own(whole, "", (parts.layers, parts.embedding, parts.head, *parts.entry, *parts.leaving))
    model.set_submodule(parts.layers, nn.ModuleList(own))
    return model  # type: ignore[no-any-return]


def _with_own(module: Any, name: str, wanted: tuple[str, ...]) -> Any:
    """A shallow copy of `module`, named `name`, and of the modules within it on the way to those `wanted`."""
    new = _shallow(module)
    for leaf, child in module._modules.items():
        full = f"{name}.{leaf}".lstrip(".")
        if any(one.startswith(f"{full}.") for one in wanted):
            new._modules[leaf] = _with_own(child, full, wanted)
    return new


def _shallow(module: Any) -> Any:
    new = copy(module)
    for table in ("_modules", "_parameters", "_buffers"):
        new.__dict__[table] = dict(new.__dict__[table])
    return new


def _logits(stages: list[Stage], backward: bool = False) -> Tensor:
    """[1, TOKENS, V] of the stages in a row. `backward`: from their sum of squares, through each stage, as in training."""
    ids = token_ids()
    carried: tuple[Tensor, ...] = (ids, torch.arange(ids.shape[1]).expand_as(ids))
    entered: list[tuple[Tensor, Tensor]] = []  # what a stage gave, and the leaf that the next one was given
    for stage in stages[:-1]:
        output = stage(carried)
        entered.append((output[0], output[0].detach().requires_grad_(backward)))
        carried = (entered[-1][1], *output[1:])
    logits = logit_transform(stages[-1].model.config).apply(stages[-1].head(stages[-1](carried)))
    if backward:
        _backward(logits.square().sum())
        for given, leaf in reversed(entered):
            if given.requires_grad and leaf.grad is not None:
                given.backward(leaf.grad)
    return logits.detach()


def _backward(loss: Tensor) -> None:
    if loss.requires_grad:
        loss.backward()


def difference(found: Tensor, right: Tensor) -> float:
    """The largest difference as a share of the largest right value; infinite for what is no number."""
    off = float((found - right).abs().max() / right.abs().max())
    return off if off == off else float("inf")
