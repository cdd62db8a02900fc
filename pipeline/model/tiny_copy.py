"""A model of the same class and structure that is small enough to run in a moment, with weights that hide nothing.

Takes a model's config; gives the same model with as many layers, of the same kinds and with the same scaling factors, but
few heads, narrow products, few experts and a small vocabulary. The size of a head stays, because rotary embeddings and
their scalings are written for it. Which sizes may shrink differs from family to family, so the smallest copy is tried
first, and the next where transformers does not take it.
"""

import re
from collections.abc import Iterator
from copy import deepcopy
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from pipeline.model.structure.build import build, leaves_transform_out, logit_transform
from pipeline.model.structure.handed import with_handed
from pipeline.model.structure.parts import Parts, observed, parts_of
from pipeline.model.unsupported import reason

VOCABULARY, HIDDEN, WIDTH, HEADS, WINDOW, TOKENS = 64, 64, 32, 4, 5, 12
# Heads whose summed, clipped scores choose the keys: of few, some scores are exactly 0, and which of them is chosen is chance.
SCORING_HEADS, MOST_SCORING = {"index_n_heads"}, 32
SPECIAL = 8  # the first ids of the vocabulary, which alone may stand for something else than text: an image, the end
MOST_WEIGHTS = 150_000_000  # of a copy: 600 MB in fp32
POOL = (1 << 20) + 7  # random numbers of which all weights are made; no multiple of a usual size, so that rows differ

HEAD_COUNT = re.compile(r"(^|_)(n|num)_(\w+_)?heads?$")
INNER_WIDTH = re.compile(
    r"(intermediate_(size|dim)|ffn_(hidden_size|dim|size)|lora_rank|router_hidden_size|hidden_size_per_layer_input)$"
)
QUERY_HEADS, HIDDEN_SIZES = {"num_attention_heads", "n_head", "n_heads"}, {"hidden_size", "n_embd", "d_model"}
# Its factor on the hidden size, the size of its heads, their number: as its families call them.
MAMBA_HEADS = (("mamba_expand", "mamba_d_head", "mamba_n_heads"), ("expand", "head_dim", "num_heads"))
STATE_HEADS, STATE_GROUPS = ("mamba_n_heads", "mamba_num_heads", "num_heads"), {"n_groups", "mamba_n_groups"}
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
ACTIVE = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts", "moe_k")
GROUPS = ("n_group", "num_expert_group")
WINDOWS = ("sliding_window", "attention_chunk_size", "index_topk")

# What shrinks, from the smallest copy to the largest.
ATTEMPTS = (
    ("hidden", "heads", "widths", "experts", "windows"),
    ("heads", "widths", "experts", "windows"),
    ("heads", "widths", "experts"),
    ("heads", "widths"),
    ("widths", "experts", "windows"),
    ("widths", "experts"),
    ("heads", "experts"),
    ("experts",),
    ("heads",),
    (),
)


class NoCopyError(Exception):
    """transformers builds or runs no copy; the message is what it says to the smallest."""


@torch.no_grad()
def tiny_copy(config: PretrainedConfig) -> tuple[PreTrainedModel, Tensor]:
    """A small copy of the model of `config`, fp32 on the CPU in eval mode, and its logits [1, TOKENS, V] of `token_ids`.

    Every parameter is random and none is the identity: norms, biases and gates too. Raises NoCopyError.
    """
    return _UNUSED.pop(_key(config), None) or _made(config)


def _made(config: PretrainedConfig) -> tuple[PreTrainedModel, Tensor]:
    first: Exception | None = None
    for which in ATTEMPTS:
        try:
            model = build(shrunk(config, which), torch.float32, None)
            if sum(p.numel() for p in model.parameters()) > MOST_WEIGHTS:
                raise ValueError("the smallest copy is too large")
            fill(model)
            model.tie_weights()  # `meta` parts what is tied
            with observed(model) as parts:
                logits = model.eval()(input_ids=token_ids(), use_cache=False).logits
            if leaves_transform_out(config):
                logits = logit_transform(config).apply(logits)
            model.__dict__["parts"] = with_handed(model, parts())
            if not torch.isfinite(logits).all() or float(logits.std()) == 0.0:
                raise ValueError("a copy with random weights gives no finite logits")
            return model, logits
        except Exception as error:
            first = first or error
    raise NoCopyError(reason(first)) from first


