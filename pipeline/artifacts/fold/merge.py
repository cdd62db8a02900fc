"""The fold: adapters become part of a base model's weights, or are taken out of them again.

Takes a base model's folder and one or more adapters'; gives a new model's folder, whole or not at all, and what survived
rounding. Tensors the adapter does not change are copied byte for byte; config, tokenizer, chat template and licence
come along. Memory: a few dozen MiB of blocks, the adapters, and one projection [ΣR, D_in] or one module's rotations
[D_in, K], however large the model is.
"""

import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch

from pipeline.artifacts.adapter.read import load_adapter
from pipeline.artifacts.fold.check import RowCheck, check_written
from pipeline.artifacts.fold.plan import FoldPlan, plan_fold
from pipeline.artifacts.fold.report import plan_lines, report_json, result_lines, verdict, warnings
from pipeline.artifacts.fold.rows import Survival, convert, exact_fp32, fold_rows, held
from pipeline.artifacts.fold.warnings import warnings_of
from pipeline.artifacts.fold_history import REPORT_FILE
from pipeline.console import UserError, gib, log, progress, warn
from pipeline.families import Kind
from pipeline.files import atomic_folder, check_disk_space, check_free, write_json
from pipeline.formats.base_model import WITH_STOPS, files_to_copy, read_base, warn_of_remarks, with_stops
from pipeline.formats.choices import BaseQuant, Dtype, OutputDtype
from pipeline.formats.device import usable_device
from pipeline.formats.safetensors import TensorSpec, read_pieces, tensor_bytes, write_safetensors
from pipeline.names import INDEX, natural_order


def merge(
    base_folder: Path,
    adapter_folders: Path | Sequence[Path],
    output: Path,
    *,
    scale: float | Sequence[float] = 1.0,
    dtype: OutputDtype = "keep",
    device: str = "cpu",
    dry_run: bool = False,
    force: bool = False,
    kind: Kind | None = None,
    keep_logit_scale: bool = False,
    layers: str | None = None,
    unmerge: bool = False,
    base_quant: BaseQuant | None = None,
    base_dtype: Dtype | None = None,
) -> list[Survival]:
    """Fold one adapter or several, in order, and write the model to `output`; the figures of the changed tensors.

    Each changes the weight as the one before left it: of multiplicative adapters 1, 2, 3
    W' = (I + s₃·B₃·A₃)·(I + s₂·B₂·A₂)·(I + s₁·B₁·A₁)·W;  an additive one adds s·B·A, others rotate, multiply or replace
    (`fold_plan`). `scale` multiplies an adapter's scaling (alpha lowered after the training): one
    factor for all or one for each. `layers` ('0:38', both ends included) restricts what is folded. `unmerge` takes the
    adapters out of a model they were folded into, last one first. `base_quant` folds into the base as 4-bit training
    saw it, which held it in `base_dtype`. `dry_run` checks everything that can be checked without computing, prints the
    plan, and writes nothing. `force` replaces what stands at `output`, once the new model is whole. Raises UserError, with
    nothing written, where anything does not fit.
    """
    folders = [adapter_folders] if isinstance(adapter_folders, Path) else list(adapter_folders)
    scales = _one_each(scale, len(folders))
    where = usable_device(device)
    for folder in folders:
        check_places(base_folder, folder, output)
    check_free(output, replace=force)
    adapters = [load_adapter(folder) for folder in folders]
    base = read_base(base_folder)
    warn_of_remarks(base)
    plan = plan_fold(
        base,
        adapters,
        scales=scales,
        kind=kind,
        dtype=dtype,
        keep_logit_scale=keep_logit_scale,
        layers=layers,
        unmerge=unmerge,
        base_quant=base_quant,
        base_dtype=base_dtype,
    )
    copied = files_to_copy(base_folder)
    needed = plan.weight_bytes + sum((base_folder / file).stat().st_size for file in copied)
    _say_plan(plan, f"{output.resolve()}: {gib(needed)} in all, {len(copied)} other files copied", keep_logit_scale)
    if dry_run:
        check_disk_space(output.resolve().parent, needed)
        log("dry run: nothing was written. Whether the values fit into the dtype shows when they are computed.")
        return []
    with atomic_folder(output, replace=force) as unfinished:
        check_disk_space(unfinished, needed)
        figures, deviation = _write(plan, copied, unfinished, where)
        write_json(unfinished / REPORT_FILE, report_json(plan, figures))
    _say_result(plan, figures, deviation)
    log(f"written: {output.resolve()}")
    return figures


