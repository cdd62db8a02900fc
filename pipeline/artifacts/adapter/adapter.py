"""What an adapter is, in memory, and what its files are called.

Two kinds are pairs of A and B for each module, with s = alpha / rank:

    multiplicative_lora   h' = h + s·B·A·h on a module's output h;  A [R, D_out], B [D_out, R];  W' = W + s·B·(A·W)
    lora                  y' = y + s·B·A·x, x the module's input;   A [R, D_in],  B [D_out, R];  W' = W + s·B·A

The other families are maps of a weight's rows (maps.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pipeline.artifacts.adapter.maps import WeightMap
from pipeline.families import Kind
from pipeline.formats.experts import ExpertWeights, Stack
from pipeline.names import natural_order

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
METADATA_KEY = "mulora_pipe"  # in the safetensors metadata: one JSON object with our own facts
FORMAT_VERSION = 1
OWN_TYPE = "MULTIPLICATIVE_LORA"  # our type for what PEANUT would leave out (write.py)
PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Pair:
    """One module's adapter: A [R, D_in] or, multiplicative, [R, D_out]; B [D_out, R]; s, and where s comes from.

    Of a tensor with a matrix for each of E experts, of a LoRA only: A [E, R, D_in], B [E, D_out, R]."""

    A: torch.Tensor
    B: torch.Tensor
    scaling: float
    origin: str  # such as "alpha / rank = 32 / 64"
    bias: torch.Tensor | None = None  # PEFT's lora_bias: of lora_B [D_out], so that b' = b + s·bias
    of_embedding: bool = False  # PEFT's lora_embedding_A and _B: of an embedding's [V, D], A is their Bᵀ and B their Aᵀ


@dataclass(frozen=True)
class OfParameters:
    """LoRAs of parameters (PEFT's target_parameters) as a file has them, which does not name the parameter (parameters.py).

    `names`: of the parameters, or the ends of these; `pairs`: A and B by the module that the file names; `scaling`: of a
    parameter's full name and the rank of its pairs, s and where it comes from.
    """

    names: tuple[str, ...]
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]
    scaling: Callable[[str, int], tuple[float, str]]


@dataclass(frozen=True)
class Adapter:
    """An adapter as it was read. `kind` is None where the files leave it open (type LORA, not written by us).

    `moves_bias`: where multiplicative, it was trained on the whole output, bias included, so that b' = b + s·B·A·b.
    `family`: one of families.FAMILIES where it is no pairs; then `maps` has each module's, and `pairs` is empty.
    `full`: tensors that were trained in full, by their names in the model; of a tied head and embedding both. `keeps_tie`:
    PEFT's word that the two were trained as one tensor, should the file hold one of them alone. `trained_over`: of an
    adapter of ours that was trained over quantised weights, how they were (`write_adapter`); None where nothing says so.
    `copied`: those of `full` that nothing announces: the embedding or head that PEFT saves along where the vocabulary was
    resized or one of the two is adapted, mostly the base's own values. `base_fingerprint`: of the base that an adapter of ours
    was trained on (formats/fingerprint.py), where it says. `experts`: those modules that are a layer's experts, with what these
    write with in the running model; `stops`: ids at which the model learned to stop, beside those at which its base does;
    `stacks`: where that lies, once the adapter is in the form of its base (stored_form.py). `of_parameters`: LoRAs of which the
    base has to say what they are of.
    """

    folder: Path
    kind: Kind | None
    pairs: dict[str, Pair]
    moves_bias: bool
    train_logit_scale: float
    base_model: str | None
    family: str | None = None
    maps: dict[str, tuple[WeightMap, ...]] = field(default_factory=dict)
    full: dict[str, torch.Tensor] = field(default_factory=dict)
    keeps_tie: bool = False
    trained_over: dict[str, Any] | None = None
    copied: frozenset[str] = frozenset()
    base_fingerprint: str | None = None
    experts: dict[str, ExpertWeights] = field(default_factory=dict)
    stacks: dict[str, Stack] = field(default_factory=dict)
    stops: tuple[int, ...] = ()
    of_parameters: OfParameters | None = None

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(self.maps if self.family else self.pairs)


def adapter_norms(tensors: Mapping[str, torch.Tensor], scaling: float) -> dict[str, float]:
    """‖s·B·A‖_F of every module, `tensors` as for `write_adapter`, all on one device. One transfer to the host.

    ‖BA‖² = tr(AᵀBᵀBA) = Σ (BᵀB) ⊙ (AAᵀ): two R×R products, never a D×D one. Of pairs [E, R, D] and [E, D, R] of all E together.
    """
    pairs = adapter_pairs(tensors)
    if not pairs:
        return {}
    squares = []
    for A, B in pairs.values():
        A32, B32 = A.detach().float(), B.detach().float()
        squares.append(((B32.mT @ B32).double() * (A32 @ A32.mT).double()).sum())
    norms = torch.stack(squares).clamp(min=0).sqrt() * abs(scaling)
    return dict(zip(pairs, norms.tolist(), strict=True))


def adapter_pairs(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """`<module>.A` and `<module>.B` as {module: (A, B)}, modules in natural order (layer 2 before layer 10)."""
    modules = {name[:-2] for name in tensors if name.endswith((".A", ".B"))}
    wanted = {f"{module}.{letter}" for module in modules for letter in "AB"}
    if wanted != set(tensors):
        raise ValueError(f"adapter tensors are not pairs <module>.A, <module>.B: {sorted(wanted ^ set(tensors))[:4]}")
    return {m: (tensors[f"{m}.A"], tensors[f"{m}.B"]) for m in sorted(modules, key=natural_order)}
