"""The tables of a config, [optimizer], [quantization.bnb], [samples] and [sampling], and what all tables share; those of data are data_tables.py's.

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
from pipeline.peft.types import LOCAL
from pipeline.peft.types import known as known_type


def regular_expression(pattern: str) -> str:
    """`pattern`, or ValueError where it is none."""
    patterns.check(pattern)
    return pattern


def not_built(value: Any) -> Any:
    """A value of qlora-pipe's that is refused by name."""
    if value == "cpu":
        raise ValueError("not built; 'unsloth' also keeps the layers' inputs in host memory")
    return value


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


Tracker = Literal["wandb", "trackio", "mlflow", "swanlab", "comet_ml", "aim", "clearml", "dvclive"]
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
        6.0,
        description="8 bits: columns of the input with a value above this are multiplied in 16 bits; 0 for none; not of experts, whose inputs are never quantised",
    )
    llm_int8_skip_modules: list[str] = Field(
        [], description="linear modules, or 'experts', to leave in model_weight_dtype, in 4 bits too: the beginning or end of a name, or a regular expression; embedding, head and a mixture's routers always are left")  # fmt: skip


class Quantization(Section):
    """[quantization]"""

    bnb: Bnb


def conflicts_of_bits(bnb: Bnb) -> list[str]:
    """What is wrong with the table, a line each."""
    if bnb.load_in_4bit == bnb.load_in_8bit:
        return ["quantization.bnb: needs one of load_in_4bit = true and load_in_8bit = true"]
    return []


class Peft(Section):
    """[peft]; every other key of it is PEFT's own, and checked by PEFT when the model is known."""

    model_config = ConfigDict(extra="allow")

    type: Annotated[str, AfterValidator(known_type)] = Field(
        json_schema_extra={"enum": list(LOCAL)}, description="PEFT's name of the type: " + ", ".join(LOCAL)
    )


Temperature = Annotated[
    NonNegativeFloat, Field(description="divides the logits; 0 is greedy: always the likeliest token")
]
TopK = Annotated[int, Field(ge=0, description="choose among the k likeliest tokens; 0 for all")]
TopP = Annotated[float, Field(gt=0, le=1, description="choose among the likeliest tokens that together have this much")]
MinP = Annotated[
    float,
    Field(ge=0, le=1, description="leave out tokens that are less likely than this times the likeliest"),
]
TemperatureLast = Annotated[
    bool,
    Field(
        description="filter first and divide by temperature then, as qlora-pipe and llama.cpp; transformers divides first"
    ),
]
NoiseSeed = Annotated[int, Field(ge=0, le=2**32 - 1, description="of what is drawn, with the step and the prompt")]


class Samples(Section):
    """[samples]"""

    prompts: list[Annotated[str, Field(min_length=1)]] = Field(
        [], description="what the model is asked, or given to go on from; this or prompts_file"
    )
    prompts_file: str | None = Field(None, min_length=1, description="a UTF-8 text with one prompt a line")
    chat: bool | None = Field(
        None, description="ask through the chat template of the first chat dataset, else the tokenizer's own, with its generation prompt; default: whether a chat dataset is trained")  # fmt: skip
    system: str = Field("", description="the system's message before each prompt; of chat = true")
    every_steps: int = Field(100, ge=0, description="optimizer steps between samples; 0 for none in between")
    at_start: bool = Field(True, description="before the first step")
    at_end: bool = Field(True, description="after the last step")
    max_new_tokens: PositiveInt = Field(200, description="tokens of an answer at most")
    temperature: Temperature = 1.0
    top_k: TopK = 0
    top_p: TopP = 1.0
    min_p: MinP = 0.01
    temperature_last: TemperatureLast = False
    seed: NoiseSeed = 0
    compare: bool | None = Field(
        None, description="also show what the base says, with the same noise; default: true with an adapter alone")  # fmt: skip


class Sampling(Section):
    """[sampling]"""

    max_new_tokens: PositiveInt | None = Field(
        None, description="tokens of an answer at most; default: what sequence_len leaves after its prompt"
    )
    temperature: Temperature = 1.0
    top_k: TopK = 0
    top_p: TopP = 1.0
    min_p: MinP = 0.0
    temperature_last: TemperatureLast = False
    seed: NoiseSeed = 0
