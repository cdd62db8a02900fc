"""A dataset's table → what is made of it: units, rows, or chunks of a stream.

Takes the table as the config has it; gives the plain values that `pipeline/data` takes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.config.data_tables import Dataset, EvalDataset
from pipeline.config.schema import Config
from pipeline.config.tables import Samples
from pipeline.config.tables import Sampling as TableOfSampling
from pipeline.data.chat.derive import Rules
from pipeline.data.chat.messages import Fields
from pipeline.data.rows import build
from pipeline.data.units import build as unit_build
from pipeline.data.units.formats import Names
from pipeline.formats.base_model import stop_ids
from pipeline.generation.prompts import read_prompts
from pipeline.generation.sampling import Sampling
from pipeline.training.start.resolved import DataSpec, GenerationSpec, SampleSpec

MOST_BAD = 0.01  # part of a dataset's rows, where max_bad_rows is not given


def generates(dataset: Dataset | EvalDataset) -> bool:
    """Whether the model gives the rejected answers itself."""
    return isinstance(dataset, Dataset) and dataset.generates


def unit_spec(dataset: Dataset | EvalDataset, name: str) -> unit_build.UnitSpec:
    """What is made of a dataset of units, as its table says."""
    kind: Any = dataset.dataset_type
    return unit_build.UnitSpec(
        name,
        kind,
        dataset.dataset_path,
        dataset.sequence_len,
        keep_start=dataset.truncation_mode == "keep_start",
        names=Names(
            dataset.field_prompt,
            dataset.field_chosen,
            None if generates(dataset) else dataset.field_rejected,
            dataset.field_completion,
            dataset.field_label,
            dataset.field_answers,
            chat=dataset.conversational,
            messages=Fields(
                properties={str(key): name for key, name in dataset.message_property_mappings.items()},
                roles={str(role): names for role, names in dataset.roles.items()},
                system=dataset.field_system,
                merge_system=dataset.merge_system,
            ),
        ),
        ranks=dataset.ranks,
        score_weights=dict(dataset.score_weights),
        chat_template=dataset.chat_template,
        template_kwargs=dict(dataset.chat_template_kwargs),
        allow_special_text=dataset.allow_special_text,
        deduplicate=dataset.deduplicate,
        most_bad=MOST_BAD if dataset.max_bad_rows is None else dataset.max_bad_rows,
    )


def row_spec(dataset: Dataset | EvalDataset, name: str) -> build.RowSpec:
    """What is made of a dataset of rows, as its table says."""
    kind: Any = dataset.dataset_type
    most_bad = dataset.max_bad_rows
    if most_bad is None:
        most_bad = 0.0 if kind == "pretokenized" else MOST_BAD
    return build.RowSpec(
        name,
        kind,
        dataset.dataset_path,
        Rules(
            dataset.sequence_len,
            too_long=dataset.too_long,
            history=dataset.history,
            train_on_eos=dataset.train_on_eos,
            allow_special_text=dataset.allow_special_text,
        ),
        Fields(
            messages=dataset.field_messages,
            properties={str(key): name for key, name in dataset.message_property_mappings.items()},
            roles={str(role): names for role, names in dataset.roles.items()},
            system=dataset.field_system,
            tools=dataset.field_tools,
            train_on=dataset.train_on,
            merge_system=dataset.merge_system,
            allow_empty_answers=dataset.allow_empty_answers,
        ),
        prompt=dataset.field_prompt,
        completion=dataset.field_completion,
        chat_template=dataset.chat_template,
        template_kwargs=dict(dataset.chat_template_kwargs),
        deduplicate=dataset.deduplicate,
        most_bad=most_bad,
    )


def data_of(config: Config) -> DataSpec:
    """The data as the config has it."""
    keeps_base = not config.full_fine_tune and not config.trainable_modules
    return DataSpec(
        config.datasets,
        config.eval_datasets,
        cache=Path(config.output_dir) / "dataset_cache",
        processes=config.dataset_processes,
        stops=stop_ids(Path(config.model)),
        combination=config.dataset_combination_mode,
        stopping=config.dataset_interleave_stopping_strategy,
        mix_by=config.mix_by,
        seed=config.seed,
        micro_batch_size=config.micro_batch_size_per_gpu,
        batch_size_tokens=config.batch_size_tokens,
        accumulation=config.gradient_accumulation_steps,
        group_by_length=config.group_by_length,
        epochs=config.epochs,
        max_steps=config.max_steps,
        samples=samples_of(config.samples, config.model, config.datasets, keeps_base),
        generation=generation_of(config.sampling, config.datasets),
    )


def generation_of(s: TableOfSampling | None, datasets: Sequence[Dataset]) -> GenerationSpec | None:
    """How the model answers prompts that it is trained on; None where it does not."""
    if not any(dataset.generates for dataset in datasets):
        return None
    s = s or TableOfSampling.model_validate({})
    drawn = Sampling(s.temperature, s.top_k, s.top_p, s.min_p, s.temperature_last, s.seed)
    return GenerationSpec(drawn, s.max_new_tokens)


def samples_of(s: Samples | None, folder: str, datasets: Sequence[Dataset], keeps_base: bool) -> SampleSpec | None:
    """What the model in `folder` is asked while it is trained. `keeps_base`: whether its own weights stay as they are.

    UserError for a file of prompts that has none.
    """
    if s is None:
        return None
    prompts = read_prompts(Path(s.prompts_file), "samples.prompts_file") if s.prompts_file else s.prompts
    spoken = next((dataset for dataset in datasets if dataset.dataset_type == "chat"), None)
    return SampleSpec(
        folder,
        tuple(prompts),
        chat=spoken is not None if s.chat is None else s.chat,
        system=s.system,
        chat_template=spoken.chat_template if spoken else None,
        template_kwargs=dict(spoken.chat_template_kwargs) if spoken else {},
        merge_system=spoken is not None and spoken.merge_system,
        sampling=Sampling(s.temperature, s.top_k, s.top_p, s.min_p, s.temperature_last, s.seed),
        max_new_tokens=s.max_new_tokens,
        compare=keeps_base if s.compare is None else s.compare,
        every_steps=s.every_steps,
        at_start=s.at_start,
        at_end=s.at_end,
    )
