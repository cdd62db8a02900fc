"""Our stage of the model: its weights, what is trained in it, kernels, and the memory of its activations."""

import torch

from pipeline.console import UserError, gib, log_if_slow
from pipeline.model import neftune, unsupported, weights
from pipeline.model.adapters.base import trainable
from pipeline.model.memory import activation
from pipeline.model.memory.host_arena import HostArena
from pipeline.model.quantized import saved_bytes
from pipeline.model.stage import Stage, check_head
from pipeline.training.engine import engine
from pipeline.training.stage import parts
from pipeline.training.start import kernel_places, resolve
from pipeline.training.start import plan as planned
from pipeline.training.start.resolved import Resolved


def build_stage(
    plan: Resolved,
    run_plan: planned.RunPlan,
    place: engine.Place,
    arena: HostArena | None,
    neftune_alpha: float | None,
) -> Stage:
    """Our part of the model with its weights, adapters, kernels and activation memory."""
    first, end = run_plan.ranges[place.stage]
    if run_plan.ranges != plan.ranges:  # chosen by 'auto'
        resolve.check_tiny(plan, run_plan.ranges)
    stage = Stage(plan.meta_model.make(), first, end)
    stage.kept_apart_by = plan.kept_apart_by
    with engine.agreement(place), unsupported.named(plan.meta_model.config.model_type, "putting its stage together"):
        check_room(stage, place)
        parts.put_quantised(stage, plan.base.scheme)
        weights.load(stage, plan.base.folder, plan.base.dtype, place.device)
        stage.to(place.device)  # RoPE tables and other buffers
        if stage.is_last:
            check_head(stage)
        parts.put_trained(stage, plan.trained)
    with log_if_slow("starting: looking where the kernels fit"):
        kernel_places.put(stage, plan.layout.kernels, place)
    keeping = dict(enumerate(run_plan.keeping[place.stage], start=first))
    first_trained = engine.first_trained_stage(bool(trainable(stage)), place)
    if neftune_alpha:
        neftune.apply(stage, neftune_alpha)
    activation.apply(stage, keeping, arena, place.stage > first_trained)
    return stage


def check_room(stage: Stage, place: engine.Place) -> None:
    """Raise UserError if the stage's weights alone do not fit on the GPU, before any is read."""
    if place.device.type != "cuda":
        return
    needed = sum(p.numel() * p.element_size() for p in stage.parameters()) - saved_bytes(stage)
    free, _ = torch.cuda.mem_get_info(place.device)
    if needed > free:
        raise UserError(
            f"stage {place.stage} has {gib(needed)} of weights, its GPU has {gib(free)} free: "
            "use more stages, or layers_per_stage"
        )
