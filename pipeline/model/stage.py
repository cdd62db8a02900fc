"""A pipeline stage: the Hugging Face model itself, without the parts its stage does not own.

Takes a model folder and the layers owned; gives a module that maps (token ids or hidden state, positions) to (hidden
state, positions), or on the last stage to the normed hidden state. Masks, RoPE, sliding windows and layer types stay
the model's own, so there is no class per model family: layers of other stages become a pass-through under their own
index, and a small table holds the one family that needs a word.

One floating-point tensor crosses a stage boundary. DeepSpeed runs backward once per floating-point output; integers
(here the positions) follow behind it.
"""

import inspect
import math
import re
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, Cache, DynamicCache, PretrainedConfig, PreTrainedModel

from pipeline.console import UserError
from pipeline.foreign import printable, read_by_library, read_object
from pipeline.formats.base_model import has_weights, head_of, read_base
from pipeline.kernels.cross_entropy import LogitTransform
from pipeline.model.unsupported import reason
from pipeline.names import EMBEDDING_MODULE, HEAD

LARGE = 1 << 24  # elements of a tensor that is a weight and no table: 64 MiB in fp32


class LargeOnMeta(TorchFunctionMode):
    """Inside, new tensors of LARGE elements and more are on `meta`.

    `init_empty_weights` lets a parameter be made in memory before it moves it there, and all experts of a layer are one.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn) and kwargs.get("device") is None:
            sizes = args[0] if args and isinstance(args[0], tuple | list) else args
            if all(isinstance(size, int) for size in sizes) and math.prod(sizes) >= LARGE:
                kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


# What the first stage is handed, in this order; the last is for hooks (neftune.py) and may be left out.
FIRST_READS = ("input_ids", "position_ids", "lengths")

# What a config calls its number of layers, and more of them than any model has: building so many would never end.
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
MOST_LAYERS = 10_000
# What a model calls its cache of keys and values, the newest transformers' word first.
CACHE_ARGUMENTS = ("cache", "past_key_values")


class PassThrough(nn.Module):
    """Stands where another stage's module was; returns its first argument."""

    def __init__(self, replaced: nn.Module | None = None) -> None:
        super().__init__()
        # Some models choose each layer's mask by this attribute of the layer.
        if (attention_type := getattr(replaced, "attention_type", None)) is not None:
            self.attention_type = attention_type

    def forward(self, first: Any, *args: Any, **kwargs: Any) -> Any:
        return first


def _granite_embeds_once(base: nn.Module) -> None:
    """Granite multiplies `inputs_embeds` by a constant; the hidden state of an earlier stage has had it already."""
    base.embedding_multiplier = 1.0  # type: ignore[assignment]


# model_type → what a stage that receives a hidden state must change in the base model.
LATER_STAGE_QUIRKS: dict[str, Callable[[nn.Module], None]] = {
    "granite": _granite_embeds_once,
    "granitemoe": _granite_embeds_once,
    "granitemoeshared": _granite_embeds_once,
}


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
    text = config.get_text_config(decoder=True)
    if has_weights(folder) and getattr(text, "tie_word_embeddings", False):
        config.tie_word_embeddings = text.tie_word_embeddings = head_of(read_base(folder, "model"), ties=True).tied


def _no_folder(given: str) -> str:
    """What to do about a `model` that is no folder."""
    if given.lower().endswith(".gguf"):
        return "a GGUF file's weights are packed for inference; give the folder of the original model, in Hugging Face's format"
    if Path(given).is_file():
        return "this is a file; give the folder it is in"
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", given):
        name = given.split("/")[1]
        return (
            "no such folder. If it is the model's name on the Hub, download it first: "
            f"hf download {given} --local-dir {name}, and write model = '{name}'"
        )
    return "no such folder; download the model first and give its folder"


def _has_gguf(folder: str) -> bool:
    return any(Path(folder).glob("*.gguf"))


def empty_model(config: PretrainedConfig, dtype: torch.dtype, attn_implementation: str | None) -> PreTrainedModel:
    """The whole model with parameters on `meta` and real buffers (RoPE tables, embedding scales): no memory to speak of.

    Raises UserError for a structure that stages cannot be cut from.
    """
    try:
        with init_empty_weights(include_buffers=False), LargeOnMeta():
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attn_implementation, trust_remote_code=False
            )
    except Exception as error:
        raise UserError(f"model_type '{config.model_type}': transformers cannot build it: {reason(error)}") from error
    base = model.base_model
    missing = [
        name for name in (EMBEDDING_MODULE, "layers", "norm") if not isinstance(getattr(base, name, None), nn.Module)
    ]
    head = model.get_output_embeddings()
    if base is model or missing or not isinstance(base.layers, nn.ModuleList) or not isinstance(head, nn.Linear):
        raise UserError(
            f"model_type '{config.model_type}' cannot be cut into stages: {type(model).__name__} has no "
            f"{', '.join(missing) or 'linear output head'}; what fits has embed_tokens, layers, norm and a linear head "
            "(cohere, cohere2, llama, mistral, mixtral, qwen2, qwen3, gemma2, gemma3_text, phi3, granite, olmo2, glm4 "
            "and their like)"
        )
    model.config.use_cache = False
    model.config.tie_word_embeddings = bool(tied_head(model))
    return model


