"""Where a run begins: at its first step, with the adapter it goes on from, or where a checkpoint left it."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.console import UserError, log, log_if_slow
from pipeline.model.stage import Stage, tied_head
from pipeline.training.checkpoint.state import Progress, needed, restore
from pipeline.training.data.batches import TrainBatches
from pipeline.training.engine import engine, reference
from pipeline.training.nodes.carrying import Carrier, brought
from pipeline.training.optim.pipeline_optimizer import PipelineOptimizer
from pipeline.training.run import folder as run_folder
from pipeline.training.run import record
from pipeline.training.stage import initial_adapter
from pipeline.training.start import to_train
from pipeline.training.start.objective import ObjectiveSpec
from pipeline.training.start.resolved import Resolved


def begin(
    plan: Resolved, init_adapter: str | None, stage: Stage, place: engine.Place, batches: TrainBatches
) -> Progress:
    """A new run: the adapter it goes on from into the stage, if there is one."""
    if init_adapter:
        with engine.agreement(place):
            initial_adapter.put(stage, to_train.initial_adapter_of(plan.trained, init_adapter))
    return Progress(order=batches.order_hash(0))


@log_if_slow("starting: reading the checkpoint")
def put_back(
    folder: Path,
    manifest: dict[str, Any],
    about: dict[str, Any],
    stage: Stage,
    optimizer: PipelineOptimizer,
    place: engine.Place,
    batches: TrainBatches,
    objective: ObjectiveSpec | None,
    carrier: Carrier | None,
) -> Progress:
    """The checkpoint's state into optimizer, weights and generators; says what differs from its configuration.

    `about`: what this run's checkpoints say about it (`facts`). Gives how far the run was, in this run's order of the data.
    """
    recorded = about["config"]
    if lines := run_folder.differences(manifest["config"], recorded):
        log("changed since the checkpoint:\n" + "\n".join(lines))
    aliases = tied_head(stage.model)
    same_layout = manifest["layout"] == about["layout"]
    with engine.agreement(place):
        run_folder.check_continues(manifest, recorded, set(about["trained"]), aliases)
        if objective is not None and place.rank == 0:  # who reads it
            reference.check_kept(folder.parent, manifest, objective.reference)
        order = batches.order_hash(manifest["epoch"])
        if manifest["rows"] and order != manifest["order"]:
            raise UserError(
                "the training data or its order is not the checkpoint's, so its position in the data means nothing; "
                "restore the datasets, their settings and the seed, or start a new run"
            )
    needs = partial(needed, names=optimizer.parameters_by_name, aliases=aliases, number=place.number)
    with engine.agreement(place), brought(carrier, folder, manifest, needs) as (there, of_it):
        progress = restore(
            there,
            of_it,
            optimizer,
            place.device,
            place.number,
            aliases=aliases,
            optimizer_states=recorded["load_optimizer_states"],
            same_layout=same_layout,
        )
    if not same_layout:
        torch.manual_seed(recorded["seed"] + place.number + 1000003 * progress.step)
    log(f"resumed:  after step {progress.step}, from {folder}")
    return progress._replace(order=order)


def names_on_all_stages(optimizer: PipelineOptimizer, place: engine.Place) -> list[str]:
    """The trained parameters of the whole model."""
    names: list[list[str]] = [[] for _ in range(place.world)]
    dist.all_gather_object(names, list(optimizer.parameters_by_name))
    return sorted({name for each in names for name in each})


def facts(recorded: dict[str, Any], place: engine.Place, trained: list[str]) -> dict[str, Any]:
    """What every checkpoint of the run says about itself."""
    return {
        "trained": trained,
        "config": recorded,
        "layout": [place.stages, place.replicas],
        "versions": record.versions(),
    }
