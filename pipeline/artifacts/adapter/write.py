"""Adapters: what one is, and how one is written to disk.

Takes tensors under global names (`model.layers.3.mlp.down_proj.A` and `.B`) and the facts of their training; gives a
folder with `adapter_model.safetensors` and `adapter_config.json`, and no pickle. Kinds, with s = alpha / rank:

    multiplicative_lora   h' = h + s·B·A·h on a module's output h;  A [R, D_out], B [D_out, R];  W' = W + s·B·(A·W)
    lora                  y' = y + s·B·A·x, x the module's input;   A [R, D_in],  B [D_out, R];  W' = W + s·B·A

A multiplicative adapter is written as PEFT's `PEANUT` type (depth 0, linear): stock PEFT then loads, runs and merges it
correctly, and tools that know LoRA alone refuse it. As `LORA` they would take it, and be wrong on square layers.
PEANUT changes a module's weight and never its bias, so on a module with a bias it is not this function: such an adapter
is written under a type of ours, which PEFT refuses.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from pipeline import version
from pipeline.artifacts.adapter import full as full_tensors
from pipeline.artifacts.adapter.maps import RowMap
from pipeline.families import KINDS, LORA, MULTIPLICATIVE, Kind
from pipeline.files import atomic_folder, write_json
from pipeline.formats.dtypes import CODES
from pipeline.formats.safetensors import TensorSpec, tensor_bytes, write_safetensors
from pipeline.names import layers_of, loadable_name, natural_order, public_name

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
METADATA_KEY = "mulora_pipe"  # in the safetensors metadata: one JSON object with our own facts
FORMAT_VERSION = 1
OWN_TYPE = "MULTIPLICATIVE_LORA"
PEFT_PREFIX = "base_model.model."
NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Pair:
    """One module's adapter: A [R, D_in] or, multiplicative, [R, D_out]; B [D_out, R]; s, and where s comes from."""

    A: torch.Tensor
    B: torch.Tensor
    scaling: float
    origin: str  # such as "alpha / rank = 32 / 64"
    bias: torch.Tensor | None = None  # PEFT's lora_bias: of lora_B [D_out], so that b' = b + s·bias
    of_embedding: bool = False  # PEFT's lora_embedding_A and _B: of an embedding's [V, D], A is their Bᵀ and B their Aᵀ


@dataclass(frozen=True)
class Adapter:
    """An adapter as it was read. `kind` is None where the files leave it open (type LORA, not written by us).

    `moves_bias`: where multiplicative, it was trained on the whole output, bias included, so that b' = b + s·B·A·b.
    `family`: one of peft_files.FAMILIES where it is no pairs; then `maps` has each module's, and `pairs` is empty.
    `full`: tensors that were trained in full, by their names in the model; of a tied head and embedding both. `keeps_tie`:
    PEFT's word that the two were trained as one tensor, should the file hold one of them alone. `trained_over`: of an
    adapter of ours that was trained over quantised weights, how they were (`write_adapter`); None where nothing says so.
    `copied`: those of `full` that nothing announces: the embedding or head that PEFT saves along where the vocabulary was
    resized or one of the two is adapted, mostly the base's own values. `base_fingerprint`: of the base that an adapter of ours
    was trained on (formats/fingerprint.py), where it says.
    """

    folder: Path
    kind: Kind | None
    pairs: dict[str, Pair]
    moves_bias: bool
    train_logit_scale: float
    base_model: str | None
    family: str | None = None
    maps: dict[str, tuple[RowMap, ...]] = field(default_factory=dict)
    full: dict[str, torch.Tensor] = field(default_factory=dict)
    keeps_tie: bool = False
    trained_over: dict[str, Any] | None = None
    copied: frozenset[str] = frozenset()
    base_fingerprint: str | None = None

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(self.maps if self.family else self.pairs)


def save_adapter(folder: Path, tensors: Mapping[str, torch.Tensor], *, replace: bool = False, **arguments: Any) -> None:
    """Write an adapter to `folder`, which appears whole or not at all. Arguments are those of `write_adapter`.

    Raises UserError where `folder` has something in it (unless `replace`) or the disk is full (exit code 28).
    """
    with atomic_folder(folder, replace=replace) as temporary:
        write_adapter(temporary, tensors, **arguments)


