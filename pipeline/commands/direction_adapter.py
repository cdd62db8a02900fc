"""make_adapter.py behind its command line: directions, from a file or from texts, become a multiplicative adapter.

Takes the parsed arguments; writes the adapter's folder, whole or not at all. Raises UserError before the model is looked at
where the arguments alone are wrong.
"""

import argparse
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.artifacts.adapter.directions import (
    STRENGTHS,
    adapter_tensors,
    orthonormal,
    read_directions,
    write_directions,
)
from pipeline.artifacts.adapter.write import save_adapter
from pipeline.console import UserError, gib, log, warn
from pipeline.data.reading.document_rows import document_rows
from pipeline.data.tokenizer import load as load_tokenizer
from pipeline.families import MULTIPLICATIVE
from pipeline.files import check_file_free, check_free
from pipeline.formats.device import usable_device
from pipeline.formats.dtypes import DTYPES
from pipeline.formats.experts import ExpertWeights
from pipeline.formats.hub import model_folder
from pipeline.model.adapters import experts
from pipeline.model.adapters.base import outputs_of
from pipeline.model.adapters.targets import describe_layers, describe_targets, resolve_targets
from pipeline.model.layerwise import mean_hidden_states
from pipeline.model.stage import empty_model, read_model_config
from pipeline.model.structure.parts import layers_of_model, text_config
from pipeline.names import layer_ranges, layers_of, within_layer
from pipeline.publishing import next_steps

# Of a decoder layer: norms of what a block writes, before it is added to the residual stream (Gemma 2, OLMo 2, GLM 4).
NORMS_AFTER_WRITING = {"post_feedforward_layernorm", "post_mlp_layernorm"}


def make(asked: argparse.Namespace) -> None:
    """Find the directions, and write the adapter."""
    _check(asked)
    asked.input = model_folder(asked.input, "--input")
    model = empty_model(read_model_config(asked.input), torch.float32, None)
    n_layers, width = len(layers_of_model(model)), text_config(model.config).hidden_size
    layers = _layers(asked.layers, n_layers)
    modules, experts_of, biased = _targets(model, asked.target_modules, layers, width)
    _warn_of_norms(model)
    used = layers if asked.direction_layer is None else [_direction_layer(asked.direction_layer, n_layers)]
    if asked.from_texts:
        found = {index: v.unsqueeze(0) for index, v in _from_texts(asked, used).items()}
    else:
        found = read_directions(asked.directions, used, n_layers, width)
    bases = orthonormal(found)
    if asked.direction_layer is not None:
        bases = dict.fromkeys(layers, bases[asked.direction_layer])
    rank = len(bases[layers[0]])
    save_adapter(
        asked.output,
        adapter_tensors(bases, modules, asked.kind, asked.factor),
        kind=MULTIPLICATIVE,
        rank=rank,
        alpha=rank,
        dropout=0.0,
        base_model=asked.input,
        train_logit_scale=1.0,
        biased_targets=biased,
        experts=experts_of,
        facts={"made_from": _origin(asked)},
        replace=asked.force,
    )
    log(
        f"{asked.kind}, factor {asked.factor:g} ({STRENGTHS[asked.kind] * asked.factor:g} of each direction taken off), "
        f"rank {rank}: {describe_layers(layers, n_layers)}, {len(modules)} modules → {asked.output}"
    )
    log(next_steps.lines(next_steps.after_making(Path(asked.input), asked.output)))


def _check(asked: argparse.Namespace) -> None:
    """What can be known to be wrong from the command line alone, all at once."""
    problems = []
    if not math.isfinite(asked.factor) or asked.factor == 0:
        problems.append(f"--factor {asked.factor:g}: give a finite number other than 0, which would change nothing")
    if asked.save_directions and not asked.from_texts:
        problems.append("--save-directions keeps what --from-texts computes; --directions are in a file already")
    if asked.save_directions and asked.save_directions.suffix != ".safetensors":
        problems.append(f"--save-directions {asked.save_directions}: the file is .safetensors")
    if asked.layers_at_once < 1:
        problems.append(f"--layers-at-once {asked.layers_at_once}: give 1 or more")
    if problems:
        raise UserError("\n       ".join(problems))
    check_free(asked.output, replace=asked.force)
    if asked.save_directions:
        check_file_free(asked.save_directions, replace=asked.force)


def _layers(text: str | None, n_layers: int) -> list[int]:
    """The layers that --layers names; all, where it names none. UserError for layers the model does not have."""
    try:
        ranges = [(0, n_layers - 1)] if text is None else layer_ranges(text)
    except ValueError as error:
        raise UserError(f"--layers '{text}': {error}") from None
    wanted = sorted({index for low, high in ranges for index in range(low, high + 1)})
    if wanted[-1] >= n_layers:
        raise UserError(
            f"--layers '{text}': the model has layers 0 to {n_layers - 1}; both ends of a range are included"
        )
    return wanted


def _direction_layer(index: int, n_layers: int) -> int:
    if not 0 <= index < n_layers:
        raise UserError(f"--direction-layer {index}: the model has layers 0 to {n_layers - 1}")
    return index


