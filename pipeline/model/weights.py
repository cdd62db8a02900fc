"""Base weights: from safetensors into a stage, one tensor at a time, only the stage's own.

Takes a stage whose parameters are on `meta` and a model folder; fills the parameters on the device in the given dtype.
A layer that packs its weight (model/quantized_bnb.py) is given it as soon as it is read. No process ever holds a weight that
its stage does not own.
"""

import math
import os
from collections.abc import Collection, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.console import UserError, log_if_slow, progress
from pipeline.foreign import printable
from pipeline.formats.base_model import Base, head_of, read_base
from pipeline.formats.safetensors import StoredTensor, read_tensor
from pipeline.formats.stored_names import expert_pieces, stored_names
from pipeline.model.quantized import PackedLinear, QuantizedExperts, is_packed, marked, pack_in_place
from pipeline.model.stage import Stage, tied_head
from pipeline.model.structure.parts import embedding_of_model, parts_of, text_config
from pipeline.names import layer_of

SMALL = 2**29  # bytes of weights that need no progress bar


def load(stage: Stage, folder: str, dtype: torch.dtype, device: torch.device) -> None:
    """Fill every parameter and persistent buffer of `stage`. Raises UserError naming what the folder lacks."""
    base = read_base(Path(folder), "model")
    _separate_tied_head(stage)
    wanted = dict(stage.model.state_dict(keep_vars=True))
    shared = _shares_head(stage)
    if shared:
        del wanted[f"{parts_of(stage.model).head}.weight"]
    sources = {name: source for name in wanted if (source := source_of(name, stage.model, base))}
    if is_packed(stage.model):
        sources, pieces = _packed_sources(stage.model, base, sources, wanted)
        _load_by_name(stage.model, wanted, sources, dtype, device)
        _load_experts(stage.model, wanted, pieces, dtype, device)
    elif len(sources) == len(wanted):
        _load_by_name(stage.model, wanted, sources, dtype, device)
    else:
        _load_converted(stage, base, device, missing=sorted(set(wanted) - set(sources)))
    if shared:
        stage.head.weight = embedding_of_model(stage.model).weight
    for name, parameter in stage.model.named_parameters():
        parameter.requires_grad_(False)
        if parameter.is_meta:
            raise UserError(f"model = '{folder}' has no tensor for {name}")


def _separate_tied_head(stage: Stage) -> None:
    """On a last stage without the embedding, give a tied head a parameter of its own: it reads the embedding's tensor."""
    if stage.has_head and not stage.has_embedding:
        stage.head.weight = nn.Parameter(stage.head.weight.detach(), requires_grad=False)


def _shares_head(stage: Stage) -> bool:
    """Whether head and embedding are one parameter: tied, and both on this stage."""
    return stage.has_embedding and stage.has_head and bool(tied_head(stage.model))


def check_saved_as_run(model: PreTrainedModel) -> None:
    """Raise UserError for a model whose checkpoint is not what it runs (experts one by one): it cannot be saved in parts."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    if text_config(model.config) is not model.config:
        raise UserError(
            f"full_fine_tune: of model_type '{model.config.model_type}' the text half alone is here, and a model saved from it "
            "would lack the weights for images; train an adapter, which the fold puts into the whole model"
        )
    if get_model_conversion_mapping(model, add_legacy=False):
        raise UserError(
            f"full_fine_tune: transformers stores '{model.config.model_type}' in another form than it runs, and writing "
            "that form from several stages is not built yet; train an adapter"
        )


def stored_in_another_form(model: PreTrainedModel, names: Collection[str]) -> list[str]:
    """Those of `names`, parameters of `model`, that a checkpoint holds under another name or in another shape."""
    from transformers.core_model_loading import revert_weight_conversion

    stored = revert_weight_conversion(model, {name: model.get_parameter(name) for name in names})
    return [name for name in names if name not in stored]


def check_complete(model: PreTrainedModel, base: Base) -> None:
    """Raise UserError if the folder lacks a tensor of the whole `model`, as `empty_model` makes it, or holds one in a form
    that cannot be quantised, where it is to be. Nothing is read."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    parameters = model.state_dict(keep_vars=True)
    missing = converted = [name for name in parameters if source_of(name, model, base) is None]
    if missing and (mapping := get_model_conversion_mapping(model)):
        converters = [one for one in mapping if isinstance(one, WeightConverter)]
        renamings = [one for one in mapping if not isinstance(one, WeightConverter)]
        targets = {pattern: one.target_patterns for one in converters for pattern in one.source_patterns}
        made: set[str] = set()
        for stored in base.tensors:
            name, pattern = rename_source_key(stored, renamings, converters, model.base_model_prefix, parameters)
            into = targets.get(pattern or "", [""])
            made |= {name, *(name.replace(into[0], other) for other in into[1:])}
        made |= {name for pair in tied_head(model).items() if made & set(pair) for name in pair}
        missing = [name for name in missing if name not in made]
    if missing:
        raise UserError(_lacks(base.folder, missing, f"{parts_of(model).head}.weight"))
    if converted and is_packed(model):
        _packed_sources(model, base, {n: s for n in parameters if (s := source_of(n, model, base))}, parameters)


