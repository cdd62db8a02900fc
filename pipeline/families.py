"""The adapter families: one row each, for everything that asks what a family is, needs or does.

A family is a row here, a module in pipeline/model/adapters/ (what it computes in training), and, unless it is saved as
another one, an entry in pipeline/artifacts/adapter/family_maps.py (what it does to a weight, for the fold, in terms of
the maps in maps.py). Nothing else names one. Torch-free; tests/house/test_family_rows.py holds the three together.

Names: W a module's weight [D_out, D_in], x its input, h its output, R the rank, s = alpha / R.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.peft.types import PEFT

AdapterType = Literal[
    "multiplicative_lora", "control_adapter", "lora", "moslora", "flora", "ia3", "oft", "boft", "hra", "peft"
]
Kind = Literal["multiplicative_lora", "lora"]  # of adapters that are saved as pairs of A and B
MULTIPLICATIVE: Kind = "multiplicative_lora"
LORA: Kind = "lora"


@dataclass(frozen=True)
class Key:
    """In a family's PEFT settings: the value of this key of a configuration."""

    name: str


@dataclass(frozen=True)
class Family:
    """A family's row.

    Configuration: `required` and `optional` are the keys that have a meaning for it; `unneeded` says of others why they
    have none. `variant_of`: no adapter_type of its own but that one with the key `switch` set. `on_output`: it
    changes what a module writes, and needs that alone; else it works on what the module reads.
    `default_targets`: target_modules where they are not named; `default_input_factors`: feedforward_modules likewise.
    `even_rank`, `not_over_quantised`: why the rank must be even, why there must be no 4- or 8-bit weights; "" where not.
    `block_size`: the key that must divide a module's inputs.
    `not_above_outputs`: why the rank must not be above a module's outputs; "" where it may.

    Training: `small`, its matrices whose products with a layer's states are [T, R]; `fast`, those to which LoRA+ gives the
    higher rate, which is what begins at zero. `by_peft`: PEFT's own layers run it.

    Files: `saved_as`: the family in whose form it is saved, whose row says the rest. `peft_type` and `tensors` (a tensor's name
    in training → in the file); `settings`: its keys of PEFT's configuration; `harmless`: those keys, and others of its
    type, that change nothing about a trained adapter.

    Fold: `rule` is what it does to a weight, `undoing` what takes it out again, `not_undone` why nothing does; `bias_rule` and
    `bias_undoing` are the same of a bias, with # for the adapter's place. `has_strength`: --scale has a meaning.
    `additive`: it is W + s·B·M with a small M, which every reader of LoRAs applies.
    """

    name: str
    computes: str
    card: str
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    unneeded: Mapping[str, str] = field(default_factory=dict)
    variant_of: AdapterType | None = None
    switch: str = ""
    on_output: bool = False
    default_targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    default_input_factors: tuple[str, ...] = ()
    even_rank: str = ""
    not_over_quantised: str = ""
    block_size: str = ""
    not_above_outputs: str = ""
    small: tuple[str, ...] = ()
    fast: tuple[str, ...] = ()
    by_peft: bool = False
    saved_as: str = ""
    peft_type: str = ""
    tensors: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    harmless: frozenset[str] = frozenset()
    rule: str = ""
    undoing: str = ""
    not_undone: str = ""
    bias_rule: str = ""
    bias_undoing: str = ""
    has_strength: bool = False
    additive: bool = False

    @property
    def is_pairs(self) -> bool:
        """Whether it is saved as an A and a B for each module and nothing else."""
        return set(self.tensors) == {"A", "B"}


_PAIR = {"A": "lora_A.weight", "B": "lora_B.weight"}
_LORA_SETTINGS = {
    "r": Key("lora_rank"),
    "lora_alpha": Key("lora_alpha"),
    "lora_dropout": Key("lora_dropout"),
    "bias": "none",
    "use_rslora": Key("use_rslora"),
    "use_dora": False,
    "fan_in_fan_out": False,
    "init_lora_weights": True,
}
_LORA_HARMLESS = frozenset(
    [
        "alpha_pattern",
        "ensure_weight_tying",
        "eva_config",
        "init_lora_weights",
        "lora_alpha",
        "lora_bias",
        "lora_dropout",
        "megatron_core",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "target_parameters",
        "use_dora",
        "use_rslora",
    ]
)

