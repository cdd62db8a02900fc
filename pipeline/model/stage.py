"""A pipeline stage: the Hugging Face model itself, without the parts its stage does not own.

Takes a model folder and the layers owned; gives a module that maps (token ids or hidden state, positions) to (hidden
state, positions), or on the last stage to the normed hidden state. Of a model whose layers are given something made of the
token ids, these go behind the positions. Masks, RoPE, sliding windows and layer types stay
the model's own, so there is no class per model family: what belongs to other stages is replaced by a stand-in under its own
name (stand_ins.py).

One floating-point tensor crosses a stage boundary. DeepSpeed runs backward once per floating-point output; integers
(here the positions, and the ids where layers need them) follow behind it.
"""

import contextlib
import inspect
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, Cache, DynamicCache, PretrainedConfig, PreTrainedModel

from pipeline.console import UserError
from pipeline.foreign import printable, read_by_library, read_object
from pipeline.formats.base_model import has_weights, head_of, read_base
from pipeline.model.structure.apart import WAYS, Way
from pipeline.model.structure.build import build, leaves_transform_out, logit_transform
from pipeline.model.structure.handed import from_wire, to_wire
from pipeline.model.structure.parts import (
    base_of,
    carried_width,
    head_of_model,
    layers_of_model,
    parts_of,
    takes_positions,
    text_config,
)
from pipeline.model.structure.stand_ins import PassThrough, arrives, departed, put_stand_ins
from pipeline.model.tiny_copy import NoCopyError, observed_parts

# What the first stage is handed, in this order; the last is for hooks (neftune.py) and may be left out.
FIRST_READS = ("input_ids", "position_ids", "lengths")

# What a config calls its number of layers, and more of them than any model has: building so many would never end.
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
MOST_LAYERS = 10_000
# What a model calls its cache of keys and values, the newest transformers' word first.
CACHE_ARGUMENTS = ("cache", "past_key_values")


def read_model_config(folder: str) -> PretrainedConfig:
    """config.json of a model folder, with `tie_word_embeddings` as it holds for the weights that lie beside it.

    Never runs code from the folder. UserError if there is no config.json, its weights are quantised, or they do not read.
    """
    if not Path(folder).is_dir():
        raise UserError(f"model = '{printable(folder)}': {_no_folder(folder)}")
    if not (Path(folder) / "config.json").is_file():
        gguf = " (a GGUF file is no such model: its weights are packed for inference)" if _has_gguf(folder) else ""
        raise UserError(
            f"model = '{folder}': there is no config.json in it; give the folder of a model in Hugging Face's format{gguf}"
        )
    written = read_object(Path(folder) / "config.json", "the model's configuration")
    for key, value in (written | (text if isinstance(text := written.get("text_config"), dict) else {})).items():
        if key in LAYER_COUNTS and isinstance(value, int) and value > MOST_LAYERS:
            raise UserError(f"model = '{folder}': config.json has {key} = {printable(value, 20)}; the file is damaged")
    with read_by_library(f"model = '{folder}': transformers cannot read its config.json"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if quantised := getattr(config, "quantization_config", None):
        method = quantised.get("quant_method", "?") if isinstance(quantised, dict) else "?"
        raise UserError(f"model = '{folder}' is quantised ({method}), which is not built yet; give the 16-bit model")
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"model = '{folder}': model_type '{config.model_type}' is an encoder-decoder; what is trained here predicts the "
            "next token (a decoder: llama, mistral, cohere, qwen, gemma and their like)"
        )
    _tie_as_stored(config, Path(folder))
    return config


def _tie_as_stored(config: PretrainedConfig, folder: Path) -> None:
    """Untie head and embedding in the config where the folder stores two that differ: transformers keeps both, too."""
    text = text_config(config)
    if has_weights(folder) and getattr(text, "tie_word_embeddings", False):
        config.tie_word_embeddings = text.tie_word_embeddings = head_of(read_base(folder, "model"), ties=True).tied


def _no_folder(given: str) -> str:
    """What to do about a `model` that is no folder."""
    if given.lower().endswith(".gguf"):
        return "a GGUF file's weights are packed for inference; give the folder of the original model, in Hugging Face's format"
    if Path(given).is_file():
        return "this is a file; give the folder it is in"
    return "no such folder; download the model first and give its folder"