def _say_plan(plan: FoldPlan, output: str, keep_logit_scale: bool) -> None:
    """What is going to be folded, written to `output`, and what is suspicious about it."""
    for line in plan_lines(plan, keep_logit_scale=keep_logit_scale):
        log(line)
    log(f"output   {output}")
    for line in warnings_of(plan):
        warn(line)


def _say_result(plan: FoldPlan, figures: list[Survival], deviation: float) -> None:
    """How much of the change survived rounding."""
    dtypes = {spec.name: spec.dtype for specs in plan.files.values() for spec in specs}
    for line in result_lines(plan, figures, deviation):
        log(line)
    for line in warnings(figures, dtypes):
        warn(line)
    log(verdict(figures))


def _one_each(scale: float | Sequence[float], adapters: int) -> list[float]:
    """One factor an adapter. Raises UserError where there are more or fewer, or one is 0 or not finite."""
    given = [float(scale)] if isinstance(scale, int | float) else [float(one) for one in scale]
    scales = given * adapters if len(given) == 1 else given
    if not adapters or len(scales) != adapters:
        raise UserError(f"--scale has {len(given)} values for {adapters} adapters: give one for all, or one for each.")
    for one in scales:
        if not math.isfinite(one) or one == 0:
            raise UserError(f"--scale {one:g}: give a finite factor other than 0; 1 is the strength of the training.")
    return scales


def check_places(base: Path, adapter: Path, output: Path) -> None:
    """Raise UserError where writing `output` would touch what is read."""
    target = output.resolve()
    for flag, folder in (("--input", base.resolve()), ("--lora", adapter.resolve())):
        if target == folder or target.is_relative_to(folder):
            raise UserError(f"--output {output} is {flag} itself or lies inside it; name a folder elsewhere.")
        if folder.is_relative_to(target):
            raise UserError(f"--output {output} contains {flag} {folder}; name a folder elsewhere.")


def _write(plan: FoldPlan, copied: list[Path], folder: Path, device: torch.device) -> tuple[list[Survival], float]:
    """Write every file of the model into `folder` and check it; the figures, and the largest deviation found."""
    figures: dict[str, Survival] = {}
    deviations: list[float] = []
    digests = {}
    with exact_fp32(), progress("folding  ", plan.weight_bytes) as advance:
        for name, specs in plan.files.items():
            pieces = _pieces(plan, specs, device, figures, deviations, advance)
            digests[name] = write_safetensors(folder / name, specs, pieces, plan.base.headers[name].metadata)
    for file in copied:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(plan.base.folder / file, folder / file)
    if plan.config is not None:
        write_json(folder / "config.json", plan.config, allow_nan=True)
    if plan.stops:
        write_json(folder / WITH_STOPS[0], with_stops(plan.base.folder, plan.stops))
    if plan.base.index is not None:
        metadata = {**(plan.base.index.get("metadata") or {}), "total_size": plan.weight_bytes}
        write_json(folder / INDEX, {**plan.base.index, "metadata": metadata})
    with progress("verifying", plan.weight_bytes) as advance:
        check_written(plan, folder, digests, advance)
    missing = set(plan.changes) - set(figures)
    assert not missing, f"planned and not folded: {missing}"
    return [figures[name] for name in sorted(figures, key=natural_order)], max(deviations, default=0.0)


def _pieces(
    plan: FoldPlan,
    specs: tuple[TensorSpec, ...],
    device: torch.device,
    figures: dict[str, Survival],
    deviations: list[float],
    advance: Callable[[int], None],
) -> Callable[[str], Iterable[memoryview | bytearray]]:
    """The bytes of a file's tensors as they will be written: folded, converted or as they are.

    Fills `figures` and `deviations` of the folded ones; raises UserError (exit code 3) where fp64 sees something else.
    """

    def folded(name: str) -> Iterator[memoryview]:
        figures[name] = Survival(name)
        for matrix in plan.changes[name].matrices():
            change = held(matrix)
            check = RowCheck(change, dtypes[name])
            for before, after in fold_rows(change, dtypes[name], device, figures[name]):
                check.add(before, after)
                yield tensor_bytes(after)
            deviations.append(check.deviation())

    dtypes = {spec.name: spec.dtype for spec in specs}

    def blocks(name: str) -> Iterable[memoryview | bytearray]:
        stored, dtype = plan.base.tensors[name], dtypes[name]
        if name in plan.changes:
            return folded(name)
        if dtype != stored.dtype or name in plan.quantised:
            quant = plan.base_quant if name in plan.quantised else None
            return (tensor_bytes(block) for block in convert(stored, dtype, quant, plan.base_dtype))
        return read_pieces(stored)

    def counted(name: str) -> Iterable[memoryview | bytearray]:
        for piece in blocks(name):
            yield piece
            advance(len(piece))

    return counted
