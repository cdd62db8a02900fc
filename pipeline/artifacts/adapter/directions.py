"""Direction vectors, and the adapters that remove or reflect them.

Takes a file of directions (.safetensors or .npy); gives, with V [k, D] the orthonormal basis of a layer's k directions
and f a factor, the tensors of a multiplicative adapter of rank k whose scaling is 1:

    abliteration   A = V,  B = −f·Vᵀ     h' = h − f·VᵀV·h     f = 1: nothing of the directions is left in h'
    householder    A = V,  B = −2f·Vᵀ    h' = h − 2f·VᵀV·h    f = 1: h mirrored; twice is the identity

The first with f = 1 is the directional ablation, and folded the weight orthogonalisation, of Arditi et al. 2024 (arXiv
2406.11717); the second is the reflection of Householder 1958. A file holds one tensor, [D] for all layers, [L, D] one
direction a layer, [L, k, D] several ([1, k, D]: the same for all); or, safetensors only, a tensor [D] or [k, D] for each
layer, named by its number: '3', 'layers.3' or 'model.layers.3'.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.console import UserError
from pipeline.files import atomic_file
from pipeline.foreign import printable, read_by_library
from pipeline.formats.choices import DirectionMethod
from pipeline.formats.dtypes import FLOATS
from pipeline.formats.safetensors import load_tensors, read_header, write_tensors

STRENGTHS: dict[DirectionMethod, float] = {
    "abliteration": 1.0,
    "householder": 2.0,
}  # times f: how much of V·h is taken off

_LAYER_NAME = re.compile(r"(?:(?:model\.)?layers\.)?(\d+)")


def read_directions(file: Path, layers: Iterable[int], n_layers: int, width: int) -> dict[int, Tensor]:
    """Of a model of `n_layers` layers and hidden size `width`: layer → its directions [k, D] in the dtype stored.

    Raises UserError where the file is neither format, or its tensors are not of the shapes above, with a layer missing.
    """
    tensors = _tensors(file)
    numbered = {name: match for name in tensors if (match := _LAYER_NAME.fullmatch(name))}
    if numbered and len(numbered) == len(tensors):
        by_layer = {int(match.group(1)): tensors[name] for name, match in numbered.items()}
        if len(by_layer) < len(tensors):
            raise UserError(f"{file} names a layer twice ({', '.join(sorted(numbered))}): keep one tensor a layer")
    elif len(tensors) == 1:
        by_layer = _split(file, next(iter(tensors.values())), n_layers)
    else:
        raise UserError(
            f"{file} holds {len(tensors)} tensors that are not named by layer ({', '.join(sorted(tensors)[:4])} …): give "
            "one tensor, or one a layer named '0', '1', …"
        )
    wanted = list(layers)
    if missing := [index for index in wanted if index not in by_layer]:
        raise UserError(
            f"{file} has no direction for layer {missing[0]} ({len(missing)} of {len(wanted)} layers asked for are "
            "missing): choose fewer with --layers, or add them"
        )
    found = {}
    for index in wanted:
        directions = by_layer[index]
        if directions.dim() not in (1, 2) or 0 in directions.shape:
            raise UserError(f"{file}: layer {index}: {list(directions.shape)} is neither [D] nor [k, D]")
        if directions.shape[-1] != width:
            raise UserError(
                f"{file}: layer {index}: directions of {directions.shape[-1]} numbers, but the model's hidden size is {width}"
            )
        found[index] = directions.reshape(-1, width)
    return found


def orthonormal(directions: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Layer → orthonormal rows [k, D] fp64 that span the layer's `directions` [k, D]; the first is the first's.

    Raises UserError for a direction that is zero or not finite, for directions that are linearly dependent to the
    precision of their dtype, and for layers with different k: an adapter has one rank.
    """
    counts = {len(rows) for rows in directions.values()}
    if len(counts) != 1:
        raise UserError(
            f"layers have different numbers of directions ({sorted(counts)}): an adapter has one rank, so give each as many"
        )
    return {index: _basis(index, rows) for index, rows in directions.items()}