_ROWS = (
    Family(
        MULTIPLICATIVE,
        computes="h' = h + s·B·A·h on the module's output",
        card="a multiplicative LoRA, h' = h + s·B·A·h on a module's output h",
        required=("lora_rank", "lora_alpha"),
        optional=("lora_dropout", "rank_pattern", "alpha_pattern", "composite_weight_decay", "scale_weight_norms"),
        on_output=True,
        default_targets=("down_proj",),
        small=("A",),
        fast=("B",),
        peft_type="PEANUT",
        tensors={"A": "peanut_A.weight", "B": "peanut_B.weight"},
        settings={
            "r": Key("lora_rank"),
            "depth": 0,
            "act_fn": "linear",
            "scaling": Key("scaling"),
            "init_weights": True,
        },
        rule="W + s#·B#·(A#·W)",
        undoing="W + s#·B̃#·(A#·W)",
        bias_rule="b' = b + s·B·A·b",
        bias_undoing="b' = b + s·B̃·A·b",
        has_strength=True,
        additive=True,
    ),
    Family(
        "control_adapter",
        computes="h' = h + Q·diag(e^S − 1)·Qᵀ·h, QᵀQ = I",
        card="a control adapter, h' = h + Q·diag(e^S − 1)·Qᵀ·h on a module's output h, saved as h + s·B·A·h",
        required=("lora_rank",),
        optional=("lora_dropout",),
        unneeded={"lora_alpha": "its scaling is 1, S alone says how strong it is. Remove it"},
        on_output=True,
        default_targets=("down_proj",),
        not_above_outputs="which are all the directions there are",
        small=("Q",),
        saved_as=MULTIPLICATIVE,
    ),
    Family(
        LORA,
        computes="W + s·B·A",
        card="a LoRA, W' = W + s·B·A",
        required=("lora_rank", "lora_alpha"),
        optional=(
            *("lora_dropout", "use_rslora", "use_dora", "init_lora_weights", "rank_pattern", "alpha_pattern"),
            *("composite_weight_decay", "scale_weight_norms", "target_parameters"),
        ),
        small=("A",),
        fast=("B",),
        by_peft=True,
        peft_type="LORA",
        tensors=_PAIR,
        settings=_LORA_SETTINGS,
        harmless=_LORA_HARMLESS,
        rule="W + s#·B#·A#",
        undoing="W - s#·B#·A#",
        has_strength=True,
        additive=True,
    ),
    Family(
        "moslora",
        computes="W + s·B·M·A",
        card="a MoSLoRA, W' = W + s·B·M·A, saved as the LoRA with B·M",
        required=("lora_rank", "lora_alpha"),
        optional=("lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"),
        small=("A", "M"),
        fast=("B", "M"),
        saved_as=LORA,
    ),
    Family(
        "flora",
        computes="W + s·B·G·A, the core G alone zero at first",
        card="a FLoRA, W' = W + s·B·G·A, saved as the LoRA with B·G",
        required=("lora_rank", "lora_alpha"),
        optional=("lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"),
        small=("A", "M"),
        fast=("M",),
        saved_as=LORA,
    ),
    Family(
        "dora",
        computes="m/‖W + s·B·A‖ ⊙ (W + s·B·A), m a trained magnitude for each row",
        card="a DoRA, W + s·B·A with a trained magnitude for each row",
        variant_of="lora",
        switch="use_dora",
        small=("A",),
        fast=("B",),
        peft_type="LORA",
        tensors={**_PAIR, "lora_magnitude_vector": "lora_magnitude_vector"},
        settings={**_LORA_SETTINGS, "use_dora": True},
        harmless=_LORA_HARMLESS,
        rule="m#/‖W + s#·B#·A#‖ ⊙ (W + s#·B#·A#)",
        not_undone="gives every row a length of its own: the lengths the base had are not in the adapter",
        has_strength=True,
    ),
    Family(
        "ia3",
        computes="a factor for each output",
        card="(IA)³, a factor for each output",
        optional=("feedforward_modules",),
        default_targets=("k_proj", "v_proj", "down_proj"),
        default_input_factors=("down_proj",),
        by_peft=True,
        peft_type="IA3",
        tensors={"ia3_l": "ia3_l"},
        settings={"feedforward_modules": Key("feedforward_modules"), "fan_in_fan_out": False},
        harmless=frozenset({"feedforward_modules", "init_ia3_weights"}),
        rule="l# ⊙ W",
        undoing="W / l#",
        bias_rule="b' = l·b",
        bias_undoing="b' = b / l",
    ),
    Family(
        "oft",
        computes="the input rotated in blocks",
        card="OFT, the inputs rotated in blocks",
        required=("oft_block_size",),
        block_size="oft_block_size",
        by_peft=True,
        peft_type="OFT",
        tensors={"oft_R": "oft_R.weight"},
        settings={
            "r": 0,
            "oft_block_size": Key("oft_block_size"),
            "module_dropout": 0.0,
            "bias": "none",
            "coft": False,
            "block_share": False,
            "use_cayley_neumann": True,
            "num_cayley_neumann_terms": 5,
            "fan_in_fan_out": False,
            "peft_version": "0.18.0",  # the first with this form of the series; PEFT warns without it
        },
        harmless=frozenset(
            [
                "block_share",
                "eps",
                "init_weights",
                "module_dropout",
                "num_cayley_neumann_terms",
                "oft_block_size",
                "r",
                "use_cayley_neumann",
            ]
        ),
        rule="W·R#ᵀ",
        undoing="W·R#⁻ᵀ",
    ),
    Family(
        "boft",
        computes="the input rotated in butterfly blocks",
        card="BOFT, the inputs rotated in butterfly blocks",
        required=("boft_block_size",),
        block_size="boft_block_size",
        peft_type="BOFT",
        tensors={"boft_R": "boft_R", "boft_s": "boft_s"},
        settings={
            "boft_block_size": Key("boft_block_size"),
            "boft_block_num": 0,
            "boft_n_butterfly_factor": 1,
            "boft_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
        },
        harmless=frozenset(
            {"boft_block_num", "boft_block_size", "boft_dropout", "boft_n_butterfly_factor", "init_weights"}
        ),
        rule="s# ⊙ (W·R#ᵀ)",
        undoing="(W / s#)·R#⁻ᵀ",
    ),
    Family(
        "hra",
        computes="the input reflected",
        card="HRA, the inputs reflected",
        required=("lora_rank",),
        even_rank="reflections are initialised in pairs that cancel",
        not_over_quantised="over quantised weights PEFT, for which it is saved, computes garbage without an error",
        small=("hra_u",),
        peft_type="HRA",
        tensors={"hra_u": "hra_u"},
        settings={"r": Key("lora_rank"), "apply_GS": False, "bias": "none"},
        harmless=frozenset({"apply_GS", "init_weights", "r"}),
        rule="W·Π(I - 2·u#·u#ᵀ)",
        undoing="W·Π(I - 2·u#·u#ᵀ) backwards",
    ),
    Family(
        PEFT,  # one of many; what each is, pipeline/peft/types.py says
        computes="a type of PEFT's own, with PEFT's keys, in the table [peft]",
        card="an adapter of one of PEFT's own types",
        required=("peft",),
        optional=("lora_dropout",),
        by_peft=True,
        rule="W as PEFT's own layer merges it",
        not_undone="is merged by PEFT's own layer, of which no inverse is known here",
    ),
)
FAMILIES: Mapping[str, Family] = {row.name: row for row in _ROWS}
CONFIGURED: Mapping[str, Family] = {name: row for name, row in FAMILIES.items() if row.variant_of is None}
SAVED: Mapping[str, Family] = {name: row for name, row in FAMILIES.items() if not row.saved_as}
KINDS: tuple[Kind, ...] = (MULTIPLICATIVE, LORA)


def chosen(adapter_type: str, values: Mapping[str, Any]) -> Family:
    """The family that a configuration asks for. `values`: its keys, of which one may make the type another family."""
    variants = [row for row in FAMILIES.values() if row.variant_of == adapter_type and values.get(row.switch)]
    return variants[0] if variants else FAMILIES[adapter_type]


def saved(family: Family) -> Family:
    """The row in whose form the family is saved."""
    return FAMILIES[family.saved_as] if family.saved_as else family


def settings(family: Family, values: Mapping[str, Any]) -> dict[str, Any]:
    """Its keys of PEFT's configuration. `values`: what the configuration's keys are, of those that the row names."""
    return {
        key: values[value.name] if isinstance(value, Key) else value for key, value in saved(family).settings.items()
    }
