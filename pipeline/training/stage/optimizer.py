"""The optimizer of our stage's trained parameters, with what is one weight on several stages; the rate's schedule."""

from collections.abc import Callable

import torch.distributed as dist

from pipeline.console import UserError, log
from pipeline.model.adapters.base import trainable
from pipeline.model.stage import Stage, tied_head
from pipeline.peft.types import is_shared
from pipeline.training.engine import engine
from pipeline.training.optim import parameter_groups, regularisation
from pipeline.training.optim.inner import make_inner
from pipeline.training.optim.lr_schedule import learning_rate, warmup_steps
from pipeline.training.optim.pipeline_optimizer import PipelineOptimizer
from pipeline.training.stage import families
from pipeline.training.start.resolved import Resolved, Updates


def optimizer_of(plan: Resolved, stage: Stage, place: engine.Place) -> PipelineOptimizer:
    """Over this stage's trained parameters; a family that shares ranks out among all stages does so after its updates."""
    optimizer = build_optimizer(plan.updates, stage, place)
    families.share_ranks(stage, optimizer, plan.trained.adapter)
    return optimizer


def build_optimizer(updates: Updates, stage: Stage, place: engine.Place) -> PipelineOptimizer:
    """Over this stage's trained parameters, which may be none."""
    table = updates.optimizer
    parameters = trainable(stage)
    # A tied head on a stage of its own is the embedding once more.
    copies = {} if stage.is_first else tied_head(stage.model)
    shared = {name: p.numel() for name, p in parameters.items() if is_shared(name)}
    own = sum(p.numel() for name, p in parameters.items() if name not in copies and name not in shared)
    told: list[tuple[int, int, dict[str, int]]] = [(0, 0, {})] * place.world
    dist.all_gather_object(told, (place.stage, own, shared))
    common = {name: size for _, _, held in told for name, size in held.items()}
    total = sum(count for _, count, _ in told) // place.replicas + sum(common.values())
    if not total:
        raise UserError("nothing to train: target_modules matches no parameter")
    faster = f"; B learns at {table.loraplus:g} times the rate (LoRA+)" if table.loraplus != 1 else ""
    log(f"trained:  {total:,} parameters{faster}")
    held_down = updates.product_decay or updates.largest_norm
    factors = regularisation.factors_of(stage) if held_down else {}
    undecayed = {f"{module}.{letter}" for module in factors for letter in "AB"} if updates.product_decay else ()
    # A copy of the embedding must make the same update as the embedding, so it goes by its name.
    named = {copies.get(name, name): p for name, p in parameters.items()}
    groups = parameter_groups.build(
        named,
        fast_ratio=table.loraplus,
        weight_decay=table.weight_decay,
        undecayed=undecayed,
        specials=parameter_groups.specials(table),
    )
    betas = table.beta1, table.beta2
    inner = make_inner(table.type, groups, lr=table.lr, betas=betas, eps=table.eps, weight_decay=table.weight_decay)
    optimizer = PipelineOptimizer(parameters, inner, updates.clip)
    if common and place.stages > 1:  # one tensor for modules of several stages, as a tied embedding is
        earlier = {name for stage_of, _, held in told if stage_of < place.stage for name in held}
        optimizer.share(dict(sorted(common.items())), frozenset(earlier))
    regularisation.attach(optimizer, factors, updates.product_decay, updates.largest_norm)
    families.after_updates(stage, inner)
    return optimizer


def tie_trained_embeddings(stage: Stage, optimizer: PipelineOptimizer, place: engine.Place) -> None:
    """Trained tied embeddings on two stages are one weight: gradients are summed, and both make the same update."""
    tied = tied_head(stage.model)
    if place.stages == 1 or not tied:
        return
    own = [name for name in optimizer.parameters_by_name if name in {*tied, *tied.values()}]
    group = None
    for replica in range(place.replicas):  # every process takes part in making every group
        ranks = [place.topology.get_rank(pipe=s, data=replica) for s in (0, place.stages - 1)]
        candidate = dist.new_group(ranks)
        group = candidate if place.rank in ranks else group
    if own:
        optimizer.tie(frozenset(own), group, counts=stage.is_first)


def schedule(updates: Updates, steps_in_epoch: int) -> Callable[[int, int], float]:
    """(step, total steps) → learning rate."""
    if (constant := updates.constant_lr) is not None:
        return lambda step, total: constant
    warmup = warmup_steps(updates.warmup, steps_in_epoch)
    peak, shape, lowest = updates.optimizer.lr, updates.lr_shape, updates.optimizer.lr_min
    return lambda step, total: learning_rate(step, peak=peak, warmup=warmup, total=total, shape=shape, lowest=lowest)
