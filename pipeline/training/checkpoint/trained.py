"""Saves of what is trained: an adapter, or a whole model, as a folder that appears whole or not at all.

Takes a stage and its trained parameters; every process calls, one replica of each stage contributes, the first process
puts the folder in place.
"""

import contextlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from pipeline.artifacts import saved_at
from pipeline.console import UserError, gib
from pipeline.files import SEEN_S, appears, atomic_folder, size_of, write_json
from pipeline.foreign import read_object
from pipeline.formats.base_model import WITH_STOPS, config_ties, files_to_copy, untie, with_stops
from pipeline.formats.dtypes import dtype_name
from pipeline.formats.safetensors import read_header, write_tensors
from pipeline.model.stage import Stage, tied_head
from pipeline.processes import host
from pipeline.training.checkpoint.commit import explained
from pipeline.training.checkpoint.manifest import CheckpointError
from pipeline.training.engine.engine import Place
from pipeline.training.nodes.carrying import Carrier

Write = Callable[[Path], None]
PART = ".stage-{}.safetensors"  # what a stage contributes, while an adapter is put together
SHARD = "model-{:05d}-of-{:05d}.safetensors"


def save_adapter(
    folder: Path,
    step: int,
    place: Place,
    tensors: dict[str, Tensor],
    dtype: torch.dtype | None,
    write: Callable[[Path, dict[str, Tensor]], None],
    carrier: Carrier | None = None,
) -> None:
    """Have `write` put the stages' trained tensors into the folder as one adapter, marked as of `step`.

    They meet in files: an embedding that is trained beside the adapter has gigabytes, and a collective would need them
    on the first GPU, once for every process. `carrier`: brings the files of nodes with disks of their own together.
    """

    contributes = [(0, False)] * place.world
    dist.all_gather_object(contributes, (place.stage, place.replica == 0 and bool(tensors)))
    stages = sorted(stage for stage, has in contributes if has)

    def write_part(temporary: Path) -> None:
        if place.replica == 0 and tensors:
            own = {n: t.detach().to("cpu", dtype if t.is_floating_point() else None) for n, t in tensors.items()}
            write_tensors(temporary / PART.format(place.stage), own)

    def finish(temporary: Path) -> None:
        files = [temporary / PART.format(stage) for stage in stages]
        _await_all(files)
        with contextlib.ExitStack() as opened:
            parts = [opened.enter_context(safe_open(file, framework="pt")) for file in files]
            write(temporary, {name: part.get_tensor(name) for part in parts for name in part.keys()})  # noqa: SIM118
        for file in files:
            file.unlink()

    _together(folder, step, place, write_part, finish, carrier)


def save_model(
    folder: Path,
    step: int,
    place: Place,
    stage: Stage,
    base: Path,
    dtype: torch.dtype | None,
    stops: Sequence[int] = (),
    carrier: Carrier | None = None,
) -> None:
    """Each stage writes its weights, as of `step`, as one shard; configuration and tokenizer are copied from `base`.

    `stops`: ids at which the model has learned to stop, beside those at which it did.
    """
    shard_name = SHARD.format(place.stage + 1, place.stages)

    def write_shard(temporary: Path) -> None:
        if place.replica == 0:
            tensors = {
                name: (t.detach().to("cpu", dtype) if t.is_floating_point() else t.detach().cpu()).contiguous()
                for name, t in stage.model.state_dict().items()
                if name not in tied_head(stage.model)
            }
            write_tensors(temporary / shard_name, tensors, {"format": "pt"})

    def finish(temporary: Path) -> None:
        _await_all(shard_files := [temporary / SHARD.format(stage + 1, place.stages) for stage in range(place.stages)])
        shards = [read_header(path) for path in shard_files]
        index = {
            "metadata": {"total_size": sum(t.n_bytes for shard in shards for t in shard.tensors)},
            "weight_map": {t.name: t.file.name for shard in shards for t in shard.tensors},
        }
        write_json(temporary / "model.safetensors.index.json", index)
        for file in files_to_copy(base):
            (temporary / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(base / file, temporary / file)
        config = read_object(base / "config.json", "the base's configuration")
        config.pop("torch_dtype", None)
        if config_ties(config) is not False and not tied_head(stage.model):
            untie(config)  # two tensors are stored, and programs that go by the config alone would drop one
        config["dtype"] = dtype_name(dtype or stage.model.dtype)
        write_json(temporary / "config.json", config, allow_nan=True)
        if stops:
            write_json(temporary / WITH_STOPS[0], with_stops(base, stops))

    _together(folder, step, place, write_shard, finish, carrier)


def _together(folder: Path, step: int, place: Place, each: Write, first: Write, carrier: Carrier | None = None) -> None:
    """`each` on every process, then `first` on the first, into one folder that appears whole. Fails on all or on none.

    On a node with a disk of its own `each` writes into a folder there, whose files the `carrier` then moves.
    """
    output = contextlib.ExitStack()
    told: list[Any] = [None]

    def open_folder() -> None:
        if place.rank == 0:
            told[0] = str(output.enter_context(atomic_folder(folder, replace=True)))

    def here() -> Path:
        return folder.parent / Path(told[0]).name if carrier and carrier.is_apart else Path(told[0])

    def put_part() -> None:
        if carrier and carrier.is_apart:
            here().mkdir(parents=True, exist_ok=True)
        each(_seen(here()))

    def finish() -> None:
        if place.rank == 0:
            first(Path(told[0]))
            saved_at.mark(Path(told[0]), step)

    with output:
        _all_well(place, open_folder, folder, told)
        dist.broadcast_object_list(told)
        _all_well(place, put_part, folder, told)
        if carrier:
            _all_well(place, lambda: carrier.gather(here()), folder, told)
        _all_well(place, finish, folder, told)
        _all_well(place, output.close, folder, told)  # puts the folder in place


def _seen(path: Path) -> Path:
    """`path`, which another process has made; CheckpointError if this node does not see it."""
    if not appears(path):
        raise CheckpointError(f"{path} is not seen from {host()} after {SEEN_S:.0f} s; do all nodes share that disk?")
    return path


def _await_all(files: Sequence[Path]) -> None:
    for file in files:
        _seen(file)


def _all_well(place: Place, write: Callable[[], None], folder: Path, temporary: list[str]) -> None:
    """Run `write`; raise CheckpointError on every process if it failed on any."""
    problem = None
    try:
        write()
    except UserError as error:
        problem = str(error), error.exit_code
    except Exception as error:  # whatever it is, the others must hear of it
        needed = f"more than {gib(size_of(Path(temporary[0])))}" if temporary[0] else ""
        failure = explained(error, str(folder), folder.parent, needed)
        problem = str(failure), failure.exit_code
    problems: list[Any] = [None] * place.world
    dist.all_gather_object(problems, problem)
    if found := [p for p in problems if p]:
        raise CheckpointError(*found[0])