def adapter_tensors(
    bases: Mapping[int, Tensor], modules: Mapping[str, int], method: DirectionMethod, factor: float
) -> dict[str, Tensor]:
    """`<module>.A` [k, D] and `<module>.B` [D, k] in fp32 for each of `modules` (name → layer), for a scaling of 1."""
    tensors = {}
    for module, layer in modules.items():
        V = bases[layer]
        tensors[f"{module}.A"] = V.float()
        tensors[f"{module}.B"] = (-STRENGTHS[method] * factor * V.T).float().contiguous()
    return tensors


def write_directions(file: Path, directions: Mapping[int, Tensor], *, replace: bool = False) -> None:
    """Write a tensor 'layers.<i>' for each layer, in its own dtype, to a safetensors file, whole or not at all.

    Raises UserError where `file` exists (unless `replace`) or the disk is full (exit code 28).
    """
    with atomic_file(file, replace=replace) as temporary:
        write_tensors(temporary, {f"layers.{index}": directions[index] for index in sorted(directions)}, replace=True)


def _tensors(file: Path) -> dict[str, Tensor]:
    """The floating-point tensors of a .safetensors, or the one array of a .npy under the name ''."""
    if not file.is_file():
        raise UserError(f"--directions: there is no file {file}")
    if file.suffix == ".npy":
        return {"": _array(file)}
    if file.suffix != ".safetensors":
        raise UserError(f"--directions: {file.name} is neither .safetensors nor .npy; pickles are not read")
    tensors = load_tensors(read_header(file))
    if not tensors:
        raise UserError(f"{file} holds no tensors")
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS.values():
            raise UserError(f"{file}: {name!r} is {tensor.dtype}; directions are float64, float32, float16 or bfloat16")
    return tensors


def _array(file: Path) -> Tensor:
    with read_by_library(f"{printable(file)} does not read as a .npy array"):
        array = np.load(file, allow_pickle=False)
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f" or array.dtype.itemsize > 8:
        kind = array.dtype if isinstance(array, np.ndarray) else "an archive of arrays"
        raise UserError(f"{file} holds {kind}; directions are an array of float64, float32 or float16")
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))


def _split(file: Path, tensor: Tensor, n_layers: int) -> dict[int, Tensor]:
    """One tensor for all layers, as one for each."""
    if tensor.dim() == 1:
        return dict.fromkeys(range(n_layers), tensor)
    if tensor.dim() in (2, 3) and tensor.shape[0] in (1, n_layers):
        return {index: tensor[index if len(tensor) > 1 else 0] for index in range(n_layers)}
    raise UserError(
        f"{file} holds one tensor of shape {list(tensor.shape)}. For this model's {n_layers} layers it is [D], "
        f"[{n_layers}, D] or [{n_layers}, k, D]; several directions that are the same for all layers are [1, k, D]"
    )


def _basis(index: int, rows: Tensor) -> Tensor:
    wide = rows.double()
    if not torch.isfinite(wide).all():
        raise UserError(f"layer {index}: a direction holds NaN or infinite values")
    largest = wide.abs().amax(dim=1, keepdim=True)
    if not (largest > 0).all():
        raise UserError(f"layer {index}: a direction is zero, so it points nowhere; leave the layer out with --layers")
    scaled = wide / largest  # so that squares neither overflow nor vanish
    units = scaled / scaled.norm(dim=1, keepdim=True)
    if len(units) == 1:
        return units
    if len(units) > units.shape[1]:
        raise UserError(f"layer {index}: {len(units)} directions cannot be independent in {units.shape[1]} dimensions")
    Q, R = torch.linalg.qr(units.T)
    kept = R.diagonal()
    # What is left of a unit vector beside the others. Rounding to its dtype moves each by eps/2 of its length at most,
    # and QR by a few units of fp64 times √D.
    noise = len(units) * (torch.finfo(rows.dtype).eps + 8 * 2**-52 * units.shape[1] ** 0.5)
    if (kept.abs() <= noise).any():
        raise UserError(
            f"layer {index}: its {len(units)} directions are linearly dependent; leave out what is repeated"
        )
    return (Q * kept.sign()).T.contiguous()
