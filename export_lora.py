"""Export an adapter for serving:  python export_lora.py --input BASE --lora ADAPTER --output OUT --format peft|gguf

Takes the folder of a base model (safetensors, 16 or 32 bit) and of an adapter (ours, PEFT's LoRA, or the founding
method's hacked PEFT); gives the same function in the additive form, as a PEFT folder (PEFT, vLLM) or a GGUF file
(llama.cpp). Exit codes: 0 done, 2 the request cannot be carried out, 28 disk full. In every case but the first nothing
is left behind.
"""

import argparse
from pathlib import Path

from pipeline.artifacts.adapter.write import KINDS
from pipeline.artifacts.export.export import FORMATS, export
from pipeline.artifacts.fold.plan import BASE_QUANTS
from pipeline.console import EXIT_DONE, leave_on_sigterm, run_command
from pipeline.formats.dtypes import DTYPES
from pipeline.version import ShowVersion


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(
        description="Write an adapter in the additive form that PEFT, vLLM and llama.cpp serve beside the base model. "
        "The result appears whole or not at all.",
        epilog="example: python export_lora.py --input models/base --lora runs/x/step100 --output x.gguf --format gguf",
    )
    command.add_argument("--input", type=Path, required=True, metavar="BASE", help="folder of the base model")
    command.add_argument("--lora", type=Path, required=True, metavar="ADAPTER", help="folder of the adapter")
    command.add_argument(
        "--output", type=Path, required=True, metavar="OUT", help="folder (peft) or file (gguf) to write to"
    )
    command.add_argument("--format", choices=FORMATS, required=True, help="peft: PEFT and vLLM; gguf: llama.cpp")
    command.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        default="float32",
        help="dtype of the result (default float32: the exported A is a product with the weights, and 16 bit round it)",
    )
    command.add_argument(
        "--base-quant",
        choices=BASE_QUANTS,
        help="for serving beside a base in 4 bits: A' = A·W of its linear weights rounded to 4 bits and back, as a QLoRA "
        "run saw them (nf4-double: with bnb_4bit_use_double_quant). Default: of the original weights",
    )
    command.add_argument(
        "--base-dtype",
        choices=tuple(DTYPES),
        help="with --base-quant: the dtype in which weights are rounded to 4 bits (default: as they are stored)",
    )
    command.add_argument("--device", default="cpu", help="where to multiply: cpu, cuda, cuda:1 (default cpu)")
    command.add_argument("--dry-run", action="store_true", help="check everything, print the plan, write nothing")
    command.add_argument("--force", action="store_true", help="replace an existing output once the new one is whole")
    command.add_argument(
        "--kind", choices=KINDS, help="what a LORA adapter on square weights is, where its shapes cannot tell"
    )
    command.add_argument("--version", action=ShowVersion)
    return command


def main() -> int:
    """Parse the command line and export."""
    asked = parser().parse_args()
    leave_on_sigterm()
    export(
        asked.input,
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
    return EXIT_DONE


if __name__ == "__main__":
    run_command(main)