def _has_gguf(folder: str) -> bool:
    return any(Path(folder).glob("*.gguf"))


def empty_model(config: PretrainedConfig, dtype: torch.dtype, attn_implementation: str | None) -> PreTrainedModel:
    """The whole model with parameters on `meta` and real buffers (RoPE tables, embedding scales): no memory to speak of.

    Its parts are known (`parts.parts_of`). Raises UserError for a structure that stages cannot be cut from.
    """
    given = deepcopy(config)  # building writes the dtype into a config
    model = build(config, dtype, attn_implementation)
    with contextlib.suppress(NoCopyError):  # then it is not cut, and nothing asks what runs beside the layers
        model.__dict__["parts"] = observed_parts(given)
    model.config.use_cache = False
    model.config.tie_word_embeddings = bool(tied_head(model))
    return model


def tied_head(model: PreTrainedModel) -> dict[str, str]:
    """The head's parameter by name, with that of the embedding which it is; nothing where they are two.

    It is transformers' own word, by the config and the model's class. That a checkpoint may hold two different tensors
    all the same, `read_model_config` has put into the config.
    """
    head = f"{parts_of(model).head}.weight"
    return {name: source for name, source in model.all_tied_weights_keys.items() if name == head}


def cache_argument(model: nn.Module) -> str:
    """What the model's forward calls its cache of keys and values: transformers 5.24 renamed `past_key_values`.

    Raises ValueError for a model that takes none.
    """
    taken = inspect.signature(model.forward).parameters
    found = [name for name in CACHE_ARGUMENTS if name in taken]
    if not found:
        raise ValueError(f"{type(model).__name__} takes no cache of keys and values")
    return found[0]


class StageCache(DynamicCache):
    """A cache with a place for every layer of the whole model, of which a stage fills its own.

    transformers sizes its masks by the first layer of a kind; that of another stage is empty, and one that this stage has filled
    stands for it. (Which are its own the number of a decoder layer does not say: longcat_flash has two attentions in each.)
    """

    def __init__(self, config: PretrainedConfig, own: range) -> None:
        super().__init__(config=config)
        self._own = own

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(keys that are seen, their offset) of a layer."""
        return super().get_mask_sizes(query_length, self._stands_for(layer_idx))  # type: ignore[no-any-return]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that a layer keeps or has kept."""
        return super().get_seq_length(self._stands_for(layer_idx))  # type: ignore[no-any-return]

    def _stands_for(self, index: int) -> int:
        if index in self._own or index >= len(self.layers):
            return index
        kind = type(self.layers[index])
        filled = (
            i for i, layer in enumerate(self.layers) if type(layer) is kind and getattr(layer, "is_initialized", False)
        )
        return next(filled, index)


