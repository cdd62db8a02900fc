"""A forward pass through a model that is never whole in memory: a few layers at a time, all rows through each.

Takes a model folder and rows of token ids; calls `tap` with the outputs of the modules asked for. Between two groups of
layers the rows' hidden states lie in the CPU's memory, and the weights of the group before are gone. A group is a
`Stage`, so what it computes is what the whole Hugging Face model computes.

`mean_hidden_states` taps the residual stream of sets of texts: two sets' means and their difference are what steering vectors
and refusal directions are made of.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from pipeline.console import UserError, progress
from pipeline.model import cut_check
from pipeline.model.stage import Stage, empty_model, read_model_config
from pipeline.model.structure.parts import layers_of_model, parts_of, text_config
from pipeline.model.structure.stand_ins import PassThrough
from pipeline.model.weights import load
from pipeline.names import layers_of

Tap = Callable[[int, str, Tensor], None]


@torch.no_grad()
def run_layerwise(
    folder: str,
    rows: Sequence[Tensor],
    *,
    modules: Callable[[str], bool],
    tap: Tap,
    layers_at_once: int = 1,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Send `rows`, each [T] int64 of its own length T, through the model in `folder`, `layers_at_once` layers at a time.

    `modules` is asked about the full names of the embedding, of the layers and all that is in them, and of the last norm
    ('model.embed_tokens', 'model.layers.3', 'model.layers.3.mlp.down_proj', 'model.norm'). For each that it wants,
    `tap(row, name, output)` is called once for every row, `row` being its index and `output` [T, D] what the module gave
    (of a tuple, its first), in `dtype` on `device`; that of 'model.layers.3' is the residual stream after layer 3. All
    rows go through one group of layers before the next, and no further than the last module wanted. The head is not run.

    On the device: the weights of one group (with the embedding, in the first) and one row's activations. On the CPU:
    the hidden states of all rows, [T, D] in `dtype` each.
    Raises ValueError where `modules` wants nothing or a row is empty; UserError for a token the model does not have, a
    model that cannot be cut, and a folder that lacks weights.
    """
    config = read_model_config(folder)
    skeleton = empty_model(config, dtype, None)
    last = _last_layer_wanted(skeleton, modules)
    _check_rows(rows, config)
    if layers_at_once < 1:
        raise ValueError(f"layers_at_once = {layers_at_once}")
    n_layers = len(layers_of_model(skeleton))
    if layers_at_once < n_layers:
        _check_can_be_cut(config, n_layers, layers_at_once)
    states: list[Tensor] = [row.unsqueeze(0).to("cpu") for row in rows]
    firsts = range(0, last + 1, layers_at_once)
    with progress("through the layers", total=len(firsts) * len(rows)) as advance:
        for first in firsts:
            end = min(first + layers_at_once, n_layers)
            _run_group(folder, config, range(first, end), rows, states, modules, tap, device, dtype, advance)


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
    parts = parts_of(empty_model(read_model_config(folder), dtype, None))
    names = {parts.layer(index): index for index in layers}
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


def _run_group(
    folder: str,
    config: PretrainedConfig,
    layers: range,
    rows: Sequence[Tensor],
    states: list[Tensor],
    modules: Callable[[str], bool],
    tap: Tap,
    device: torch.device,
    dtype: torch.dtype,
    advance: Callable[[int], None],
) -> None:
    """Load `layers` and replace each of `states`, of the ids in `rows`, by what they make of it. Then the weights go."""
    stage = _headless_stage(empty_model(config, dtype, None), layers)
    load(stage, folder, dtype, device)
    stage.eval().to(device)  # the buffers
    at = [0]  # the row that is being sent through
    for name in _names(stage.model):
        module = stage.model.get_submodule(name)
        if not isinstance(module, PassThrough) and modules(name):
            module.register_forward_hook(_hook(name, at, tap))
    for row, state in enumerate(states):
        at[0] = row
        positions_BT = torch.arange(state.shape[1], device=device).unsqueeze(0)
        output = stage(stage.handed(state.to(device), positions_BT, rows[row].unsqueeze(0).to(device)))
        states[row] = (output if isinstance(output, Tensor) else output[0]).to("cpu")
        advance(1)


def _headless_stage(model: PreTrainedModel, layers: range) -> Stage:
    """A stage of `layers`, the last one's norm included, without the head, which is never loaded."""
    stage = Stage(model, layers.start, layers.stop)
    model.set_submodule(parts_of(model).head, PassThrough())
    return stage


def _hook(name: str, at: list[int], tap: Tap) -> Callable[[Any, Any, Any], None]:
    """A forward hook that hands a module's output, without the batch dimension of one, to `tap`."""

    def hook(_: Any, __: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple | list) else output
        if not isinstance(first, Tensor) or first.dim() not in (2, 3):
            raise ValueError(f"{name} does not give one vector a token")
        tap(at[0], name, first.flatten(0, -2))

    return hook


def _names(model: PreTrainedModel) -> list[str]:
    """What `modules` is asked about: the embedding, the layers and all that is in them, the norm; not the whole base."""
    parts = parts_of(model)
    wanted = (parts.embedding, f"{parts.layers}.", *parts.leaving)
    return [name for name, _ in model.named_modules() if name.startswith(wanted)]


def _last_layer_wanted(model: PreTrainedModel, modules: Callable[[str], bool]) -> int:
    """The last layer that must run for all modules wanted to have run."""
    wanted = [name for name in _names(model) if modules(name)]
    if not wanted:
        raise ValueError("no module is wanted: there is nothing to run for")
    if set(parts_of(model).leaving) & set(wanted):
        return len(layers_of_model(model)) - 1
    return max(layers_of(wanted), default=0)


def _check_rows(rows: Sequence[Tensor], config: PretrainedConfig) -> None:
    vocabulary = text_config(config).vocab_size
    for index, row in enumerate(rows):
        if row.dim() != 1 or row.numel() == 0 or row.dtype != torch.int64:
            raise ValueError(f"row {index} is {row.dtype} {list(row.shape)}, not [T] int64")
        if not 0 <= int(row.min()) <= int(row.max()) < vocabulary:
            raise UserError(
                f"a text holds the token {int(row.max())}, but the model's vocabulary has {vocabulary}: "
                "the tokenizer is not this model's"
            )


def _check_can_be_cut(config: PretrainedConfig, n_layers: int, at_once: int) -> None:
    try:
        cut_check.check(config, [(i, min(i + at_once, n_layers)) for i in range(0, n_layers, at_once)])
    except UserError as error:
        raise UserError(f"it cannot be run a few layers at a time, only all {n_layers} at once: {error}") from error