Pieces = tuple[
    tuple[StoredTensor, ...], ...
]  # of each expert, the stored matrices that lie one below the other in its own


def _packed_sources(
    model: PreTrainedModel, base: Base, sources: Mapping[str, StoredTensor], wanted: Mapping[str, Any]
) -> tuple[dict[str, StoredTensor], dict[str, Pieces]]:
    """Where the folder has each of `wanted`, of a model that is quantised as it is read, beside what `sources` says: the
    tensors, and what parameters of all experts are packed from, expert by expert.

    Raises UserError for a weight that the folder holds in a form that cannot be read so.
    """
    packed = {name for name in wanted if _mark(model, name)}
    whole = dict(sources)
    if missing := [name for name in wanted if name not in whole]:
        renamed, apart = dict(stored_names(base)), expert_pieces(base)
        for head, embedding in tied_head(model).items():  # of the two a folder holds one, here under another name
            for name, other in ((head, embedding), (embedding, head)):
                if name not in renamed and other in renamed:
                    renamed[name] = renamed[other]
        whole |= {n: base.tensors[renamed[n].tensor] for n in missing if n in renamed and renamed[n].n_rows is None}
        pieces = {n: tuple(tuple(base.tensors[s] for s in one) for one in apart[n]) for n in missing if n in apart}
    else:
        pieces = {}
    pieces |= {name: tuple((one,) for one in whole[name].matrices()) for name in packed & whole.keys()}
    if lost := [name for name in wanted if name not in whole and name not in pieces]:
        raise UserError(
            f"quantization: the model folder stores model_type '{model.config.model_type}' in another form than it runs "
            f"(it has no tensor for {lost[0]}), and quantising such weights is not built; remove [quantization]"
        )
    return {name: stored for name, stored in whole.items() if name not in packed}, pieces


def _mark(model: nn.Module, name: str) -> QuantizedExperts | None:
    """What says how to pack `name`, where it is a parameter of all experts that is quantised."""
    parent, _, leaf = name.rpartition(".")
    return marked(model.get_submodule(parent)).get(leaf)


