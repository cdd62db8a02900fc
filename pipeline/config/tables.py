"""The tables of a config: [optimizer], [quantization.bnb], [samples], [[datasets]], [[eval_datasets]], and what they share.

Every key with its default, unit, bound and meaning, as in pipeline/config/schema.py, which has the top level.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
)

from pipeline import patterns


def regular_expression(pattern: str) -> str:
    """`pattern`, or ValueError where it is none."""
    patterns.check(pattern)
    return pattern


_CONVERT = "books are read from .txt and .md files, dataset_type = 'textfile': convert them first"
# dataset_type as others would write it → what to do.
_OTHER_TYPES = {
    (
        "chat",
        "chat_template",
        "sharegpt",
        "messages",
        "conversations",
        "alpaca",
        "instruction",
        "completion",
        "chatml",
    ): (
        "chat and instruction data are not built yet; plain text is: write each conversation through the model's chat "
        "template into a field 'text' of a .jsonl file, dataset_type = 'doclist'"
    ),
    ("csv", "tsv", "table", "arrow"): (
        "tables are not read; write the text column to a .jsonl or .parquet file with the field 'text', "
        "dataset_type = 'doclist'"
    ),
    ("epub", "pdf", "html", "docx", "mobi"): _CONVERT,
    ("json", "jsonl", "parquet"): "write dataset_type = 'doclist', which reads .json, .jsonl and .parquet",
    ("text", "txt", "md", "markdown", "raw", "plain", "book", "books"): "write dataset_type = 'textfile'",
}


def not_built(value: Any) -> Any:
    """Values of qlora-pipe's and of other trainers that are refused by name."""
    if value in ("axolotl", "pretokenized"):
        raise ValueError("datasets of this type are not built yet; write 'textfile' or 'doclist'")
    for values, what in _OTHER_TYPES.items():
        if isinstance(value, str) and value.lower() in values:
            raise ValueError(what)
    if value == "cpu":
        raise ValueError("not built; 'unsloth' also keeps the layers' inputs in host memory")
    return value


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


OptimizerType = Literal["adamw_kahan", "adamw", "adamw8bit"]
OPTIMIZER_TYPES: Any = {"enum": ["adamw_kahan", "AdamW", "AdamW8bit", "adamw", "adamw8bit"]}


class Section(BaseModel):
    """A table of the TOML file; a key that is not listed is an error, and so are `true` for 1, '3' for 3, and inf."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


class ParameterGroup(Section):
    """[[optimizer.groups]]"""

    names: list[Annotated[str, AfterValidator(regular_expression)]] = Field(
        min_length=1, description="trained parameters: a name in the whole model, the end of one after a dot, or a regular expression for it: 'A', 'layers.0.mlp.down_proj.B', '.*norm.weight'")  # fmt: skip
    type: Annotated[OptimizerType | None, BeforeValidator(_lower)] = Field(
        None, json_schema_extra=OPTIMIZER_TYPES, description="as optimizer.type, which is the default"
    )
    lr_ratio: PositiveFloat | None = Field(
        None, description="by which the schedule's rate is multiplied; default 1, or LoRA+'s ratio for B"
    )
    weight_decay: NonNegativeFloat | None = Field(None, description="default optimizer.weight_decay")
    beta1: float | None = Field(None, ge=0, lt=1, description="default optimizer.beta1")
    beta2: float | None = Field(None, ge=0, lt=1, description="default optimizer.beta2")
    eps: PositiveFloat | None = Field(None, description="default optimizer.eps")


class Optimizer(Section):
    """[optimizer]"""

    type: Annotated[OptimizerType, BeforeValidator(_lower)] = Field(
        json_schema_extra=OPTIMIZER_TYPES,
        description="'adamw_kahan': AdamW whose update and weight decay both pass through a compensated (Kahan) sum, so that small steps move bf16 weights. "
        "'AdamW': torch's. 'AdamW8bit': bitsandbytes'.")  # fmt: skip
    lr: PositiveFloat = Field(description="peak learning rate")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the gradient's moving average")
    beta2: float = Field(0.99, ge=0, lt=1, description="decay of the squared gradient's moving average")
    eps: PositiveFloat = Field(1e-6, description="added to the denominator of the update")
    weight_decay: NonNegativeFloat = Field(0.01, description="decoupled weight decay per unit of learning rate")
    lr_min: NonNegativeFloat = Field(0.0, description="learning rate at the end of the cosine schedule")
    loraplus_lr_ratio: PositiveFloat | None = Field(
        None, description="LoRA+: B learns at this times the schedule's rate, all else at the rate itself (16 in the paper)")  # fmt: skip
    use_loraplus: bool | None = Field(
        None, description="true is LoRA+, with a ratio of 16 unless loraplus_lr_ratio is given; false is none; default: whether loraplus_lr_ratio is given")  # fmt: skip

    groups: list[ParameterGroup] = Field([])

    @property
    def loraplus(self) -> float:
        """By what B's rate is multiplied; 1 without LoRA+."""
        wanted = self.loraplus_lr_ratio is not None if self.use_loraplus is None else self.use_loraplus
        return (self.loraplus_lr_ratio or 16.0) if wanted else 1.0


