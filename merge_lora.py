# PYTHON_ARGCOMPLETE_OK
"""Fold adapters into their base model:  python merge_lora.py --input BASE --lora ADAPTER [MORE ...] --output OUT

Takes the folder of a base model (safetensors, 16 or 32 bit) and of adapters (ours; PEFT's LoRA, DoRA, IA³, OFT, BOFT, HRA,
with modules that were trained in full; the founding method's hacked PEFT); gives a model's folder that any program
reads like the base. Exit codes: 0 done, 2 the request cannot be carried out, 3 the result did not verify, 28 disk
full. In every case but the first nothing is left behind.

Several adapters are folded in the order given, each into the weight as the one before left it, rounded once at the end:
W' = (I + s₃·B₃·A₃)·(I + s₂·B₂·A₂)·(I + s₁·B₁·A₁)·W for multiplicative ones; at its turn an additive one adds s·B·A, DoRA
scales the rows of what stands then, IA³ multiplies rows or columns, OFT, BOFT and HRA turn or reflect the inputs, and a
tensor that was trained in full takes the place of what stands then.
"""

import argparse
from pathlib import Path

from pipeline.commands import arguments
from pipeline.console import EXIT_DONE, leave_on_sigterm, log, run_command
from pipeline.formats.choices import OUTPUT_DTYPES
from pipeline.publishing.next_steps import after_fold, lines


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(
        description="Fold adapters into their base model. The result appears whole or not at all.",
        epilog="example: python merge_lora.py --input models/base --lora runs/x/step100 --output models/merged",
    )
    arguments.add_base(command)
    command.add_argument(
        "--lora",
        type=Path,
        required=True,
        nargs="+",
        metavar="ADAPTER",
        help="folder of the adapter, or of several, folded in this order: of multiplicative ones W' = (I + s3·B3·A3)·"
        "(I + s2·B2·A2)·(I + s1·B1·A1)·W; others act on the weight as it stands then: an additive one adds s·B·A, DoRA "
        "scales rows, IA3 rows or columns, OFT, BOFT and HRA turn the inputs, a tensor trained in full takes its place",
    )
    command.add_argument("--output", type=Path, required=True, metavar="OUT", help="folder to write the model to")
    command.add_argument(
        "--scale",
        type=float,
        default=[1.0],
        nargs="+",
        metavar="S",
        help="multiply the strength s of the adapters: one factor for all, or one for each (default 1, the only one for IA3, "
        "OFT, BOFT, HRA and what was trained in full, which have no s)",
    )
    command.add_argument(
        "--layers",
        metavar="RANGES",
        help="fold the adapters' modules of these layers only: '0:38' (both ends included), '5', '0:10,20' (default all; "
        "embedding, last norm and head are in no layer)",
    )
    command.add_argument(
        "--unmerge",
        action="store_true",
        help="take the adapters out of a model they were folded into, in the order of --lora: the exact inverses, last "
        "one first. Refused where an adapter erases a direction, or nearly so, and for DoRA and tensors trained in full",
    )
    arguments.add_base_quant(
        command,
        why="fold into the base as a QLoRA run saw it: the linear weights and experts of its layers rounded to 4 bits and back "
        "(nf4-double: with bnb_4bit_use_double_quant), all of them: for a run without llm_int8_skip_modules. Default: into "
        "the original weights",
        dtype="with --base-quant, the run's model_weight_dtype, to which it rounded the weights before it rounded them to 4 "
        "bits (default: as they are stored in the base)",
    )
    command.add_argument(
        "--dtype",
        choices=OUTPUT_DTYPES,
        default="keep",
        help="dtype of every floating-point tensor of the result (default: as in the base)",
    )
    arguments.add_device(command, "where to multiply")
    arguments.add_dry_run(command)
    arguments.add_force(command, "replace a non-empty output once the new model is whole")
    arguments.add_kind(command)
    command.add_argument(
        "--keep-logit-scale",
        action="store_true",
        help="write the training's train_logit_scale into the model's config (default: drop it)",
    )
    arguments.add_version(command)
    return command


def main() -> int:
    """Parse the command line and fold."""
    asked = arguments.parse(parser())
    leave_on_sigterm()
    from pipeline.artifacts.fold.merge import merge  # torch: only now that the command line is right
    from pipeline.formats.hub import model_folder

    merge(
        Path(model_folder(asked.input, "--input")),
        asked.lora,
        asked.output,
        scale=asked.scale,
        dtype=asked.dtype,
        device=asked.device,
        dry_run=asked.dry_run,
        force=asked.force,
        kind=asked.kind,
        keep_logit_scale=asked.keep_logit_scale,
        layers=asked.layers,
        unmerge=asked.unmerge,
        base_quant=asked.base_quant,
        base_dtype=asked.base_dtype,
    )
    if not asked.dry_run:
        log(lines(after_fold(asked.output)))
    return EXIT_DONE


if __name__ == "__main__":
    run_command(main)
