"""The schema of an evaluation: every key, its default, bound and meaning, in the vocabulary of a run's (config/schema.py).

Takes a TOML's path and `key=value` overrides; gives a validated `Evaluation`, or one UserError with every problem.
"""

import os
from collections.abc import Iterator
from typing import Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from pipeline.config import data_tables, toml
from pipeline.config.data_tables import MEANT_FOR, EvalDataset
from pipeline.config.loading import Vocabulary, find, overridden, validate_as
from pipeline.config.tables import Bnb, Quantization, Section, conflicts_of_bits
from pipeline.formats.choices import Dtype

Role = Literal["in-sample", "test", "ood", "unrelated"]
BASE = "base"
MULTIPLE_CHOICE = "multiple_choice"
OF_CHOICES = ("field_choices", "field_answer", "permutations")
# What a table of questions shares with the other types.
SHARED = ("field_prompt", "chat_template", "chat_template_kwargs", "max_bad_rows")


class EvaluatedDataset(EvalDataset):
    """[[datasets]] of an evaluation"""

    dataset_type: Literal["textfile", "doclist", "chat", "completion", "pretokenized", "preference", "unpaired", "ranked", "multiple_choice"] = Field(  # type: ignore[assignment]
        description="as in a run's [[datasets]], scored by the log-probability of what would be trained (of pairs: of both answers; of ranked ones: of all); or 'multiple_choice': rows with a question, its options and which is right")  # fmt: skip
    role: Role = Field(
        "test", description="what its rows are to the training: 'in-sample' was trained on; 'test' was not, but is like it; 'ood' asks for the same in another place; 'unrelated' should stay as it was")  # fmt: skip
    field_prompt: str = Field(
        "prompt",
        min_length=1,
        description="completion, preference, unpaired, ranked: the field with what is read; multiple_choice: with the question",
    )
    field_choices: str = Field(
        "choices", min_length=1, description="multiple_choice: the field with the options, a list of texts, or ARC's { text, label }"
    )  # fmt: skip
    field_answer: str = Field(
        "answer", min_length=1, description="multiple_choice: the field with the right option: its number from 0, its letter, label or text"
    )  # fmt: skip
    permutations: int = Field(
        2, ge=2, description="multiple_choice: orders in which each question's options are listed, at most as many as it has options; in each the right one stands elsewhere")  # fmt: skip
    chat_template: str | None = Field(
        None, min_length=1, description="chat, completion's instructions, preference, unpaired, ranked, multiple_choice: a file, a text of Jinja, 'chatml', 'llama3', 'gemma' or 'alpaca'; default the tokenizer's own. 'none' (not for chat) takes text as it is, as does multiple_choice where the tokenizer has no template")  # fmt: skip


