"""What a valid configuration says that was probably not meant: the user is warned, not refused.

Takes a `Config` and which keys were written; gives one line for each. Mistakes are pipeline/config/schema.py's.
"""

from collections.abc import Iterator

from pipeline.config.schema import Config


def warnings_of(config: Config) -> Iterator[str]:
    """One line each: the key, what follows from it, the line to write instead."""
    given = config.model_fields_set
    if "adapter_type" not in given and not config.full_fine_tune:
        yield (
            "adapter_type: not given, so this run trains the multiplicative adapter; qlora-pipe would train LoRA on all "
            "linear modules. Add adapter_type = 'multiplicative_lora', or adapter_type = 'lora'"
        )
    if config.batch_size_tokens and "micro_batch_size_per_gpu" in given:
        yield (
            f"micro_batch_size_per_gpu: {config.micro_batch_size_per_gpu} has no effect beside batch_size_tokens = "
            f"{config.batch_size_tokens}, which fills a micro-batch by tokens; remove one of them"
        )
    if config.force_constant_lr and config.lr_scheduler == "cosine":
        yield "lr_scheduler: 'cosine' has no effect with force_constant_lr; remove one of them"
    if config.checkpoint_on_save and config.checkpoint_every_n_minutes:
        yield (
            "checkpoint_every_n_minutes: has no effect with checkpoint_on_save = true, which writes a checkpoint with "
            "each save of the adapter; remove one of them"
        )
    if config.dataset_combination_mode == "concatenate":
        for number, dataset in enumerate(config.datasets):
            if dataset.sample_weight != 1:
                yield (
                    f"datasets.{number}.sample_weight: has no effect without dataset_combination_mode = 'interleave'; "
                    "use num_repeats, or set that"
                )