class Bnb(Section):
    """[quantization.bnb]"""

    load_in_4bit: bool = Field(
        False, description="4 bits a weight and a scale for 64 of them; this or load_in_8bit is required in this table"
    )
    load_in_8bit: bool = Field(False, description="8 bits a weight and a scale a row, LLM.int8()")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = Field(
        "nf4", description="the 16 values of 4 bits: 'nf4' for weights that are normally distributed, 'fp4' a float"
    )
    bnb_4bit_compute_dtype: Literal["bfloat16", "float32"] | None = Field(
        None, description="of the products with 4-bit weights; default model_weight_dtype (qlora-pipe: float32)"
    )
    bnb_4bit_use_double_quant: bool = Field(
        False, description="quantise the scales too: 4.13 bits a weight instead of 4.5"
    )
    llm_int8_threshold: NonNegativeFloat = Field(
        6.0, description="8 bits: columns of the input with a value above this are multiplied in 16 bits; 0 for none"
    )
    llm_int8_skip_modules: list[str] = Field(
        [], description="linear modules to leave in model_weight_dtype, in 4 bits too: the beginning or end of a name, or a regular expression; embedding, head and a mixture's routers always are left")  # fmt: skip


class Quantization(Section):
    """[quantization]"""

    bnb: Bnb


class Samples(Section):
    """[samples]"""

    prompts: list[Annotated[str, Field(min_length=1)]] = Field(
        [], description="what the model is asked, or given to go on from; this or prompts_file"
    )
    prompts_file: str | None = Field(None, min_length=1, description="a UTF-8 text with one prompt a line")
    chat: bool | None = Field(
        None, description="ask through the tokenizer's chat template with its generation prompt; default: whether a chat dataset is trained")  # fmt: skip
    system: str = Field("", description="the system's message before each prompt; of chat = true")
    every_steps: int = Field(100, ge=0, description="optimizer steps between samples; 0 for none in between")
    at_start: bool = Field(True, description="before the first step")
    at_end: bool = Field(True, description="after the last step")
    max_new_tokens: PositiveInt = Field(200, description="tokens of an answer at most")
    temperature: NonNegativeFloat = Field(
        1.0, description="divides the logits; 0 is greedy: always the likeliest token"
    )
    top_k: int = Field(0, ge=0, description="choose among the k likeliest tokens; 0 for all")
    top_p: float = Field(1.0, gt=0, le=1, description="choose among the likeliest tokens that together have this much")
    min_p: float = Field(
        0.01, ge=0, le=1, description="leave out tokens that are less likely than this times the likeliest"
    )
    temperature_last: bool = Field(
        False, description="filter first and divide by temperature then, as qlora-pipe and llama.cpp; transformers divides first")  # fmt: skip
    seed: int = Field(0, ge=0, le=2**32 - 1, description="of what is drawn, with the step and the prompt")
    compare: bool | None = Field(
        None, description="also show what the base says, with the same noise; default: true with an adapter alone")  # fmt: skip


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
    join_lines: bool = Field(
        False, description="join line breaks inside paragraphs, as Project Gutenberg's texts have them; verse, lists, tables, headings, quotations, code and indented lines keep theirs (datasets/README.md)")  # fmt: skip


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
    join_lines: bool = Field(False, description="as for [[datasets]]")
