"""The adapter families of docs/families.md, a row each: what a user types, what it computes, what it is for."""

from typing import NamedTuple


class Family(NamedTuple):
    """A row of the page: the keys that ask for it, what it computes, what it is for, what becomes of it."""

    keys: str
    computes: str
    use: str
    saved: str
    additive: str
    quantised: str
    folds: str = "yes"
    undone: str = "yes"


NOT_WRITTEN = "–: it is one already"
FAMILIES = [
    Family(
        "`multiplicative_lora`",
        "h' = h + s·B·A·h on a module's output h; W' = (I + s·B·A)·W",
        "What a module writes: style, voice, habits. The default.",
        "PEANUT",
        "yes",
        "4, 8",
    ),
    Family(
        "`control_adapter`",
        "h' = h + Q·diag(e^S − 1)·Qᵀ·h, QᵀQ = I",
        "A constrained variant: only amplifies or damps orthogonal directions, never reverses them, and −S undoes it.",
        "PEANUT",
        "yes",
        "4, 8",
    ),
    Family(
        "`lora`", "y' = y + s·B·A·x, s = alpha / R", "General use; every tool reads it.", "LORA", NOT_WRITTEN, "4, 8"
    ),
    Family(
        "`lora`, `use_rslora`",
        "the same, s = alpha / √R",
        "Ranks above 64, whose steps would else be too small.",
        "LORA",
        NOT_WRITTEN,
        "4, 8",
    ),
    Family(
        "`moslora`",
        "y' = y + s·B·M·A·x, M [R, R]",
        "LoRA whose R parts are mixed freely.",
        "LORA, B·M for B",
        NOT_WRITTEN,
        "4, 8",
    ),
    Family(
        "`flora`",
        "the same, M (its core G) zero and A, B random at first",
        "MosLoRA whose first steps move the core alone.",
        "LORA, B·G for B",
        NOT_WRITTEN,
        "4, 8",
    ),
    Family(
        "`lora`, `use_dora`",
        "y' = m/‖W + s·B·A‖ ⊙ (W + s·B·A)·x",
        "Low ranks that should come nearer to full tuning.",
        "LORA with magnitudes",
        "no",
        "4, 8",
        undone="no",
    ),
    Family(
        "`lora`, `init_lora_weights = 'pissa'`",
        "LoRA that starts as W's largest R singular directions and trains those",
        "Short runs: the first steps go further.",
        "LORA of rank 2R over the original base",
        NOT_WRITTEN,
        "no",
    ),
    Family(
        "`lora`, `init_lora_weights = 'pissa_niter_4'`",
        "the same, the directions found by subspace iterations",
        "PiSSA where a full SVD of every module takes too long.",
        "LORA of rank 2R over the original base",
        NOT_WRITTEN,
        "no",
    ),
    Family(
        "`lora`, `init_lora_weights = 'olora'`",
        "the same from W = Q·R, its first columns",
        "As PiSSA, started by a QR.",
        "LORA of rank 2R over the original base",
        NOT_WRITTEN,
        "no",
    ),
    Family(
        "`ia3`",
        "a factor for each output, or (`feedforward_modules`) each input",
        "The fewest numbers: many tasks, little data.",
        "IA3",
        "no",
        "4, 8",
    ),
    Family(
        "`oft`",
        "W·R, R of orthogonal blocks of the input (Cayley, 5 terms)",
        "Keeping angles between neurons; few numbers.",
        "OFT",
        "no",
        "4, 8",
    ),
    Family(
        "`boft`",
        "diag(s)·W·R, exactly orthogonal blocks",
        "As OFT, exact, with a factor for each output.",
        "BOFT",
        "no",
        "4, 8",
    ),
    Family(
        "`hra`",
        "W·H₁·…·H_R, reflections of the input",
        "Rotations at LoRA's cost, orthogonal however far they go.",
        "HRA",
        "no",
        "no",
    ),
    Family(
        "`peft`, table `[peft]`",
        "a type of PEFT's own, below",
        "What PEFT has beyond these: products of Hadamard and Kronecker, spectra, few entries, frozen random bases.",
        "PEFT's own",
        "no",
        "some",
        undone="no",
    ),
]
