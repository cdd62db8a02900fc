"""Means of a model's hidden states over sets of texts, layer by layer.

Takes a model folder and sets of rows of token ids; gives for each set the mean residual stream after each layer, summed in
fp64. Two sets' means and their difference are what steering vectors and refusal directions are made of.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from pipeline.model.layerwise import run_layerwise
from pipeline.model.stage import empty_model, read_model_config


def mean_hidden_states(
    folder: str,
    sets: Sequence[Sequence[Tensor]],
    *,
    counted: slice,
    layers: Iterable[int],
    layers_at_once: int,
    device: torch.device,
    dtype: torch.dtype,
) -> list[dict[int, Tensor]]:
    """For each of `sets`, rows [T] int64 each: layer → the mean [D] fp64 of the residual stream after it, on the CPU.

    The mean is over the tokens `counted` of all rows of a set together (`slice(1, None)`: all but each row's first;
    `slice(-1, None)`: each row's last), so a longer row counts more. The model runs in `dtype`, `layers_at_once` layers at
    a time. Raises ValueError where a set has no token to count; UserError as `run_layerwise`.
    """
    counts = [sum(len(row[counted]) for row in rows) for rows in sets]
    if not all(counts):
        raise ValueError(f"sets with {counts} tokens to count")
    prefix = empty_model(read_model_config(folder), dtype, None).base_model_prefix
    names = {f"{prefix}.layers.{index}": index for index in layers}
    set_of_row = [which for which, rows in enumerate(sets) for _ in rows]
    sums: list[dict[int, Tensor]] = [{} for _ in sets]

    def add(row: int, name: str, output_TD: Tensor) -> None:
        total, index = output_TD[counted].double().sum(0).cpu(), names[name]
        into = sums[set_of_row[row]]
        into[index] = into[index] + total if index in into else total

    run_layerwise(
        folder,
        [row for rows in sets for row in rows],
        modules=names.__contains__,
        tap=add,
        layers_at_once=layers_at_once,
        device=device,
        dtype=dtype,
    )
    return [
        {index: total / count for index, total in by_layer.items()}
        for by_layer, count in zip(sums, counts, strict=True)
    ]