class Evaluation(Section):
    """The whole evaluation."""

    model: str = Field(
        description="folder of the base model: config.json, tokenizer, safetensors; or its name on the Hub, 'OWNER/NAME' or 'OWNER/NAME@REVISION'"
    )
    output_dir: str = Field(description="each evaluation makes a folder named by its UTC start time in here")
    adapters: list[str] = Field(
        [BASE], min_length=1, description="folders of adapters; 'base' is the model without any, which is measured in any case. --adapters goes before")  # fmt: skip
    pipeline_stages: PositiveInt | None = Field(
        None, description="parts the model is cut into; must divide the number of processes, what is left is data parallel; default: the number of processes")  # fmt: skip
    layers_per_stage: list[PositiveInt] | None = Field(
        None, description="decoder layers per stage, e.g. [21, 19]; default: balanced by the weights read"
    )
    model_weight_dtype: Dtype = Field("bfloat16", description="of the base weights")
    attn_implementation: str | None = Field(
        None, description="attention by transformers' name: 'flash_attention_2', 'flash_attention_3', 'flex_attention', 'sdpa', 'eager', or a kernel of the Hub's ('kernels-community/flash-attn2', with the package kernels); tried against eager on a tiny copy of the model first; default: sdpa where the model supports it")  # fmt: skip
    quantization: Quantization | None = Field(
        None,
        description="of the base weights, as in the training; default none. Over it adapters are measured that stand beside a weight: multiplicative ones and LoRA",
    )
    micro_batch_size_per_gpu: PositiveInt = Field(
        1, description="rows per micro-batch and replica; not used with batch_size_tokens"
    )
    batch_size_tokens: PositiveInt | None = Field(
        None, description="tokens, padding included, per micro-batch and replica"
    )
    beta: PositiveFloat = Field(0.1, description="of the margin β·(Δ_w − Δ_l) of pairs, TRL's rewards/margins")
    confidence_level: float = Field(0.95, gt=0, lt=1, description="of the intervals")
    bootstrap_resamples: int = Field(2000, ge=100, description="draws of prompts behind each interval")
    seed: int = Field(42, ge=0, le=2**32 - 1, description="of these draws")
    tasks: list[str] = Field(
        [], description="names of lm-evaluation-harness's tasks, which has to be installed; --tasks goes before"
    )
    tasks_folder: str | None = Field(None, min_length=1, description="a folder with YAML files of tasks of your own")  # fmt: skip
    tasks_role: Role = Field("unrelated", description="of all tasks, as a dataset's role")
    num_fewshot: int | None = Field(
        None, ge=0, description="examples before each question of a task; default: the task's"
    )
    datasets: list[EvaluatedDataset] = Field([])

    @field_validator("model", "output_dir")
    @classmethod
    def _home_is_known(cls, value: str) -> str:
        return os.path.expanduser(value)

    @field_validator("adapters")
    @classmethod
    def _adapters_differ(cls, value: list[str]) -> list[str]:
        if doubles := sorted({name for name in value if value.count(name) > 1}):
            raise ValueError(f"'{doubles[0]}' is named twice")
        if "" in value:
            raise ValueError("one of them is empty; give folders, or 'base'")
        return [os.path.expanduser(name) for name in value]

    @field_validator("datasets", mode="before")
    @classmethod
    def _datasets_are_several(cls, value: Any) -> Any:
        if isinstance(value, dict):
            raise ValueError("is one table; write [[datasets]] with double brackets, once for each dataset")
        return value

    @model_validator(mode="after")
    def _rules_between_keys(self) -> Self:
        problems = [line for number, one in enumerate(self.datasets) for line in _conflicts(f"datasets.{number}", one)]
        names = [one.name or f"dataset{number}" for number, one in enumerate(self.datasets)]
        for name in sorted({n for n in names if names.count(n) > 1}):
            problems.append(f"datasets.name: '{name}' is used more than once; the table needs one name per dataset")
        if not self.datasets and not self.tasks:
            problems.append("datasets: there is nothing to measure; give [[datasets]] or tasks")
        for key in ("tasks_folder", "num_fewshot", "tasks_role") if not self.tasks else ():
            if key in self.model_fields_set:
                problems.append(f"{key}: has a meaning with tasks only; name some, or remove it")
        if both := sorted(set(self.tasks) & {one.name for one in self.datasets}):
            problems.append(f"datasets.name: '{both[0]}' is a task's name as well; the table needs one name for each")
        stages = self.pipeline_stages
        if self.layers_per_stage is not None and stages is not None and len(self.layers_per_stage) != stages:
            problems.append(
                f"layers_per_stage: has {len(self.layers_per_stage)} entries, but pipeline_stages = {stages}"
            )
        if self.quantization is not None:
            problems += conflicts_of_bits(self.quantization.bnb)
        if problems:
            raise ValueError("\n".join(problems))
        return self


def _conflicts(table: str, dataset: EvaluatedDataset) -> Iterator[str]:
    """One line for each key of `table` that does not go with the dataset's type."""
    choices = dataset.dataset_type == MULTIPLE_CHOICE
    if not choices:
        yield from data_tables.conflicts(table, dataset)
    for key in MEANT_FOR if choices else OF_CHOICES:
        field = type(dataset).model_fields.get(key)
        if field is not None and key not in SHARED and getattr(dataset, key) != field.get_default():
            kind = dataset.dataset_type
            meant = f"for '{MULTIPLE_CHOICE}' only" if not choices else "for rows that are trained on"
            yield f"{table}.{key}: has a meaning {meant}, not for '{kind}'; remove it"


WORDS = Vocabulary(
    Evaluation,
    {"datasets": EvaluatedDataset, "quantization": Quantization, "quantization.bnb": Bnb},
    {
        "model": "-",
        "output_dir": "-",
        "datasets": [{"dataset_type": "textfile", "dataset_path": "-", "sequence_len": 2}],
    },
)


def load(path: str, overrides: list[str], **given: Any) -> Evaluation:
    """The validated evaluation in `path`, with `key=value` overrides and the keys `given` on the command line in it."""
    source = find(path)
    raw = overridden(toml.read(source), overrides) | given
    evaluation: Evaluation = validate_as(WORDS, raw, str(source), [])
    return evaluation
