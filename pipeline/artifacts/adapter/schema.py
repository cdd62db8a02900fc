"""What an adapter's files say of it, held against the types that it must have.

Takes `adapter_config.json` and the facts that we write into the weights' metadata; gives both as plain JSON, or one
UserError with the keys, their values and what is asked of them. PEFT, which reads the first, checks no type: `true` is
a rank of 1 for it, and NaN an alpha. A key that is not listed is passed on as it is (keys.py decides about it).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveFloat, ValidationError

from pipeline.artifacts.adapter.adapter import CONFIG_FILE, FORMAT_VERSION, METADATA_KEY, OWN_TYPE
from pipeline.console import UserError
from pipeline.families import FAMILIES, KINDS, LORA, MULTIPLICATIVE
from pipeline.foreign import has_controls, parse_json, printable, read_object
from pipeline.formats.safetensors import Header


def _name(value: str) -> str:
    if has_controls(value):
        raise ValueError("a name has no control characters")
    return value


Name = Annotated[str, AfterValidator(_name)]
Names = list[Name] | Name | None
Switch = bool | None

Count = Annotated[int, Field(gt=0, le=2**31 - 1)]


class _Foreign(BaseModel):
    """Types as JSON has them: no text for a number, no true for 1, no 16.9 for a whole number, no NaN."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, protected_namespaces=())


class AdapterConfig(_Foreign):
    """The keys that PEFT's types of adapters share."""

    peft_type: Name | None = None
    base_model_name_or_path: Name | None = None
    revision: str | None = None
    peft_version: str | None = None
    task_type: str | None = None
    auto_mapping: dict[str, Any] | None = None
    runtime_config: dict[str, Any] | None = None
    inference_mode: Switch = None
    fan_in_fan_out: Switch = None
    bias: str | None = None
    target_modules: Names = None
    exclude_modules: Names = None
    modules_to_save: list[Name] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: Names = None
    init_weights: bool | str | None = None


class LoraConfig(AdapterConfig):
    target_parameters: list[Name] | None = None
    r: Count
    lora_alpha: float
    lora_dropout: float | None = None
    rank_pattern: dict[Name, Count] | None = None
    alpha_pattern: dict[Name, float] | None = None
    use_rslora: Switch = None
    use_dora: Switch = None
    lora_bias: Switch = None
    ensure_weight_tying: Switch = None
    init_lora_weights: bool | str | None = None


class PeanutConfig(AdapterConfig):
    r: Count
    scaling: float
    depth: int = 0
    act_fn: str = "relu"


# By PEFT's type; those of the families that are maps are beside the maps.
OF_PAIRS: Mapping[str, type[AdapterConfig]] = {
    FAMILIES[LORA].peft_type: LoraConfig,
    FAMILIES[MULTIPLICATIVE].peft_type: PeanutConfig,
    OWN_TYPE: PeanutConfig,
}


class TrainedOver(_Foreign):
    """The quantised weights that an adapter of ours was trained over."""

    bits: Literal[4, 8]
    quant_type: str | None  # None over 8 bits
    double_quant: bool
    skip: list[Name]
    dtype: str  # of the weights before they were quantised

    def __str__(self) -> str:
        """As --base-quant has it; 8 bits, which it does not have, in words."""
        if self.bits == 8:
            return "8 bits"
        return (self.quant_type or "4 bits") + ("-double" if self.double_quant else "")


class Experts(_Foreign):
    """What a module of experts writes with (formats/experts.py), by the names within it."""

    weight: Name
    bias: Name | None
    transposed: bool


class Facts(_Foreign):
    """Our own facts, as write.py writes them."""

    kind: Name
    version: Name | None = None  # of the program that wrote it
    train_logit_scale: PositiveFloat
    base_model: Name | None = None
    modules: list[Name] = []
    settings: dict[str, Any] = {}
    full: list[Name] = []
    tied: dict[Name, Name] = {}
    trained_over: TrainedOver | None = None
    base_fingerprint: Name | None = None
    experts: dict[Name, Experts] = {}
    stops: list[Annotated[int, Field(ge=0, le=2**31 - 1)]] = []


class PairFacts(Facts):
    """Those of an adapter that is pairs of A and B."""

    rank: Count
    alpha: float
    scaling: float


def read_config(folder: Path, schemas: Mapping[str, type[AdapterConfig]] = OF_PAIRS) -> dict[str, Any]:
    """`adapter_config.json` of the adapter in `folder`; `schemas` by PEFT's type.

    Raises UserError where a key has a value it cannot have.
    """
    file = folder / CONFIG_FILE
    config = read_object(file, "--lora: an adapter's folder has one")
    kind = config.get("peft_type")
    _check(schemas.get(kind, AdapterConfig) if isinstance(kind, str) else AdapterConfig, config, printable(file))
    return config


def own_facts(header: Header) -> dict[str, Any]:
    """What we wrote of the adapter into its weights' metadata; empty where others wrote it.

    Raises UserError where that is damaged, or written by a newer program.
    """
    written = (header.metadata or {}).get(METADATA_KEY)
    if written is None:
        return {}
    where = f"{printable(header.file)}: its metadata '{METADATA_KEY}'"
    own = parse_json(written, where)
    version = own.get("format_version") if isinstance(own, dict) else None
    if type(version) is not int or version < 1:
        raise UserError(f"{where} does not say its format. The file is damaged.")
    if version > FORMAT_VERSION:
        raise UserError(
            f"{printable(header.file)} was written by a newer mulora-pipe (format {version}; {FORMAT_VERSION} is known)."
        )
    _check(PairFacts if own.get("kind") in KINDS else Facts, own, where)
    return own


def _check(schema: type[_Foreign], content: dict[str, Any], where: str) -> None:
    """Raise UserError with every key of `content` whose value is not of the type that it has in `schema`."""
    try:
        schema.model_validate(content)
    except ValidationError as error:
        rules: dict[str, list[str]] = {}
        for problem in error.errors():
            key, message = str(problem["loc"][0]), problem["msg"].removeprefix("Value error, ")
            value = f" = {printable(repr(content[key]), 60)}" if key in content else ""
            rules.setdefault(f"{key}{value}", []).append(message[0].lower() + message[1:])
        lines = [f"{what}: {', or '.join(dict.fromkeys(broken))}" for what, broken in rules.items()]
        raise UserError(f"{where}: {'; '.join(lines)}.") from None
