"""PEFT's own types of adapters: which of them train over stages with `adapter_type = 'peft'`, and why the others do not.

A type is a row of LOCAL if all it needs of a module is the module, its weight, and numbers that can be made anew from a key:
then a stage that has the module has the adapter. Torch-free and without PEFT, which pipeline/peft/layers.py alone imports.
What was tried of each type: docs/families.md.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

PEFT = "peft"  # the family's name in pipeline/families.py, and the table's in a configuration


@dataclass(frozen=True)
class PeftType:
    """A row.

    `computes`: in a formula. `start`: what of a module changes before the first step; "" where nothing does. `prefix`: how
    its tensors' names begin in a file. `dropout`: its key for what is lora_dropout here; "" where it has none. `changes`: of a
    module. `own`: keys that are set here; `refused`: keys that would compute something else here, and why.

    `quantised`: over 4- and 8-bit weights it computes what it does over the dequantised ones. `dtype`: of its trained numbers;
    'base' where it multiplies them with the layer's states as they are. `projections`: frozen tensors that all its modules
    share, made from a key and as wide as the widest of them. `only_fp32`: PEFT does not make it of fp64, which then cannot
    check its fold. `ranked`: its budget of ranks is shared out among all modules while it trains (training/optim/adalora.py), and
    what is left of each is in its rank_pattern. `keys`: PEFT's that have a meaning for it, where its configuration has more;
    `of_training`: those that say nothing about a trained adapter. `shared`: how the names of trained tensors begin that several
    modules share, each stage with a copy whose gradient is that of all.
    """

    name: str
    computes: str
    prefix: str
    start: str = ""
    dropout: str = ""
    quantised: bool = False
    dtype: Literal["any", "base", "float32"] = "any"
    projections: tuple[str, ...] = ()
    changes: Literal["weight", "bias", "both"] = "weight"
    own: Mapping[str, Any] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    only_fp32: bool = False
    ranked: bool = False
    shared: str = ""
    keys: tuple[str, ...] = ()
    of_training: tuple[str, ...] = ()


class Asked(NamedTuple):
    """A type with PEFT's keys for it, patterns included; the shapes of its modules' weights, in the model's order; and the first
    of these without a bias, "" if there is none."""

    type: str
    settings: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, int]]
    unbiased: str = ""

    @property
    def not_folded(self) -> str:
        """Why no fold of it is to come; "" where one is."""
        if LOCAL[self.type].changes == "bias" and self.unbiased:
            return f"PEFT's {self.type} is merged into biases, and {self.unbiased} has none"
        return ""


# By PEFT's key of patterns, the key whose value they give for some modules.
PATTERNS = {
    "rank_pattern": "r",
    "alpha_pattern": "alpha",
    "n_frequency_pattern": "n_frequency",
    "block_size_pattern": "block_size",
    "lambda_pattern": "delora_lambda",
}
# Keys of [peft] that are decided elsewhere, with what says it.
OURS = {
    "target_modules": "target_modules above the tables",
    "exclude_modules": "target_modules above the tables",
    "layers_to_transform": "layers_to_transform above the tables",
    "layers_pattern": "layers_to_transform above the tables",
    "modules_to_save": "trainable_modules above the tables",
    "bias": "trainable_modules above the tables",
    "peft_type": "type",
    "task_type": "the trainer",
    "inference_mode": "the trainer",
    "base_model_name_or_path": "model above the tables",
    "revision": "model above the tables",
    "auto_mapping": "the trainer",
    "runtime_config": "the trainer",
    "peft_version": "the trainer",
    "fan_in_fan_out": "the model",
    "save_projection": "the trainer: the projections are made from projection_prng_key wherever the adapter is loaded",
}
_FROM_KEY: Mapping[str, Any] = {"save_projection": False}
_SCHEDULE = ("target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step")
_ROWS = (
    PeftType(
        "ADALORA",
        "W + α/R·B·diag(E)·A, triplets dropped by a budget",
        "lora_",
        dropout="lora_dropout",
        quantised=True,
        refused={"r": "its rank at first is init_r", "rank_pattern": "which triplets are kept is decided in training"},
        ranked=True,
        keys=("init_r", "lora_alpha", "lora_dropout", "init_lora_weights", *_SCHEDULE),
        of_training=("init_lora_weights", *_SCHEDULE),
    ),
    PeftType("BEFT", "h + b", "beft_", quantised=True, changes="bias"),
    PeftType(
        "C3A",
        "W + ΔW, ΔW of circulant blocks",
        "c3a_",
        start="random blocks, unless init_weights says otherwise",
        quantised=True,
    ),
    PeftType("DEFT", "W − Q·Qᵀ·W + Q·R, Q an orthonormal basis of P", "deft_", dropout="deft_dropout"),
    PeftType("DELORA", "W + λ/r·‖W‖·B̂·Â, columns and rows of length 1", "delora_", dtype="base"),
    PeftType(
        "FOURIERFT",
        "W + α·IDFT(c), c few entries of a spectrum",
        "fourierft_",
        start="a random spectrum, unless init_weights = true",
        quantised=True,
    ),
    PeftType("GLORA", "W + W ⊙ A + B, and the bias", "glora_", changes="both"),
    PeftType("GRALORA", "W + blocks of B·A", "gralora_", dropout="gralora_dropout", quantised=True),
    PeftType("HIRA", "W + W ⊙ (B·A)", "hira_", dropout="hira_dropout", quantised=True),
    PeftType("LOHA", "W + s·(B₁·A₁) ⊙ (B₂·A₂)", "hada_"),
    PeftType("LOKR", "W + s·C ⊗ (B·A)", "lokr_"),
    PeftType("MISS", "W + one small block, repeated", "miss_", dropout="miss_dropout", quantised=True),
    PeftType(
        "OSF",
        "the smaller singular directions of W, trained apart from the larger ones",
        "osf_",
        dtype="base",
        refused={
            "rank_pattern": "ranks that differ by module are not built for OSF",
            "target_svd_config": "ranks that differ by module are not built for OSF",
        },
    ),
    PeftType(
        "PEANUT",
        "W + s·f(W), f a small network",
        "peanut_",
    ),
    PeftType(
        "PSOFT",
        "W − B·A + B·R·A, R orthogonal within W's first singular directions",
        "psoft_",
        dropout="psoft_dropout",
        only_fp32=True,
    ),
    PeftType(
        "PVERA",
        "VeRA whose vector d is drawn around a trained mean",
        "pvera_lambda_",
        dropout="pvera_dropout",
        quantised=True,
        dtype="float32",
        projections=("pvera_A", "pvera_B"),
        own=_FROM_KEY,
        refused={"generator_seed": "a layer that is recomputed for its backward would draw other numbers than before"},
    ),
    PeftType(
        "RANDLORA",
        "W + Σ Λᵢ·Bᵢ·Γᵢ·Aᵢ, B and A random and frozen",
        "randlora_",
        dropout="randlora_dropout",
        quantised=True,
        projections=("randlora_A", "randlora_B"),
        own=_FROM_KEY,
    ),
    PeftType("ROAD", "pairs of outputs rotated and scaled", "road_", quantised=True, changes="both"),
    PeftType(
        "SHIRA",
        "W + a few entries, drawn by random_seed",
        "shira_",
        quantised=True,
        refused={"mask_type": "a mask of one's own is a Python function, which no file has"},
    ),
    PeftType(
        "SUPERTUNING",
        "W + its largest (or smallest) entries' changes, and s·B·A with r",
        "supertuning_",
        dropout="lora_dropout",
        own={"save_precomputed_indices": True},
    ),
    PeftType(
        "VERA",
        "W + diag(b)·B·diag(d)·A, B and A random, frozen, and one for all modules",
        "vera_lambda_",
        dropout="vera_dropout",
        quantised=True,
        dtype="float32",
        projections=("vera_A", "vera_B"),
        own=_FROM_KEY,
    ),
    PeftType(
        "TINYLORA",
        "W + B·(Σ vᵢ·Pᵢ)·A, B and A of W's first singular directions, v shared by weight_tying",
        "tinylora_",
        dropout="tinylora_dropout",
        shared="tinylora_v",
    ),
    PeftType(
        "UNILORA",
        "W + B·A, whose numbers are those of one vector, dealt out by proj_seed",
        "unilora_",
        start="A and B from one random vector",
        dropout="unilora_dropout",
        own={"save_indices": False},
        shared="unilora_theta_d",
    ),
    PeftType(
        "VBLORA",
        "W + B·A, of vectors of one bank, mixed by the largest of trained logits",
        "vblora_",
        start="A and B from a random bank",
        dropout="vblora_dropout",
        refused={"save_only_topk_weights": "what is saved of the logits then cannot be trained on"},
        shared="vblora_vector_bank",
    ),
    PeftType(
        "WAVEFT",
        "W + α·IDWT(c), c few wavelet coefficients",
        "waveft_",
        quantised=True,
        refused={"proportional_parameters": "a module's share would depend on which others are on its stage"},
    ),
)
LOCAL: Mapping[str, PeftType] = {row.name: row for row in _ROWS}
SHARED: tuple[str, ...] = tuple(row.shared for row in _ROWS if row.shared)

_PROMPTS = "it trains tokens or a prefix before the prompt, and is no adapter of a module"
# Types of PEFT's that are not trained, with the reason and what to do.
REFUSED: Mapping[str, str] = {
    "LORA": "set adapter_type = 'lora', which runs PEFT's layer",
    "IA3": "set adapter_type = 'ia3', which runs PEFT's layer",
    "OFT": "set adapter_type = 'oft', which runs PEFT's layer",
    "BOFT": "set adapter_type = 'boft', which is saved as PEFT's",
    "HRA": "set adapter_type = 'hra', which is saved as PEFT's",
    "ADAMSS": "it needs scikit-learn, and its subspaces are shared out among all layers",
    "FROD": "its frozen basis is made of all layers' weights, and a stage has its own alone",
    "LILY": "its layers share A and B, whichever stage they are on, and PEFT cannot merge it",
    "LN_TUNING": "it trains norms in full; name them in trainable_modules, beside an adapter of another type (merge_lora.py "
    "folds those of others)",
    "POLY": "it chooses its parts by a task's number, which no dataset here has",
    "SHADOW": "it runs a second network beside the model, through all layers",
    "TRAINABLE_TOKENS": "it trains rows of the embedding; set trainable_modules = ['embed_tokens']",
    "XLORA": "it mixes adapters by a forward pass of the whole model with its last hidden state: every micro-batch would go "
    "twice through all stages, with a message from the last to the first between",
    **dict.fromkeys(
        (
            "ADAPTION_PROMPT",
            "CARTRIDGE",
            "CPT",
            "MULTITASK_PROMPT_TUNING",
            "PREFIX_TUNING",
            "PROMPT_TUNING",
            "P_TUNING",
        ),
        _PROMPTS,
    ),
}


def is_shared(name: str) -> bool:
    """Whether a trained tensor of this name is one that several modules share."""
    return name.partition(".")[0] in SHARED


def known(value: str) -> str:
    """PEFT's name of the type `value`, in any case and with '-' for '_'; ValueError with the reason where it is refused."""
    name = value.upper().replace("-", "_")
    if reason := REFUSED.get(name):
        raise ValueError(f"PEFT's {name} does not train here: {reason}")
    if name not in LOCAL:
        raise ValueError(f"should be a type of PEFT's that is local to a module: {', '.join(LOCAL)}")
    return name