def tied_head(model: PreTrainedModel) -> dict[str, str]:
    """The head's parameter by name, with that of the embedding which it is; nothing where they are two.

    It is transformers' own word, by the config and the model's class. That a checkpoint may hold two different tensors
    all the same, `read_model_config` has put into the config.
    """
    return {name: source for name, source in model.all_tied_weights_keys.items() if name == HEAD}


def cache_argument(model: nn.Module) -> str:
    """What the model's forward calls its cache of keys and values: transformers 5.24 renamed `past_key_values`.

    Raises ValueError for a model that takes none.
    """
    taken = inspect.signature(model.forward).parameters
    found = [name for name in CACHE_ARGUMENTS if name in taken]
    if not found:
        raise ValueError(f"{type(model).__name__} takes no cache of keys and values")
    return found[0]


def logit_transform(config: PretrainedConfig) -> LogitTransform:
    """What the model does to its raw logits: Cohere's scale, Granite's division, Gemma's soft cap."""
    before = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return LogitTransform(before=before, cap=getattr(config, "final_logit_softcapping", None))


class Stage(nn.Module):
    """Layers [first_layer, end_layer) of the model, with the embedding on the first stage and norm and head on the last.

    Parameters keep the names of the whole model (`stage.model.named_parameters()`), so they mean the same on any stage.
    """

    def __init__(self, model: PreTrainedModel, first_layer: int, end_layer: int) -> None:
        super().__init__()
        base = model.base_model
        n_layers = len(base.layers)
        self.layer_indices = range(first_layer, end_layer)
        self.is_first, self.is_last = first_layer == 0, end_layer == n_layers
        for index in range(n_layers):
            if index not in self.layer_indices:
                base.layers[index] = PassThrough(base.layers[index])
        if not self.is_last:
            base.norm = PassThrough()
            model.set_output_embeddings(PassThrough())
        if not self.is_first:
            base.embed_tokens = PassThrough()
            if quirk := LATER_STAGE_QUIRKS.get(model.config.model_type):
                quirk(base)
        self.model = model

    def forward(self, inputs: tuple[Tensor, ...], cache: Cache | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """First stage: the tensors of `FIRST_READS`, int64 [B, T] (lengths [B]); later ones: (hidden [B, T, D], positions).

        `cache`: from `new_cache`, with the keys and values of the same rows' earlier positions, to which those of these are
        added. Then the first stage reads no lengths.

        Returns (hidden [B, T, D], positions), or on the last stage the normed hidden state [B, T, D].
        """
        x, positions_BT = inputs[:2]
        given = {"input_ids": x} if self.is_first else {"inputs_embeds": x}
        if cache is not None:
            given[self._cache_argument] = cache
        hidden_BTD = self.model.base_model(**given, position_ids=positions_BT, use_cache=cache is not None)[0]
        return hidden_BTD if self.is_last else (hidden_BTD, positions_BT)

    def new_cache(self) -> Cache:
        """An empty cache of keys and values. It has a place for every layer of the whole model, so that layers keep their
        index and their kind (full, windowed, recurrent) on any stage; those of other stages stay empty."""
        return DynamicCache(config=self.model.config)

    @cached_property
    def _cache_argument(self) -> str:
        return cache_argument(self.model.base_model)

    @property
    def layers(self) -> dict[int, nn.Module]:
        """The decoder layers this stage owns, by their index in the whole model."""
        return {index: self.model.base_model.layers[index] for index in self.layer_indices}

    @property
    def has_head(self) -> bool:
        """Whether the output head is here: on the last stage, unless it was taken out (layerwise.py)."""
        return not isinstance(self.model.get_output_embeddings(), PassThrough)

    @property
    def head(self) -> nn.Linear:
        """The output head; on the last stage only."""
        return self.model.get_output_embeddings()  # type: ignore[return-value]


@torch.no_grad()
def check_head(stage: Stage, tokens: int = 4) -> None:
    """Compare our logits on the last stage with those of the model's own forward; raise UserError if they differ.

    Catches a model that does something to its logits which `logit_transform` does not know.
    """
    config, weight = stage.model.config, stage.head.weight
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, tokens, config.hidden_size, generator=generator).to(weight)
    positions = torch.arange(tokens, device=weight.device).unsqueeze(0)
    stage.eval()
    theirs = stage.model(inputs_embeds=hidden, position_ids=positions, use_cache=False).logits.float()
    normed = stage.model.base_model(inputs_embeds=hidden, position_ids=positions, use_cache=False)[0]
    ours = logit_transform(config).apply(stage.head(normed))
    # After the same product theirs may round the scaled logits once more, to half a unit in the last place.
    if (ours - theirs).abs().max() > 2 * torch.finfo(weight.dtype).eps * theirs.abs().max().clamp_min(1e-3):
        raise UserError(
            f"model_type '{config.model_type}' changes its logits in a way this program does not know; "
            "training it would minimise another loss than the model's own"
        )
