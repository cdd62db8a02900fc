"""`--check`, `--preview` and `--prepare`: all of a run that needs no weights and no other process, said, and nothing more.

Takes the config; gives lines on the console, or one UserError.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from pipeline.config.schema import Config
from pipeline.console import EXIT_DONE, log
from pipeline.data.preview import Piece, as_lines, rows
from pipeline.formats.hub import awaits_weights
from pipeline.training import trackers
from pipeline.training.data.batches import describe_steps, evaluation_batches, micro_batches
from pipeline.training.data.read import read_data
from pipeline.training.run import after_training
from pipeline.training.start import kernel_places, prepare, resolve


def check(config: Config, preview_rows: int | None) -> int:
    """Resolve and check; with `preview_rows`, show so many rows as the model will read them."""
    plan = resolve.resolve(config)
    trackers.check(config.trackers)
    kernel_places.foresee(config.kernels, plan.meta_model, plan.trained)
    if awaits_weights(Path(config.model)):
        log("weights:  not downloaded yet; a run checks them, and what needs them (after_training), when they are")
    else:
        prepare.check_files(config.model, config.output_dir, plan.meta_model)
        after_training.check(config.after_training, config.model, config.output_dir, plan, config.trainable_modules)
    tokenizer = prepare.tokenizer_for(plan, config.model)
    batches = micro_batches(plan.data, data := read_data(plan.data, tokenizer, plan))
    evaluation_batches(plan.data, data)
    describe_steps(plan.data, plan.updates, batches, replicas=1, adapter=plan.trained.adapter)
    if preview_rows is not None:
        show(rows(batches, tokenizer, preview_rows))
    return EXIT_DONE


def prepare_data(config: Config) -> int:
    """Resolve, read the data into the cache and say what became of it."""
    plan = resolve.resolve(config)
    data = read_data(plan.data, prepare.tokenizer_for(plan, config.model), plan)
    describe_steps(plan.data, plan.updates, micro_batches(plan.data, data), 1, plan.trained.adapter)
    log(f"prepared: in {plan.data.cache}; a run finds it there")
    return EXIT_DONE


STYLES = {"heading": "bold", "border": "cyan", "special": "reverse", "text": ""}
TRAINED = {True: "bold green", False: "dim", None: ""}


def show(shown: Iterator[list[Piece]]) -> None:
    """Rows on a terminal in colours (targets bold and green, what is masked dim, special tokens inverse), else with marks."""
    if not sys.stdout.isatty():
        log("\n" + "\n".join(line for row in shown for line in as_lines(row)))
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for row in shown:
        pieces = [(piece.text, f"{TRAINED[piece.trained]} {STYLES[piece.kind]}".strip()) for piece in row]
        console.print(Text.assemble("\n", pieces[0], "\n", *pieces[1:], "\n"))
