"""The tables of a config: [optimizer], [[datasets]], [[eval_datasets]], and what all of them share.

Every key with its default, unit, bound and meaning, as in pipeline/config.py, which has the top level.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt


def not_built(value: Any) -> Any:
    """Values of qlora-pipe's that are refused by name."""
    if value in ("axolotl", "pretokenized"):
        raise ValueError("datasets of this type are not built yet; write 'textfile' or 'doclist'")
    if value == "cpu":
        raise ValueError("not built; 'unsloth' also keeps the layers' inputs in host memory")
    return value


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


class Section(BaseModel):
    """A table of the TOML file; a key that is not listed is an error, and so are `true` for 1, '3' for 3, and inf."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


class Optimizer(Section):
    """[optimizer]"""

    type: Annotated[Literal["adamw_kahan", "adamw", "adamw8bit"], BeforeValidator(_lower)] = Field(
        json_schema_extra={"enum": ["adamw_kahan", "AdamW", "AdamW8bit", "adamw", "adamw8bit"]},
        description="'adamw_kahan': AdamW whose update and weight decay both pass through a compensated (Kahan) sum, so that small steps move bf16 weights. "
        "'AdamW': torch's. 'AdamW8bit': bitsandbytes'.")  # fmt: skip
    lr: PositiveFloat = Field(description="peak learning rate")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the gradient's moving average")
    beta2: float = Field(0.99, ge=0, lt=1, description="decay of the squared gradient's moving average")
    eps: PositiveFloat = Field(1e-6, description="added to the denominator of the update")
    weight_decay: NonNegativeFloat = Field(0.01, description="decoupled weight decay per unit of learning rate")
    lr_min: NonNegativeFloat = Field(0.0, description="learning rate at the end of the cosine schedule")


class Dataset(Section):
    """[[datasets]]"""

    name: str | None = Field(
        None, pattern=r"^[A-Za-z0-9_.-]+$", description="prefix of its metrics; default dataset0, dataset1, …"
    )
    dataset_type: Annotated[Literal["textfile", "doclist"], BeforeValidator(not_built)] = Field(
        description="'textfile': .txt and .md files, one document each. 'doclist': .json, .jsonl or .parquet with a `text` field.")  # fmt: skip
    dataset_path: str = Field(description="a file or a glob; ** descends into folders")
    sequence_len: int = Field(ge=2, description="tokens per chunk, exactly")
    eval_size: float | int = Field(
        0,
        ge=0,
        description="held out for evaluation: a fraction below 1, or a number of chunks (documents if eval_split = 'document')",
    )
    eval_split: Literal["chunk", "document"] = Field(
        "chunk", description="'chunk' holds out chunks as qlora-pipe does; 'document' holds out whole documents, which is the honest test, since neighbouring chunks of one book share it")  # fmt: skip
    sample_weight: PositiveFloat = Field(1.0, description="weight of this dataset when datasets are interleaved")
    subsample: float | None = Field(
        None, gt=0, le=1, description="fraction of the chunks to keep (of those held out too), after a seeded shuffle"
    )
    num_repeats: PositiveInt | None = Field(None, description="how many times an epoch goes through this dataset")


class EvalDataset(Section):
    """[[eval_datasets]]"""

    name: str | None = Field(
        None, pattern=r"^[A-Za-z0-9_.-]+$", description="prefix of its metrics; default eval0, eval1, …"
    )
    dataset_type: Annotated[Literal["textfile", "doclist"], BeforeValidator(not_built)] = Field(
        description="as for [[datasets]]"
    )
    dataset_path: str = Field(description="a file or a glob; all of it is evaluated")
    sequence_len: int = Field(ge=2, description="tokens per chunk, exactly")
    subsample: float | None = Field(
        None, gt=0, le=1, description="fraction of the chunks to keep, after a seeded shuffle"
    )
