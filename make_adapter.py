# PYTHON_ARGCOMPLETE_OK
"""Write an adapter without training:  python make_adapter.py --input BASE --output OUT --kind abliteration --directions FILE

Takes a base model's folder and direction vectors, from a file or as the difference between two sets of texts; gives a
multiplicative adapter that removes the directions from what the target modules write (abliteration) or mirrors it
(householder). Weights are read for --from-texts alone, a few layers at a time. Exit codes: 0 done, 2 the request cannot
be carried out, 28 disk full. In every case but the first no adapter is left behind.
"""

import argparse
from pathlib import Path

from pipeline.commands import arguments
from pipeline.console import EXIT_DONE, leave_on_sigterm, run_command
from pipeline.formats.choices import DIRECTION_METHODS, DTYPE_NAMES


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(
        description="Write a multiplicative adapter that is not trained but made of direction vectors.",
        epilog="example: python make_adapter.py --input models/base --output ablated --kind abliteration "
        "--from-texts refused.jsonl answered.jsonl --position last --direction-layer 20",
    )
    command.add_argument(
        "--input", required=True, metavar="BASE", help="folder of the base model, or OWNER/NAME[@REVISION] on the Hub"
    )
    command.add_argument("--output", type=Path, required=True, metavar="OUT", help="folder to write the adapter to")
    command.add_argument(
        "--kind",
        choices=DIRECTION_METHODS,
        required=True,
        help="abliteration: h' = h − f·v(vᵀh); householder: h' = h − 2f·v(vᵀh)",
    )
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--directions",
        type=Path,
        metavar="FILE",
        help=".safetensors or .npy: [D] for all layers, [L, D] one a layer, [L, k, D] several",
    )
    source.add_argument(
        "--from-texts",
        nargs=2,
        metavar=("A", "B"),
        help="mean of the residual stream after each layer over A's texts, less that over B's; a file or a quoted glob each",
    )
    command.add_argument("--factor", type=float, default=1.0, metavar="F", help="f, 1 for the whole effect (default 1)")
    command.add_argument("--layers", metavar="0:38", help="layers to adapt, both ends included (default all)")
    command.add_argument(
        "--direction-layer", type=int, metavar="N", help="use layer N's directions in every layer (default: its own)"
    )
    command.add_argument(
        "--target-modules",
        nargs="+",
        default=["down_proj", "o_proj"],
        metavar="NAME",
        help="modules that write to the residual stream (default: down_proj o_proj); 'experts', which down_proj means too, are "
        "what a mixture's experts write",
    )
    arguments.add_force(command, "replace what stands at the outputs once the new ones are whole")
    texts = command.add_argument_group("with --from-texts")
    texts.add_argument("--save-directions", type=Path, metavar="FILE", help="keep the differences as .safetensors")
    texts.add_argument("--sequence-len", type=int, default=512, metavar="T", help="tokens in a row (default 512)")
    texts.add_argument(
        "--position",
        choices=("mean", "last"),
        default="mean",
        help="mean over all tokens but BOS, or over each document's last token (default mean)",
    )
    texts.add_argument("--layers-at-once", type=int, default=1, metavar="N", help="layers in memory (default 1)")
    arguments.add_device(texts, "where to run the model")
    texts.add_argument("--dtype", choices=DTYPE_NAMES, help="dtype to run the model in (default: the base's own)")
    arguments.add_version(command)
    return command


def main() -> int:
    """Parse the command line and write the adapter."""
    asked = arguments.parse(parser())
    leave_on_sigterm()
    from pipeline.commands.direction_adapter import make  # torch: only now that the command line is right

    make(asked)
    return EXIT_DONE


if __name__ == "__main__":
    run_command(main)
