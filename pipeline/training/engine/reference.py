"""What the reference says of preference data: each row's log-probability, by one pass through the stages before the first step;
and what makes a stage the reference where that runs in every step.

Takes the data, the engine and the stage as the run starts; gives the data with these numbers beside its units. They are kept:
those of the base, or of an adapter's folder, beside the data cache, where another run finds them; those of the run's own
start in its folder, as they cannot be made again once the adapter has been trained.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.engine import PipelineEngine
from numpy.typing import NDArray

from pipeline.artifacts.adapter.adapter import WEIGHTS_FILE
from pipeline.console import UserError, log
from pipeline.data.arrow_files import ArrowFile, opened
from pipeline.data.batches import EvaluationBatches
from pipeline.data.row_store import RowStore
from pipeline.data.selection import Selection
from pipeline.data.units.generated import GeneratedPairs
from pipeline.data.units.store import UnitRows
from pipeline.files import rename
from pipeline.formats.base_model import read_base
from pipeline.formats.fingerprint import of_all
from pipeline.model.adapters.base import trainable
from pipeline.model.adapters.switch import adapters_off, holding
from pipeline.model.stage import Stage
from pipeline.model.structure.build import logit_transform
from pipeline.objectives.rows import RowScores
from pipeline.training.data.read import Data
from pipeline.training.engine import evaluate
from pipeline.training.engine.engine import Place, agreement
from pipeline.training.stage import initial_adapter
from pipeline.training.start.objective import ObjectiveSpec
from pipeline.training.start.resolved import Resolved
from pipeline.training.start.to_train import initial_adapter_of

FORMAT = 1
START = "start"
Numbers = NDArray[np.float32]
Units = TypeVar("Units", bound=UnitRows)
_SCHEMA = pa.schema([("log_probs", pa.list_(pa.float32()))])


@dataclass(frozen=True)
class Pass:
    """What a pass needs: the run's plan, its engine, and this process's stage and place."""

    plan: Resolved
    spec: ObjectiveSpec
    engine: PipelineEngine
    stage: Stage
    place: Place


def attached(data: Data, run: Pass, run_dir: Path, came_from: Path | None) -> tuple[Data, dict[str, str]]:
    """The data with the reference's numbers, and for a checkpoint the SHA-256 of those that belong to the run, by file.

    `run_dir`: this run's folder; `came_from`: that of the checkpoint it goes on from. All processes must come here. UserError
    where rows are to be compared with a start that is gone.
    """
    stores: dict[int, UnitRows] = {}
    rows: dict[int, list[NDArray[np.int64]]] = {}
    for chosen in (*data.train, *data.evaluation.values()):
        if isinstance(chosen.store, GeneratedPairs):  # scored when its answers are known (on_policy.py)
            continue
        assert isinstance(chosen.store, UnitRows)
        stores[id(chosen.store)] = chosen.store
        rows.setdefault(id(chosen.store), []).append(chosen.rows)
    at_start = run.spec.reference == START
    with agreement(run.place):
        about = _about(run)
    known: dict[int, RowStore] = {}
    kept: dict[str, str] = {}
    for key, store in stores.items():
        name = f"reference-{_digest([*about, store.content_hash])}.arrow"
        path = (run_dir if at_start else run.plan.data.cache) / name
        source = came_from / name if at_start and came_from else path
        numbers = _numbers(
            run, store, np.unique(np.concatenate(rows[key])), source, path, at_start and came_from is not None
        )
        known[key] = store.with_reference(numbers)
        kept |= {name: _digest_of(numbers)} if at_start else {}

    def with_numbers(chosen: Selection) -> Selection:
        return replace(chosen, store=known.get(id(chosen.store), chosen.store))

    train = [with_numbers(chosen) for chosen in data.train]
    return replace(data, train=train, evaluation={n: with_numbers(c) for n, c in data.evaluation.items()}), kept


def scored(run: Pass, store: Units, rows: NDArray[np.int64]) -> Units:
    """`store` with the reference's numbers of the units `rows`, computed now, with nothing said. All processes must come here."""
    return store.with_reference(_computed(run, store, rows, doing=None))


def check_kept(folder: Path, manifest: dict[str, Any], reference: str | None) -> None:
    """UserError where a run that is compared with its own start goes on from a checkpoint without the start's numbers."""
    if reference != START:
        return
    for name, digest in manifest.get("reference", {"reference-….arrow": ""}).items():
        if not (folder / name).is_file() or _digest_of(_read(folder / name)) != digest:
            raise UserError(
                f"objective.reference.model = 'start': {folder / name}, what the adapter said before it was trained, is not "
                "there or not the run's; it cannot be made again. Put it back, or start a new run"
            )


def in_every_step(run: Pass) -> Callable[[], AbstractContextManager[None]]:
    """Blocks in which the stage is the reference, for as long as the run lasts: the base, or a folder's adapter, which is read
    and kept beside the one that is trained. All processes must come here. UserError where the folder does not fit."""
    if run.spec.reference == "base":
        return partial(adapters_off, run.stage)
    with _as_reference(run):
        values = {name: parameter.detach().clone() for name, parameter in trainable(run.stage).items()}
    return partial(holding, run.stage, values)


