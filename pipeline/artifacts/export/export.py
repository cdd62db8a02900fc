"""The export: an adapter in the additive form that other programs serve beside the unchanged base.

Takes a base model's folder and an adapter's; gives a PEFT folder or a GGUF file, whole or not at all. Of the base, the
adapter's target weights are read and nothing else. Memory: a block of rows, the adapter and one A' [R, D_in].
"""

from pathlib import Path

from pipeline.artifacts.adapter.adapter import Adapter
from pipeline.artifacts.adapter.read import load_pairs
from pipeline.artifacts.export.additive import AdditiveForm, additive_form
from pipeline.artifacts.export.gguf import architecture, gguf_names, write_gguf
from pipeline.artifacts.export.peft import write_peft
from pipeline.artifacts.fold.merge import check_places
from pipeline.artifacts.fold.rows import exact_fp32
from pipeline.console import UserError, gib, log, progress, warn
from pipeline.families import Kind
from pipeline.files import atomic_file, atomic_folder, check_disk_space, check_file_free, check_free
from pipeline.formats.base_model import Base, read_base, warn_of_remarks
from pipeline.formats.choices import BaseQuant, Dtype, ExportFormat
from pipeline.formats.device import usable_device
from pipeline.formats.dtypes import code_of
from pipeline.names import public_name


def export(
    base_folder: Path,
    adapter_folder: Path,
    output: Path,
    *,
    format: ExportFormat,
    dtype: str = "float32",
    device: str = "cpu",
    dry_run: bool = False,
    force: bool = False,
    kind: Kind | None = None,
    base_quant: BaseQuant | None = None,
    base_dtype: Dtype | None = None,
) -> None:
    """Write the adapter's additive form to `output`: with "peft" a folder, with "gguf" a file.

    `dtype`: float32, bfloat16 or float16, of A' and B'; A' = A·W is a product and not stored anywhere, so float32 is
    the only one that adds no rounding to what was trained. `base_quant`: for serving beside a base in 4 bits, A' of the
    weights as those are, from `base_dtype`, as in `merge`. `kind` says what a LORA adapter on square weights is. `dry_run`
    checks everything that can be checked without computing, prints the plan, and writes nothing. `force` replaces what
    stands at `output`, once the new one is whole. Raises UserError, with nothing written, where anything does not fit.
    """
    where = usable_device(device)
    check_places(base_folder, adapter_folder, output)
    check_output = check_free if format == "peft" else check_file_free
    check_output(output, replace=force)
    adapter, base = load_pairs(adapter_folder), read_base(base_folder)
    warn_of_remarks(base)
    form = additive_form(base, adapter, kind=kind, dtype=code_of(dtype), base_quant=base_quant, base_dtype=base_dtype)
    arch = architecture(base.config) if format == "gguf" else ""
    names = _gguf_names(form, arch) if format == "gguf" else {}
    for line in plan_lines(base, adapter, form):
        log(line)
    if base_quant and form.kind != "lora":
        log(f"base     W is rounded to {base_quant} and back first: serve the result beside the base in 4 bits")
    kept = f"a GGUF adapter of architecture {arch}" if format == "gguf" else "a PEFT adapter of type LORA"
    log(f"output   {output.resolve()}: {kept}, {dtype}, {gib(form.n_bytes)}")
    for line in form.warnings:
        warn(line)
    check_disk_space(output.resolve().parent, form.n_bytes)
    if dry_run:
        log("dry run: nothing was written. Whether the values fit into the dtype shows when they are computed.")
        return
    base_model = public_name(adapter.base_model or str(base_folder))
    with exact_fp32(), progress("exporting", form.n_bytes) as advance:
        if format == "peft":
            with atomic_folder(output, replace=force) as folder:
                write_peft(
                    folder,
                    form,
                    base_model=base_model,
                    base_folder=base_folder,
                    device=where,
                    advance=advance,
                    train_logit_scale=adapter.train_logit_scale,
                )
        else:
            with atomic_file(output, replace=force) as file:
                write_gguf(file, form, arch=arch, names=names, base_model=base_model, device=where, advance=advance)
    log(f"written: {output.resolve()}")


def _gguf_names(form: AdditiveForm, arch: str) -> dict[str, str]:
    """{module: its weight's name in a GGUF model}. Raises UserError where the format has no place for what is written."""
    if form.full:
        raise UserError(
            f"{len(form.full)} tensors were trained in full beside the adapter, {next(iter(form.full))} first, and a GGUF "
            "adapter has no place for them. Fold the adapter (merge_lora.py), or use --format peft."
        )
    biased = [target.module for target in form.targets if target.constant is not None]
    return gguf_names([target.module for target in form.targets], biased, arch)


def plan_lines(base: Base, adapter: Adapter, form: AdditiveForm) -> list[str]:
    """What will be written, with the formula and its numbers, and in what it differs from the adapter."""
    rule = "A' = A" if form.kind == "lora" else "A' = A·W in fp32"
    scaling = f"s = {form.alpha:g} / {form.rank} = {form.scaling:g}"
    read = sum(target.weight.n_bytes for target in form.targets) if form.kind != "lora" else 0
    lines = [
        f"base     {base.folder}: {len(form.targets)} of {len(base.tensors)} tensors are targets, {gib(read)} to read",
        f"adapter  {adapter.folder}: {form.kind}"
        + (f", trained on {adapter.base_model}" if adapter.base_model else ""),
        f"export   W' = W + s·B'·A', {rule}, B' = B, rank {form.rank}, {scaling}",
    ]
    padded = sum(target.rank < form.rank for target in form.targets)
    if padded:
        lines.append(f"ranks    {padded} pairs of a lower rank are filled up with zeros")
    scaled = sum(target.factor != 1 for target in form.targets)
    if scaled:
        lines.append(f"scalings {scaled} modules have another s: B' takes the quotient")
    biased = sum(target.constant is not None for target in form.targets)
    if biased:
        lines.append(
            f"biases   {biased} modules have a bias, which the adapter moves by s·B·A·b: written as the bias of lora_B "
            "(lora_bias). PEFT applies it; a program that does not know lora_bias refuses the file or leaves it out"
        )
    if form.full:
        lines.append(f"in full  {len(form.full)} tensors, {next(iter(form.full))} first: modules_to_save of PEFT")
    if adapter.stops:
        lines.append(
            f"stops    the training's turns end at {', '.join(map(str, adapter.stops))}, which no adapter can carry: give it to "
            "the server as a stop token, or add it to eos_token_id in the base's generation_config.json"
        )
    if adapter.train_logit_scale != 1.0:
        lines.append(
            f"logits   trained with the logits times {adapter.train_logit_scale:g}, which no adapter can carry"
        )
    return lines