class Stage(nn.Module):
    """Layers [first_layer, end_layer) of the model; with the embedding and what runs before the layers on the first stage,
    with the last norm and the head on the last.

    Parameters keep the names of the whole model (`stage.model.named_parameters()`), so they mean the same on any stage.
    """

    def __init__(self, model: PreTrainedModel, first_layer: int, end_layer: int) -> None:
        super().__init__()
        model.__dict__["parts"] = parts_of(model)  # found while it is whole
        n_layers = len(layers_of_model(model))
        self.layer_indices = range(first_layer, end_layer)
        self.is_first, self.is_last = first_layer == 0, end_layer == n_layers
        put_stand_ins(model, first_layer, end_layer)
        self.model = model
        self.kept_apart_by: Way = "positions"  # where rows hold several documents: packing_check.py knows

    def forward(self, inputs: tuple[Tensor, ...], cache: Cache | None = None) -> Tensor | tuple[Tensor, ...]:
        """First stage: the tensors of `FIRST_READS`, int64 [B, T] (lengths [B]); later ones: (hidden [B, T, D], positions), and
        the ids where `rereads_ids`. D is of all streams (`parts.carried_width`).

        `cache`: from `new_cache`, with the keys and values of the same rows' earlier positions, to which those of these are
        added. Then the first stage reads no lengths.

        Returns what the next stage is handed, or on the last one the normed hidden state [B, T, D].
        """
        x, positions_BT = inputs[:2]
        parts = parts_of(self.model)
        behind = (x if self.is_first else inputs[2],) if parts.rereads_ids else ()
        given: dict[str, Any] = {self._cache_argument: cache} if cache is not None else {}
        if cache is None:
            given = WAYS[self.kept_apart_by](self.model, positions_BT)
        if self.is_first:
            normed_BTD = run_base(self.model, positions_BT, input_ids=x, **given)
        else:
            if behind:
                given["input_ids"] = behind[0]
            else:  # of what is given here the model takes the size, for its masks and rotary tables
                given["inputs_embeds"] = x.detach()[..., : x.shape[-1] // parts.streams]
            with arrives(self.model, from_wire(parts, x)):
                normed_BTD = run_base(self.model, positions_BT, **given)
        if self.is_last:
            return normed_BTD
        return to_wire(parts, departed(self.model, self.layer_indices.stop)), positions_BT, *behind

    def handed(self, x: Tensor, positions_BT: Tensor, ids_BT: Tensor) -> tuple[Tensor, ...]:
        """What `forward` takes of `x`, ids or a hidden state, where all three are at hand."""
        return (x, positions_BT, ids_BT)[: 3 if self.has_embedding and not self.is_first else 2]

    def new_cache(self) -> Cache:
        """An empty cache of keys and values. It has a place for every layer of the whole model, so that layers keep their
        index and their kind (full, windowed, recurrent) on any stage; those of other stages stay empty."""
        return StageCache(text_config(self.model.config), self.layer_indices)

    @cached_property
    def _cache_argument(self) -> str:
        return cache_argument(base_of(self.model))

    @property
    def layers(self) -> dict[int, nn.Module]:
        """The decoder layers this stage owns, by their index in the whole model."""
        return {index: layers_of_model(self.model)[index] for index in self.layer_indices}

    @property
    def has_embedding(self) -> bool:
        """Whether the embedding, with what else runs before the layers, is here: on the first stage, or where layers need ids."""
        return self.is_first or parts_of(self.model).rereads_ids

    @property
    def has_head(self) -> bool:
        """Whether the output head is here: on the last stage, unless it was taken out (layerwise.py)."""
        return not isinstance(head_of_model(self.model), PassThrough)

    @property
    def head(self) -> nn.Linear:
        """The output head; on the last stage only."""
        return head_of_model(self.model)  # type: ignore[no-any-return]


def run_base(model: PreTrainedModel, positions_BT: Tensor, **given: Any) -> Tensor:
    """What the module that runs the layers gives, from `input_ids` [B, T] or `inputs_embeds` [B, T, D], and a cache, masks or
    documents' boundaries if there are some among what is `given`."""
    base = base_of(model)
    positions = {"position_ids": positions_BT} if takes_positions(base) else {}
    cached = any(isinstance(one, Cache) for one in given.values())
    return base(**given, **positions, use_cache=cached)[0]  # type: ignore[no-any-return]


@torch.no_grad()
def check_head(stage: Stage, tokens: int = 4) -> None:
    """Compare our logits on the last stage with those of the model's own forward; raise UserError if they differ.

    Catches a model that does something to its logits which `logit_transform` does not know.
    """
    model, weight = stage.model, stage.head.weight
    positions = torch.arange(tokens, device=weight.device).unsqueeze(0)
    stage.eval()
    if stage.is_first:
        normed, theirs = stage((positions, positions)), model(input_ids=positions, use_cache=False).logits
    else:
        generator, parts = torch.Generator().manual_seed(0), parts_of(model)
        hidden = torch.randn(1, tokens, carried_width(model), generator=generator).to(weight)
        normed = stage(stage.handed(hidden, positions, positions))
        embeds = hidden[..., : hidden.shape[-1] // parts.streams]
        given = {"input_ids": positions} if parts.rereads_ids else {"inputs_embeds": embeds}
        with arrives(model, from_wire(parts, hidden)):
            theirs = model(**given, use_cache=False).logits
    theirs = theirs.float()
    raw = stage.head(normed)
    ours = raw.float() if leaves_transform_out(model.config) else logit_transform(model.config).apply(raw)
    # After the same product theirs may round the scaled logits once more, to half a unit in the last place.
    if (ours - theirs).abs().max() > 2 * torch.finfo(weight.dtype).eps * theirs.abs().max().clamp_min(1e-3):
        raise UserError(
            f"model_type '{model.config.model_type}' changes its logits in a way this program does not know; "
            "training it would minimise another loss than the model's own"
        )
