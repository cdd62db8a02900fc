"""The fold: an adapter becomes part of a base model's weights.

Takes a base model's folder and an adapter's; gives a new model's folder, whole or not at all, and what survived
rounding. Tensors the adapter does not change are copied byte for byte; config, tokenizer, chat template and licence
come along. Memory: a few dozen MiB of blocks, the adapter and one projection [R, D_in], however large the model is.
"""

import math
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from pipeline.artifacts.adapter_files import Kind, natural_order, write_json
from pipeline.artifacts.adapter_reading import load_adapter
from pipeline.artifacts.base_files import INDEX, files_to_copy, read_base
from pipeline.artifacts.fold_check import check_result
from pipeline.artifacts.fold_plan import FoldPlan, OutputDtype, plan_fold
from pipeline.artifacts.fold_report import plan_lines, report_json, result_lines, warnings
from pipeline.artifacts.fold_rows import Survival, convert, exact_fp32, fold_rows
from pipeline.artifacts.safetensors_stream import TensorSpec, read_pieces, tensor_bytes, write_safetensors
from pipeline.artifacts.whole_folder import check_disk_space, check_free, whole_folder
from pipeline.console import UserError, gib, progress, say, warn

REPORT_FILE = "fold_report.json"


def merge(
    base_folder: Path,
    adapter_folder: Path,
    output: Path,
    *,
    scale: float = 1.0,
    dtype: OutputDtype = "keep",
    device: str = "cpu",
    dry_run: bool = False,
    force: bool = False,
    kind: Kind | None = None,
    keep_logit_scale: bool = False,
) -> list[Survival]:
    """Fold the adapter into the base and write the model to `output`; the figures of the changed tensors.

    `scale` multiplies the adapter's scaling (alpha lowered after the training). `dry_run` checks everything that can be
    checked without computing, prints the plan, and writes nothing. `force` replaces what stands at `output`, once
    the new model is whole. Raises UserError, with nothing written, where anything does not fit.
    """
    if not math.isfinite(scale) or scale == 0:
        raise UserError(f"--scale {scale:g}: give a finite factor other than 0; 1 is the strength of the training.")
    where = usable_device(device)
    check_places(base_folder, adapter_folder, output)
    check_free(output, replace=force)
    adapter = load_adapter(adapter_folder)
    base = read_base(base_folder)
    plan = plan_fold(base, adapter, kind=kind, scale=scale, dtype=dtype, keep_logit_scale=keep_logit_scale)
    copied = files_to_copy(base_folder)
    needed = plan.weight_bytes + sum((base_folder / file).stat().st_size for file in copied)
    for line in plan_lines(adapter, plan, scale=scale, keep_logit_scale=keep_logit_scale):
        say(line)
    say(f"output   {output.resolve()}: {gib(needed)} in all, {len(copied)} other files copied")
    if dry_run:
        check_disk_space(output.resolve().parent, needed)
        say("dry run: nothing was written. Whether the values fit into the dtype shows when they are computed.")
        return []
    with whole_folder(output, replace=force) as folder:
        check_disk_space(folder, needed)
        figures, deviation = _write(plan, copied, folder, where)
        write_json(folder / REPORT_FILE, report_json(adapter, plan, figures, scale=scale))
    dtypes = {spec.name: spec.dtype for specs in plan.files.values() for spec in specs}
    for line in result_lines(figures, deviation):
        say(line)
    for line in warnings(figures, dtypes):
        warn(line)
    say(f"written: {output.resolve()}")
    return figures


def usable_device(device: str) -> torch.device:
    """`device` as torch knows it. Raises UserError where there is no such device on this machine."""
    try:
        found = torch.device(device)
        torch.zeros(1, device=found).item()  # the meta device has no values
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: {str(error).splitlines()[0]}") from None
    return found


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
    digests = {}
    with exact_fp32(), progress("folding  ", plan.weight_bytes) as advance:
        for name, specs in plan.files.items():
            pieces = _pieces(plan, specs, device, figures, advance)
            digests[name] = write_safetensors(folder / name, specs, pieces, plan.base.headers[name].metadata)
    for file in copied:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(plan.base.folder / file, folder / file)
    if plan.config is not None:
        write_json(folder / "config.json", plan.config)
    if plan.base.index is not None:
        metadata = {**(plan.base.index.get("metadata") or {}), "total_size": plan.weight_bytes}
        write_json(folder / INDEX, {**plan.base.index, "metadata": metadata})
    with progress("verifying", plan.weight_bytes) as advance:
        deviation = check_result(plan, folder, digests, advance)
    missing = set(plan.changes) - set(figures)
    assert not missing, f"planned and not folded: {missing}"
    return [figures[name] for name in sorted(figures, key=natural_order)], deviation


def _pieces(
    plan: FoldPlan,
    specs: tuple[TensorSpec, ...],
    device: torch.device,
    figures: dict[str, Survival],
    advance: Callable[[int], None],
) -> Callable[[str], Iterable[memoryview | bytearray]]:
    """The bytes of a file's tensors as they will be written: folded, converted or as they are."""
    dtypes = {spec.name: spec.dtype for spec in specs}

    def blocks(name: str) -> Iterable[memoryview | bytearray]:
        stored, dtype = plan.base.tensors[name], dtypes[name]
        if name in plan.changes:
            figures[name] = Survival(name)
            rows = fold_rows(plan.changes[name], plan.kind, dtype, device, figures[name])
            return (tensor_bytes(block) for block in rows)
        if dtype != stored.dtype:
            return (tensor_bytes(block) for block in convert(stored, dtype))
        return read_pieces(stored)

    def counted(name: str) -> Iterable[memoryview | bytearray]:
        for piece in blocks(name):
            yield piece
            advance(len(piece))

    return counted