def conflicts(table: Mapping[str, Any], *, quantised: bool, dropout: float, dtypes: tuple[str, str]) -> Iterator[str]:
    """What is wrong with [peft] before PEFT is asked. `table`: its keys, of a known type; `dtypes`: of adapter and model."""
    row = LOCAL[table["type"]]
    for key in table:
        if key in row.own or (key in OURS and not (key == "bias" and table[key] == "none")):
            yield f"peft.{key}: decided by {OURS.get(key, 'the trainer')}; remove it"
        elif reason := row.refused.get(key):
            yield f"peft.{key}: {reason}; remove it"
        elif key == row.dropout:
            yield f"peft.{key}: set lora_dropout above the tables instead"
        elif row.keys and key not in (*row.keys, "type"):
            yield f"peft.{key}: has no meaning for PEFT's {row.name}, which takes {', '.join(row.keys)}; remove it"
    if row.name == "PEANUT" and table.get("depth", 0) == 0 and table.get("act_fn", "relu") == "linear":
        yield "peft.type: PEANUT of depth 0 with act_fn = 'linear' is adapter_type = 'multiplicative_lora'"
    if quantised and not row.quantised:
        able = ", ".join(name for name, other in LOCAL.items() if other.quantised)
        yield f"peft.type: PEFT's {row.name} reads the weight itself, which 4 or 8 bits do not show; over these take {able}"
    wanted = dtypes[0] if row.dtype == "any" else dtypes[1] if row.dtype == "base" else row.dtype
    if wanted != dtypes[0]:
        why = (
            "multiplies its numbers with the layer's states as they are"
            if row.dtype == "base"
            else "is frozen in float32"
        )
        yield f"lora_weight_dtype: PEFT's {row.name} {why}; set '{wanted}', not '{dtypes[0]}'"
    if dropout and not row.dropout:
        yield f"lora_dropout: PEFT's {row.name} has no dropout of what it reads; remove it"


def settings_of(table: Mapping[str, Any], dropout: float) -> dict[str, Any]:
    """PEFT's own keys, of a table [peft] and what is decided beside it."""
    row = LOCAL[table["type"]]
    keys = {key: value for key, value in table.items() if key not in ("type", "bias")}
    return {**keys, **row.own, **({row.dropout: dropout} if row.dropout and dropout else {})}