def _numbers(run: Pass, store: UnitRows, rows: NDArray[np.int64], source: Path, path: Path, too_late: bool) -> Numbers:
    """fp32 [U, S], NaN for units other than `rows`: read from `source`, or, unless it is `too_late`, computed; then at `path`."""
    told: list[Any] = [None]
    if run.place.rank == 0:
        found = _read(source) if source.is_file() else None
        told = [found if found is not None and not np.isnan(found[rows]).any() else None]
    dist.broadcast_object_list(told)
    numbers: Numbers | None = told[0]
    with agreement(run.place):
        if numbers is None and too_late:
            raise UserError(
                f"objective.reference.model = 'start': what the adapter said of '{store.name}' before it was trained is not in "
                f"{source.parent}, or not of all its rows, and cannot be made again. Give the datasets of the run that goes on, "
                "or start a new run"
            )
    if numbers is None:
        numbers = _computed(run, store, rows, f"the reference on {store.name}")
        log(f"reference: {len(rows):,} units of '{store.name}' scored by {run.spec.reference}")
    else:
        log(f"reference: what {run.spec.reference} says of '{store.name}' is in {source}")
    if run.place.rank == 0 and not (path.is_file() and path == source and told[0] is not None):
        _write(path, numbers)
    dist.barrier()
    return numbers


def _computed(run: Pass, store: UnitRows, rows: NDArray[np.int64], doing: str | None) -> Numbers:
    """By one pass through the stages, every replica its part."""
    spec, place = run.plan.data, run.place
    batches = EvaluationBatches(
        Selection(store, rows),
        micro_batch_size=spec.micro_batch_size,
        batch_size_tokens=spec.batch_size_tokens,
        dp_rank=place.replica,
        dp_world=place.replicas,
    )
    head = run.stage.head if run.stage.is_last else None
    objective = RowScores(head, logit_transform(run.stage.model.config), run.spec.slots)
    sums_US = torch.zeros(len(store), run.spec.slots, device=place.device)
    with _as_reference(run):
        outputs = evaluate.scores(run.engine, objective, batches, doing)
    rows_of = (batch.rows for batch in batches) if outputs else ()
    for sums_SU, units in zip(outputs, rows_of, strict=True):
        for place_in_batch, unit in enumerate(units):
            if unit is not None:
                sums_US[unit[1]] = sums_SU[:, place_in_batch]
    dist.all_reduce(sums_US)  # each number comes from one process, the others add 0
    numbers: Numbers = sums_US.cpu().numpy()
    others = np.ones(len(store), bool)
    others[rows] = False
    numbers[others] = np.nan
    return numbers


@contextmanager
def _as_reference(run: Pass) -> Iterator[None]:
    """Inside, the stage is the reference."""
    if run.spec.reference == START:
        yield
        return
    if run.spec.reference == "base":
        with adapters_off(run.stage):
            yield
        return
    before = {parameter: parameter.detach().clone() for parameter in trainable(run.stage).values()}
    with agreement(run.place):
        initial_adapter.put(run.stage, _adapter(run))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in before.items():
                parameter.copy_(value)


def _adapter(run: Pass) -> dict[str, torch.Tensor]:
    """The tensors of the folder that is the reference."""
    try:
        return initial_adapter_of(run.plan.trained, str(run.spec.reference))
    except UserError as error:
        raise UserError(str(error).replace("init_adapter", "objective.reference.model")) from None


def _about(run: Pass) -> list[Any]:
    """All that decides a row's number but the row. Of a start nothing: a run has one, however it computes when it goes on."""
    base, reference = run.plan.base, str(run.spec.reference)
    if reference == START:
        return [FORMAT, START]
    if reference != "base":
        file = Path(reference).expanduser() / WEIGHTS_FILE
        if not file.is_file():
            raise UserError(f"objective.reference.model = '{reference}': there is no {WEIGHTS_FILE} in it")
        reference = hashlib.sha256(file.read_bytes()).hexdigest()
    settings = [str(base.dtype), base.attn_implementation, str(base.scheme), str(run.plan.layout.kernels)]
    return [FORMAT, of_all(read_base(Path(base.folder), "model")), reference, *settings]


def _digest(content: list[Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:20]


def _digest_of(numbers: Numbers) -> str:
    return hashlib.sha256(numbers.tobytes()).hexdigest()


def _read(path: Path) -> Numbers:
    table = opened(path).read_all()
    return np.array(table["log_probs"].to_pylist(), dtype=np.float32)


def _write(path: Path, numbers: Numbers) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.part")
    file = ArrowFile(staging, _SCHEMA)
    file.write([pa.array(numbers.tolist(), pa.list_(pa.float32()))])
    file.close()
    rename(staging, path)
