# PYTHON_ARGCOMPLETE_OK
"""Export an adapter for serving:  python export_lora.py --input BASE --lora ADAPTER --output OUT --format peft|gguf

Takes the folder of a base model (safetensors, 16 or 32 bit) and of an adapter (ours, PEFT's LoRA, or the founding
method's hacked PEFT); gives the same function in the additive form, as a PEFT folder (PEFT, vLLM) or a GGUF file
(llama.cpp). Exit codes: 0 done, 2 the request cannot be carried out, 28 disk full. In every case but the first nothing
is left behind.
"""

import argparse
from pathlib import Path

from pipeline.commands import arguments
from pipeline.console import EXIT_DONE, leave_on_sigterm, log, run_command
from pipeline.formats.choices import DTYPE_NAMES, EXPORT_FORMATS
from pipeline.publishing.next_steps import after_export, lines


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(
        description="Write an adapter in the additive form that PEFT, vLLM and llama.cpp serve beside the base model. "
        "The result appears whole or not at all.",
        epilog="example: python export_lora.py --input models/base --lora runs/x/step100 --output x.gguf --format gguf",
    )
    arguments.add_base(command)
    command.add_argument("--lora", type=Path, required=True, metavar="ADAPTER", help="folder of the adapter")
    command.add_argument(
        "--output", type=Path, required=True, metavar="OUT", help="folder (peft) or file (gguf) to write to"
    )
    command.add_argument("--format", choices=EXPORT_FORMATS, required=True, help="peft: PEFT and vLLM; gguf: llama.cpp")
    command.add_argument(
        "--dtype",
        choices=DTYPE_NAMES,
        default="float32",
        help="dtype of the result (default float32: the exported A is a product with the weights, and 16 bit round it)",
    )
    arguments.add_base_quant(
        command,
        why="for serving beside a base in 4 bits: A' = A·W of its linear weights rounded to 4 bits and back, as a QLoRA "
        "run saw them (nf4-double: with bnb_4bit_use_double_quant). Default: of the original weights",
        dtype="with --base-quant: the dtype in which weights are rounded to 4 bits (default: as they are stored)",
    )
    arguments.add_device(command, "where to multiply")
    arguments.add_dry_run(command)
    arguments.add_force(command, "replace an existing output once the new one is whole")
    arguments.add_kind(command)
    arguments.add_version(command)
    return command


def main() -> int:
    """Parse the command line and export."""
    asked = arguments.parse(parser())
    leave_on_sigterm()
    from pipeline.artifacts.export.export import export  # torch: only now that the command line is right
    from pipeline.formats.hub import model_folder

    base = Path(model_folder(asked.input, "--input"))
    export(
        base,
        asked.lora,
        asked.output,
        format=asked.format,
        dtype=asked.dtype,
        device=asked.device,
        dry_run=asked.dry_run,
        force=asked.force,
        kind=asked.kind,
        base_quant=asked.base_quant,
        base_dtype=asked.base_dtype,
    )
    if not asked.dry_run:
        log(lines(after_export(base, asked.output, gguf=asked.format == "gguf")))
    return EXIT_DONE


if __name__ == "__main__":
    run_command(main)