def write_adapter(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    kind: Kind,
    rank: int,
    alpha: float,
    dropout: float,
    base_model: str,
    train_logit_scale: float,
    biased_targets: bool,
    facts: Mapping[str, Any] | None = None,
    use_rslora: bool = False,
    full: Mapping[str, torch.Tensor] = NOTHING,
    tied: Mapping[str, str] = NOTHING,
    trained_over: Mapping[str, Any] | None = None,
    base_fingerprint: str | None = None,
) -> None:
    """Write an adapter's two files into `folder`, which exists without them and is the caller's to put in place.

    `tensors`: `<module>.A` and `<module>.B` for every module, floating point, of the shapes above with R = `rank`.
    `base_model`: the name or path it was trained on. Of a path the metadata has the last part alone, as adapters get shared;
    the configuration says all of it, so that PEFT finds the base on this machine (an upload writes the name there).
    `biased_targets`: whether any of the modules has a bias. `facts`: more for the metadata (JSON values).
    `use_rslora`: s = alpha / √rank (rsLoRA, arXiv 2312.03732); of a LoRA only. `full`: weights of the model that were
    trained whole, by their names in it; `tied`: another name of one of them, with that one's (adapter/full.py).
    `trained_over`: of a quantised base its `bits`, `quant_type`, `double_quant`, `skip` (modules left alone) and the `dtype`
    in which it was held before, for the fold to compare with what it is asked for. `base_fingerprint`: for the fold as well.
    Raises ValueError where a pair is incomplete or misshapen.
    """
    pairs = adapter_pairs(tensors)
    _check_shapes(pairs, kind, rank)
    scaling = alpha / math.sqrt(rank) if use_rslora else alpha / rank
    name = public_name(base_model)
    own = {
        **(facts or {}),
        "format_version": FORMAT_VERSION,
        "version": version.full(),
        "kind": kind,
        "rank": rank,
        "alpha": alpha,
        "scaling": scaling,
        "dropout": dropout,
        "train_logit_scale": train_logit_scale,
        "base_model": name,
        "biased_targets": biased_targets,
        "modules": list(pairs),
        "layers": layers_of(pairs),
        "trained_over": trained_over,
        "base_fingerprint": base_fingerprint,
        **full_tensors.for_metadata(full, tied),
    }
    config: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": loadable_name(base_model),
        "inference_mode": True,
        "r": rank,
        "target_modules": list(pairs),
    }
    if kind == LORA:
        config |= _of_lora(alpha, dropout, use_rslora)
    else:
        config |= _of_peanut(scaling, biased_targets)
    config |= full_tensors.for_config(full, tied, config["peft_type"])
    stored = _names_in_file(pairs, kind)
    stored |= {f"{PEFT_PREFIX}{name}": tensor for name, tensor in full_tensors.named(full, tied).items()}
    specs = [TensorSpec(name, CODES[tensor.dtype], tuple(tensor.shape)) for name, tensor in stored.items()]
    metadata = {"format": "pt", METADATA_KEY: json.dumps(own)}
    write_safetensors(folder / WEIGHTS_FILE, specs, lambda name: [tensor_bytes(stored[name])], metadata)
    write_json(folder / CONFIG_FILE, config)


def _of_lora(alpha: float, dropout: float, use_rslora: bool) -> dict[str, Any]:
    """PEFT's keys of a LoRA."""
    return {
        "peft_type": "LORA",
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "bias": "none",
        "use_rslora": use_rslora,
        "use_dora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def _of_peanut(scaling: float, biased_targets: bool) -> dict[str, Any]:
    """PEFT's keys of a multiplicative adapter."""
    peft_type = OWN_TYPE if biased_targets else "PEANUT"
    return {"peft_type": peft_type, "depth": 0, "act_fn": "linear", "scaling": scaling, "init_weights": True}


def _names_in_file(pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]], kind: Kind) -> dict[str, torch.Tensor]:
    """A and B of every module under the names that PEFT looks for."""
    stem = "lora" if kind == LORA else "peanut"
    return {
        f"{PEFT_PREFIX}{module}.{stem}_{letter}.weight": tensor
        for module, pair in pairs.items()
        for letter, tensor in zip("AB", pair, strict=True)
    }


def adapter_norms(tensors: Mapping[str, torch.Tensor], scaling: float) -> dict[str, float]:
    """‖s·B·A‖_F of every module, `tensors` as for `write_adapter`, all on one device. One transfer to the host.

    ‖BA‖² = tr(AᵀBᵀBA) = Σ (BᵀB) ⊙ (AAᵀ): two R×R products, never a D×D one.
    """
    pairs = adapter_pairs(tensors)
    if not pairs:
        return {}
    squares = []
    for A, B in pairs.values():
        A32, B32 = A.detach().float(), B.detach().float()
        squares.append(((B32.T @ B32).double() * (A32 @ A32.T).double()).sum())
    norms = torch.stack(squares).clamp(min=0).sqrt() * abs(scaling)
    return dict(zip(pairs, norms.tolist(), strict=True))


def adapter_pairs(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """`<module>.A` and `<module>.B` as {module: (A, B)}, modules in natural order (layer 2 before layer 10)."""
    modules = {name[:-2] for name in tensors if name.endswith((".A", ".B"))}
    wanted = {f"{module}.{letter}" for module in modules for letter in "AB"}
    if wanted != set(tensors):
        raise ValueError(f"adapter tensors are not pairs <module>.A, <module>.B: {sorted(wanted ^ set(tensors))[:4]}")
    return {m: (tensors[f"{m}.A"], tensors[f"{m}.B"]) for m in sorted(modules, key=natural_order)}


def _check_shapes(pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]], kind: Kind, rank: int) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is none of {KINDS}")
    if not pairs or rank < 1:
        raise ValueError("an adapter needs a module and a rank of at least 1")
    for module, (A, B) in pairs.items():
        fits = A.dim() == B.dim() == 2 and A.shape[0] == B.shape[1] == rank
        if kind == MULTIPLICATIVE:
            fits = fits and A.shape[1] == B.shape[0]
        if not fits or not (A.is_floating_point() and B.is_floating_point()):
            raise ValueError(f"{module}: A {tuple(A.shape)} and B {tuple(B.shape)} are no {kind} of rank {rank}")
        if not math.isfinite(float(A.float().abs().sum() + B.float().abs().sum())):
            raise ValueError(f"{module}: the adapter holds NaN or infinite values")
