"""The micro-batches of one data-parallel replica, of what was read; and what a step and the run come to."""

import math

from pipeline.console import log, warn
from pipeline.data.batches import EvaluationBatches, MicroBatches
from pipeline.data.mixing import Mixture, mix, pairs
from pipeline.data.selection import Selection
from pipeline.data.streaming.batches import StreamedBatches
from pipeline.training.data.read import Data
from pipeline.training.optim.lr_schedule import warmup_steps
from pipeline.training.stage.spec import AdapterSpec
from pipeline.training.start.resolved import DataSpec, Updates

TrainBatches = MicroBatches | StreamedBatches


def micro_batches(spec: DataSpec, data: Data, replica: int = 0, replicas: int = 1) -> TrainBatches:
    """The training micro-batches of one data-parallel replica."""
    if (stream := data.stream) is not None:

        def window(number: int) -> MicroBatches | None:
            rows = stream.rows(number)
            everything = pairs(0, rows.rows)
            return _batches(spec, [rows], Mixture(lambda epoch: everything), replica, replicas) if len(rows) else None

        return StreamedBatches(window, stream.windows.at_hand(), stream.one_length)
    epoch_rows = mix(
        data.train,
        seed=spec.seed,
        mode=spec.combination,
        weights=[1.0] if spec.in_streams else [d.sample_weight for d in spec.datasets],
        stopping_strategy=spec.stopping,
        by=spec.mix_by or "rows",
        weigh_tokens=spec.mix_by is None and spec.batch_size_tokens is not None,
    )
    return _batches(spec, data.train, epoch_rows, replica, replicas)


def _batches(spec: DataSpec, train: list[Selection], epoch_rows: Mixture, replica: int, replicas: int) -> MicroBatches:
    return MicroBatches(
        [rows.store for rows in train],
        epoch_rows,
        seed=spec.seed,
        micro_batch_size=spec.micro_batch_size,
        batch_size_tokens=spec.batch_size_tokens,
        gradient_accumulation_steps=spec.accumulation,
        dp_rank=replica,
        dp_world=replicas,
        group_by_length=spec.group_by_length,
        switch=spec.rope_switch,
    )


def evaluation_batches(spec: DataSpec, data: Data, replica: int = 0, replicas: int = 1) -> dict[str, EvaluationBatches]:
    """The evaluation micro-batches of one data-parallel replica, by dataset."""
    return {
        name: EvaluationBatches(
            rows,
            micro_batch_size=spec.micro_batch_size,
            batch_size_tokens=spec.batch_size_tokens,
            dp_rank=replica,
            dp_world=replicas,
            switch=spec.rope_switch,
        )
        for name, rows in data.evaluation.items()
    }


def describe_steps(
    spec: DataSpec, updates: Updates, batches: TrainBatches, replicas: int, adapter: AdapterSpec | None = None
) -> None:
    """Say the size of a step and of the run as equations; warn of what is planned beyond the run's end."""
    info = batches.info(batches.at_hand)
    per_step = batches.micro_batches_per_step
    steps = batches.steps_per_epoch(batches.at_hand.epoch)
    log(
        f"a step:   {per_step} micro-batches ({spec.accumulation} accumulated × {replicas} replica(s)) "
        f"= {len(info.rows)} rows = {info.tokens:,} tokens"
    )
    limit = f", at most {spec.max_steps} steps" if spec.max_steps else ""
    length = f"{spec.epochs} epoch(s) of {steps} steps{limit}" if spec.epochs else f"{spec.max_steps} steps (max_steps)"
    total = min(spec.max_steps or math.inf, (spec.epochs or math.inf) * steps)
    if (warmup := warmup_steps(updates.warmup, steps)) >= total:
        warn(
            f"warmup_steps: {warmup} steps of warmup in a run of {total:.0f}: the learning rate never reaches "
            f"optimizer.lr = {updates.optimizer.lr:g}; give fewer"
        )
    planned = adapter.by_peft.settings.get("total_step") if adapter and adapter.by_peft else None
    if planned is not None and planned > total:
        warn(
            f"peft.total_step = {planned} in a run of {total:.0f} steps: the budget of ranks is not what target_r says when it "
            f"ends; set peft.total_step = {total:.0f}"
        )
    log(f"the run:  {length}; warmup {updates.warmup:g}, then {updates.lr_shape} at lr {updates.optimizer.lr:g}")