_OBSERVED: dict[str, Parts | str] = {}  # by config; why there is no copy, where there is none
_UNUSED: dict[str, tuple[PreTrainedModel, Tensor]] = {}  # copies that were only observed: the next to ask gets them


def observed_parts(config: PretrainedConfig) -> Parts:
    """The parts of the model of `config`, observed on a tiny copy; once for each config. Raises NoCopyError."""
    key = _key(config)
    if key not in _OBSERVED:
        try:
            _UNUSED[key] = tiny_copy(config)
            _OBSERVED[key] = parts_of(_UNUSED[key][0])
        except NoCopyError as error:
            _OBSERVED[key] = str(error)
    if isinstance(found := _OBSERVED[key], str):
        raise NoCopyError(found)
    return found


def _key(config: PretrainedConfig) -> str:
    return str(config.to_json_string(use_diff=False))


def token_ids(count: int = TOKENS) -> Tensor:
    """Ids [1, count] int64 for a tiny copy; the first ones of the vocabulary, which may be special, are left out."""
    return torch.randint(SPECIAL, VOCABULARY, (1, count), generator=torch.Generator().manual_seed(1))


def shrunk(config: PretrainedConfig, which: tuple[str, ...]) -> PretrainedConfig:
    """A copy of `config` with a small vocabulary and smaller sizes of the kinds in `which`, parts and layers included."""
    small = deepcopy(config)
    for part in _parts(small):
        layers = part.to_dict().get("per_layer_config")
        part.per_layer_config = None  # or transformers refuses to tell the sizes that differ between layers
        there = dict(vars(part))
        for name, value in _smaller(there, which).items():
            setattr(part, name, value)
        if layers:
            part.per_layer_config = {
                index: {**own, **{k: v for k, v in _smaller({**there, **own}, which).items() if k in own}}
                for index, own in layers.items()
            }
    return small


def _parts(config: PretrainedConfig) -> Iterator[Any]:
    """The config and those within it (of the text, of an encoder)."""
    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PretrainedConfig):
            yield from _parts(value)


def _smaller(sizes: dict[str, Any], which: tuple[str, ...]) -> dict[str, Any]:
    """Of a config's values those that become smaller, with what they become."""
    kinds = {
        "heads": _fewer_heads,
        "hidden": _hidden,
        "widths": _narrower,
        "experts": _fewer_experts,
        "windows": _shorter,
    }
    changed = {name: min(size, VOCABULARY) for name, size in sizes.items() if "vocab_size" in name and _is_size(size)}
    for name, value in sizes.items():
        if name.endswith("token_id") and isinstance(value, int | list):
            changed[name] = value % SPECIAL if isinstance(value, int) else 1
    for kind in which:
        if kind != "hidden":
            changed |= kinds[kind](sizes)
    changed |= _hidden(sizes) if "hidden" in which else {}
    return changed | _expanded({**sizes, **changed})


