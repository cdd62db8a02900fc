"""`--check` and `--preview`: everything of a run that needs no weights and no other process, said, and nothing more.

Takes the config; gives lines on the console, or one UserError.
"""

from pipeline.config.schema import Config
from pipeline.console import EXIT_DONE, log
from pipeline.data.preview import preview
from pipeline.training.run import after_training
from pipeline.training.start import kernel_places, prepare, resolve


def check(config: Config, preview_rows: int | None) -> int:
    """Resolve and check; with `preview_rows`, show so many rows as the model will read them."""
    plan = resolve.resolve(config)
    kernel_places.foresee(config.kernels, plan.meta_model, plan.trained)
    prepare.check_files(config.model, config.output_dir, plan.meta_model)
    after_training.check(config.after_training, config.model, config.output_dir, plan, config.trainable_modules)
    tokenizer = prepare.tokenizer_for(plan, config.model)
    batches = prepare.micro_batches(plan.data, data := prepare.read_data(plan.data, tokenizer, plan))
    prepare.evaluation_batches(plan.data, data)
    prepare.describe_steps(plan.data, plan.updates, batches, replicas=1)
    if preview_rows is not None:
        log("\n" + "\n".join(preview(batches, tokenizer, preview_rows)))
    return EXIT_DONE