def _targets(
    model: PreTrainedModel, names: list[str], layers: list[int], width: int
) -> tuple[dict[str, int], dict[str, ExpertWeights], bool]:
    """Target module → its layer; those of them that are a layer's experts, with what these write with; and whether any has a
    bias. UserError for one that does not give [.., D]."""
    mixture = experts.find(model.config) if experts.has_experts(model) else {}
    modules, biased = {}, False
    for name in resolve_targets(model, names, layers, mixture):
        module = model.get_submodule(name)
        if (outputs := outputs_of(model, module)) != width:
            raise UserError(
                f"--target-modules: {name} gives {outputs} numbers, not the hidden size {width}, so a direction "
                "of the residual stream means nothing there; modules that write to it are down_proj, o_proj and experts"
            )
        (modules[name],) = layers_of([name])
        biased = biased or getattr(module, "bias", None) is not None
    experts_of = {name: mixture[within_layer(name)] for name in modules if within_layer(name) in mixture}
    biased = biased or any(form.bias for form in experts_of.values())
    if experts_of:
        for line in describe_targets(model, list(modules), layers, experts_of):
            log(line)
    return modules, experts_of, biased


def _warn_of_norms(model: PreTrainedModel) -> None:
    """Where a norm follows what the modules write, its gain turns the vector after the direction was taken off."""
    names = {name for name, _ in layers_of_model(model)[0].named_modules()}
    if norms := names & NORMS_AFTER_WRITING:
        warn(
            f"in this model a norm ({norms.pop()}) stands between what the target modules write and the residual stream; the "
            "direction is gone before it, and its gain may bring some of it back"
        )


def _from_texts(asked: argparse.Namespace, layers: list[int]) -> dict[int, Tensor]:
    """Layer → mean over A's texts less mean over B's [D] fp64 of the residual stream after the layer; saved if asked."""
    device = usable_device(asked.device)
    tokenizer, last = load_tokenizer(asked.input), asked.position == "last"
    config = read_model_config(asked.input)
    sets = [
        document_rows(
            tokenizer, path, asked.sequence_len, ends_only=last, embedding_rows=text_config(config).vocab_size
        )
        for path in asked.from_texts
    ]
    dtype = DTYPES[asked.dtype] if asked.dtype else config.dtype or torch.float32
    for path, rows in zip(asked.from_texts, sets, strict=True):
        log(f"{path}: {len(rows):,} rows, {sum(map(len, rows)):,} tokens")
    in_memory = sum(len(row) for rows in sets for row in rows) * text_config(config).hidden_size * dtype.itemsize
    log(f"hidden states between layers: {gib(in_memory)} in the CPU's memory")
    skipped = 0 if tokenizer.bos_token_id is None else 1
    mean_A, mean_B = mean_hidden_states(
        asked.input,
        sets,
        counted=slice(-1, None) if last else slice(skipped, None),
        layers=layers,
        layers_at_once=asked.layers_at_once,
        device=device,
        dtype=dtype,
    )
    differences = {index: mean_A[index] - mean_B[index] for index in layers}
    _say_differences(mean_A, mean_B, differences)
    _check_differences(differences, dtype)
    if asked.save_directions:
        write_directions(asked.save_directions, differences, replace=asked.force)
    return differences


def _say_differences(
    mean_A: Mapping[int, Tensor], mean_B: Mapping[int, Tensor], differences: Mapping[int, Tensor]
) -> None:
    """A line for each layer: how large the difference is beside the means, and how it turns from layer to layer."""
    log("after layer   ‖A − B‖   of the means' norm   cosine with the layer before")
    before = None
    for index, difference in differences.items():
        norm, size = float(difference.norm()), float(mean_A[index].norm() + mean_B[index].norm()) / 2
        turn = "" if before is None else f"{float(torch.cosine_similarity(difference, before, dim=0)):.3f}"
        log(f"{index:>11}   {norm:>7.3g}   {norm / size if size else math.nan:>18.2%}   {turn:>28}")
        before = difference


def _check_differences(differences: Mapping[int, Tensor], dtype: torch.dtype) -> None:
    for index, difference in differences.items():
        if not torch.isfinite(difference).all():
            raise UserError(
                f"--from-texts: the hidden states after layer {index} are not finite in {dtype}: set --dtype"
            )
        if not difference.any():
            raise UserError(
                f"--from-texts: A and B have the same mean after layer {index}, so there is no direction between them; are "
                "they the same texts?"
            )


def _origin(asked: argparse.Namespace) -> dict[str, object]:
    """What the adapter's metadata says about its making; file names without their folders, as adapters get shared."""
    origin: dict[str, object] = {"method": asked.kind, "factor": asked.factor, "direction_layer": asked.direction_layer}
    if asked.from_texts:
        texts = [Path(path).name for path in asked.from_texts]
        return origin | {"texts": texts, "position": asked.position, "sequence_len": asked.sequence_len}
    return origin | {"directions": asked.directions.name}