def _is_size(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _fewer_heads(sizes: dict[str, Any]) -> dict[str, Any]:
    """Keys' heads stay one, as many as the queries', or half; the hidden size follows, as heads may make it up."""
    counts = {name: n for name, n in sizes.items() if HEAD_COUNT.search(name) and _is_size(n) and n > 1}
    changed = {name: min(counts.pop(name), MOST_SCORING) for name in SCORING_HEADS & counts.keys()}
    for name, count in counts.items():
        partner = name.replace("key_value", "attention").replace("num_key_", "num_value_")
        changed[name] = HEADS if count >= counts.get(partner, count) else HEADS // 2
    for heads in QUERY_HEADS & counts.keys():
        for hidden in HIDDEN_SIZES & sizes.keys():
            if _is_size(size := sizes[hidden]):
                changed |= _as_wide(sizes, size, size // counts[heads] * changed[heads])
    return changed


def _as_wide(sizes: dict[str, Any], hidden: int, becomes: int) -> dict[str, Any]:
    """The hidden size, and what is as wide as it, in its new width."""
    return {name: becomes for name in (HIDDEN_SIZES | {"word_embed_proj_dim"}) & sizes.keys() if sizes[name] == hidden}


def _hidden(sizes: dict[str, Any]) -> dict[str, Any]:
    """Where heads have a size of their own, the hidden size is free."""
    return {"hidden_size": HIDDEN} if _is_size(sizes.get("head_dim")) and sizes.get("hidden_size", 0) > HIDDEN else {}


def _expanded(sizes: dict[str, Any]) -> dict[str, Any]:
    """Mamba's heads make up a multiple of the hidden size."""
    changed = {}
    for expand, size, heads in MAMBA_HEADS:
        if all(_is_size(sizes.get(name)) for name in ("hidden_size", expand, size, heads)):
            changed[heads] = sizes["hidden_size"] * sizes[expand] // sizes[size]
    count = next((n for heads in STATE_HEADS if _is_size(n := {**sizes, **changed}.get(heads))), None)
    for name in STATE_GROUPS & sizes.keys():
        if count and _is_size(sizes[name]):
            changed[name] = min(sizes[name], count)
    return changed


def _narrower(sizes: dict[str, Any]) -> dict[str, Any]:
    """The widths within a layer; of some families a list, one a layer."""
    changed: dict[str, Any] = {}
    for name, size in sizes.items():
        if INNER_WIDTH.search(name):
            if _is_size(size):
                changed[name] = min(size, WIDTH)
            elif isinstance(size, list) and all(_is_size(n) for n in size):
                changed[name] = [min(n, WIDTH) for n in size]
    return changed


def _fewer_experts(sizes: dict[str, Any]) -> dict[str, Any]:
    """As few as leave a choice, in as many groups."""
    active = max((n for name in ACTIVE if _is_size(n := sizes.get(name))), default=0)
    groups = max((n for name in GROUPS if _is_size(n := sizes.get(name))), default=1)
    chosen = sizes.get("topk_group") or 1
    fewest = groups * max(2, -(-(active + 2) // chosen))
    changed = {name: min(there, fewest) for name in EXPERTS if _is_size(there := sizes.get(name))}
    if _is_size(idle := sizes.get("zero_expert_num")):
        changed["zero_expert_num"] = min(idle, 2)
    return changed


def _shorter(sizes: dict[str, Any]) -> dict[str, Any]:
    """Windows that the few tokens exceed, so that a mask in the wrong layer shows."""
    return {name: min(there, WINDOW) for name in WINDOWS if _is_size(there := sizes.get(name))}


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Random weights in place of those on `meta`: matrices of about 1/√D_in, all else around one."""
    pool = torch.randn(POOL, generator=torch.Generator().manual_seed(0))
    made: dict[int, nn.Parameter] = {}  # by the parameter on meta, which tied modules share
    offset = 0
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(_values(parameter.shape, pool, offset), requires_grad=False)
                offset += 1009
            module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            kept = name not in module._non_persistent_buffers_set
            if buffer is not None and kept and buffer.is_floating_point():
                module._buffers[name] = _values(buffer.shape, pool, offset).to(buffer.dtype)
                offset += 1009


def _values(shape: torch.Size, pool: Tensor, offset: int) -> Tensor:
    count, start = shape.numel(), offset % (POOL // 2)
    values = pool[start:].repeat(-(-count // (POOL - start)))[:count].reshape(shape)
    return values / max(shape[-1], 1) ** 0.5 if len(shape) >= 2 else 1.0 + 0.3 * values