def _load_experts(
    model: PreTrainedModel,
    wanted: Mapping[str, Any],
    pieces: Mapping[str, Pieces],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Read expert by expert, and pack each at once, or put it into its place in the whole where the parameter is not to be
    quantised: beside that, one expert's matrix is in memory at a time."""
    total = sum(stored.n_bytes for experts in pieces.values() for one in experts for stored in one)
    with progress("reading experts", total) if total > SMALL else nullcontext(lambda n: None) as advance:
        for name, experts in sorted(pieces.items(), key=lambda item: (item[1][0][0].file, item[1][0][0].start)):
            rows, columns = wanted[name].shape[1:]
            mark, packed = _mark(model, name), []
            whole = None if mark else torch.empty(wanted[name].shape, dtype=dtype, device=device)
            for number, one in enumerate(experts):
                found = [sum(stored.shape[0] for stored in one), *{stored.shape[1] for stored in one}]
                if found != [rows, columns] or len(experts) != wanted[name].shape[0]:
                    raise UserError(
                        f"{one[0].file.name}: {one[0].name} is part of {len(experts)} experts' {found}, but config.json "
                        f"makes {name} {list(wanted[name].shape)}"
                    )
                read = [_read(stored, dtype, device) for stored in one]
                if whole is not None:
                    torch.cat(read, out=whole[number])
                elif mark and mark.pack:
                    packed.append(mark.pack(read))
                advance(sum(stored.n_bytes for stored in one))
            parent, _, leaf = name.rpartition(".")
            if whole is not None:
                _assign(model, name, whole)
            else:
                pack_in_place(model.get_submodule(parent), leaf, packed, dtype, device)


def _lacks(folder: Path, missing: list[str], head: str) -> str:
    named = f"{', '.join(missing[:4])}{' …' if len(missing) > 4 else ''}"
    why = ""
    if missing == [head]:
        why = (
            ". Its config does not tie the head to the embedding, and the file was saved without one (AutoModel saves none): "
            "save the model again from AutoModelForCausalLM"
        )
    return f"model = '{folder}': the model folder has no tensor for {named}{why}"


def source_of(name: str, model: PreTrainedModel, base: Base) -> StoredTensor | None:
    """Where the folder has the tensor of the model's `name`; of a tied head and embedding it may hold either."""
    for head, embedding in tied_head(model).items():
        if name in (head, embedding):
            return base.find(name) or base.find(embedding if name == head else head)
    return base.find(name)


def _load_by_name(
    model: PreTrainedModel,
    wanted: dict[str, Any],
    sources: dict[str, StoredTensor],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Read what each name takes, in the order in which it lies in the files; one tensor is in memory at a time."""
    keep_fp32 = tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    total = sum(stored.n_bytes for stored in sources.values())
    with progress("reading weights", total) if total > SMALL else nullcontext(lambda n: None) as advance:
        for name, stored in sorted(sources.items(), key=lambda source: (source[1].file, source[1].start)):
            if stored.shape != wanted[name].shape:
                raise UserError(
                    f"{stored.file.name}: {stored.name} has shape {list(stored.shape)}, "
                    f"but config.json makes it {list(wanted[name].shape)}"
                )
            to = torch.float32 if any(part in name.split(".") for part in keep_fp32) else dtype
            _assign(model, name, _read(stored, to, device))
            advance(stored.n_bytes)


def _read(stored: StoredTensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The tensor on the device, floating-point values in `dtype`. As it was stored, it is gone on return."""
    tensor = _read_finite(stored)
    return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)


def _read_finite(stored: StoredTensor) -> torch.Tensor:
    """The stored tensor. UserError for a NaN or infinity in it, which would otherwise show as a loss that is not finite."""
    tensor = read_tensor(stored)
    compared = tensor.is_floating_point() and tensor.element_size() > 1 and tensor.numel() > 0  # fp8 knows no minimum
    # Both ends are NaN as soon as one value is.
    if compared and not all(math.isfinite(end) for end in torch.stack(torch.aminmax(tensor)).tolist()):
        raise UserError(
            f"{stored.file}: {printable(stored.name)} holds a NaN or an infinity, so nothing can be trained on it; "
            "download or save the model again"
        )
    return tensor


def _assign(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    parent_name, _, leaf = name.rpartition(".")
    parent: Any = model.get_submodule(parent_name)
    if _packs(model, name):
        parent._parameters[leaf] = parent.pack(tensor)
    elif leaf in parent._parameters:
        parent._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        parent._buffers[leaf] = tensor


def _packs(model: nn.Module, name: str) -> bool:
    """Whether `name` is the weight of a layer that stores it in another form."""
    parent, _, leaf = name.rpartition(".")
    return leaf == "weight" and isinstance(model.get_submodule(parent), PackedLinear)


class _Slice:
    """A stored tensor that transformers' loader reads when it comes to it, and not before."""

    def __init__(self, stored: StoredTensor) -> None:
        self.stored = stored

    def __getitem__(self, _: Any) -> torch.Tensor:
        """The whole tensor: the loader of one process asks for `[...]`."""
        return _read_finite(self.stored)


@log_if_slow("starting: reading and converting weights")
def _load_converted(stage: Stage, base: Base, device: torch.device, missing: list[str]) -> None:
    """Checkpoints stored under other names or shapes than the model's (experts one by one): transformers' own conversion.

    Uses transformers' loader with lazy slices of the tensors of this stage's layers. Written for transformers 5.24,
    which has no public function for a part of a model; `tests/model/test_weights.py` covers it with a mixture of experts.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    mapping = get_model_conversion_mapping(stage.model)
    if not mapping:
        raise UserError(_lacks(base.folder, missing, f"{parts_of(stage.model).head}.weight"))
    os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")  # one tensor at a time instead of a pool of threads
    slices = {name: _Slice(base.tensors[name]) for name in _names_of(stage, base.tensors)}
    head = head_of(base, stage.model.config.tie_word_embeddings)
    for name, embedding in tied_head(stage.model).items():
        if stage.has_head and name not in slices and head.head:
            slices[name] = _Slice(head.head)
        if stage.has_embedding and head.embedding and head.embedding.name == name:
            slices[embedding] = slices[name]
    config = LoadStateDictConfig(device_map={"": device}, dtype=stage.model.dtype, weight_mapping=mapping)
    report, _ = convert_and_load_state_dict_in_model(stage.model, slices, config)
    for name, found, right in sorted(report.mismatched_keys):
        raise UserError(f"{name} has shape {list(found)}, but config.json makes it {list(right)}")


def _names_of(stage: Stage, names: Iterable[str]) -> Iterable[str]:
    """Checkpoint names that may belong to this stage: those without a layer number, or with one of its own."""
    for name in names:
        number = layer_of(name)
        if f".layers.{number}." not in f".{name}" or number in stage.layer_indices:
            yield name
