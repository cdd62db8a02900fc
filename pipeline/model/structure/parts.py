"""Where a model keeps its decoder layers, its embedding, its last norm and its head: by structure, not by a list of names.

Takes a Hugging Face model; gives the names of these parts within it. The layers are the longest list of modules outside
the parts for images and sound, and the module that holds the list runs them. What has weights and runs before the first
layer or after the last is observed while a tiny copy of the model's own class runs (tiny_copy.py).
"""

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from pipeline.console import UserError
from pipeline.names import is_embedding

# Parts of a model's name within which nothing is a decoder layer of text.
OTHER_SENSES = re.compile(r"(^|[._])(vision|visual|vit|image|video|audio|speech|sound|vq\w*|mtp)([._]|$)")


@dataclass(frozen=True)
class Parts:
    """Names of modules within the whole model.

    `base`: runs the layers, from ids or embeddings to the normed hidden state. `layers`: the list. `entry`, `leaving`: the
    modules with weights of their own, besides the embedding, that run in `base` before the first layer, and after the last.
    `adds`: those of `entry` whose result is added to the hidden state, and not made of it. `tuples`: of how many things what
    each layer returns is a tuple, None for a tensor; of all layers, in order. `axes`: of the hidden state between layers, B rows,
    T tokens, D numbers, and where there are several of it S `streams`. `rereads_ids`: layers are given, beside the hidden
    state, what is made of the token ids (vectors of each layer's own), so that a later stage needs these. `second`: a layer
    gives the next one another tensor beside the hidden state.
    """

    base: str
    layers: str
    embedding: str
    head: str
    entry: tuple[str, ...] = ()
    adds: frozenset[str] = frozenset()
    leaving: tuple[str, ...] = ()
    tuples: tuple[int | None, ...] = field(default=())
    axes: str = "BTD"
    streams: int = 1
    rereads_ids: bool = False
    second: bool = False

    def layer(self, index: int) -> str:
        """The name of a decoder layer."""
        return f"{self.layers}.{index}"


def parts_of(model: Any) -> Parts:
    """The model's parts. Those of a model that `stage.empty_model` or `tiny_copy` made, and of a `Stage`'s, are known, and
    stay what they were when it is cut; any other must be whole."""
    return model.__dict__.get("parts") or find(model)


def base_of(model: nn.Module) -> Any:
    """The module that runs the decoder layers."""
    return model.get_submodule(parts_of(model).base)


def layers_of_model(model: nn.Module) -> nn.ModuleList:
    """The model's decoder layers, in order; a stage's stand-ins for those of others included."""
    return model.get_submodule(parts_of(model).layers)  # type: ignore[return-value]


def embedding_of_model(model: nn.Module) -> Any:
    """The embedding of the tokens; on a stage other than the first, what stands for it."""
    return model.get_submodule(parts_of(model).embedding)


def head_of_model(model: nn.Module) -> Any:
    """The output head; on a stage other than the last, what stands for it."""
    return model.get_submodule(parts_of(model).head)


def carried_width(model: Any) -> int:
    """Numbers of a token that go from stage to stage: those of the hidden state, of all its streams."""
    return int(text_config(model.config).hidden_size) * parts_of(model).streams


def text_config(config: PretrainedConfig) -> Any:
    """The part of a model's config that speaks of its text decoder; of most models, all of it."""
    return config.get_text_config(decoder=True)


def find(model: PreTrainedModel) -> Parts:
    """The parts that can be told without running the model. UserError naming what it lacks."""
    kind, lacks = model.config.model_type, []
    names = {id(module): name for name, module in model.named_modules(remove_duplicate=False)}
    layers = _longest_list(model)
    base = "" if layers is None else layers.rpartition(".")[0]
    if layers is None or not base or "inputs_embeds" not in _takes(model.get_submodule(base)):
        lacks.append("list of decoder layers in a module that takes inputs_embeds")
    embedding, head = _ends(model)
    if embedding is None:
        lacks.append("embedding of tokens")
    if (
        not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward
    ):  # the loss takes its weight and bias
        lacks.append("linear output head")
    if lacks:
        raise UserError(
            f"model_type '{kind}' cannot be cut into stages: {type(model).__name__} has no {', no '.join(lacks)}; what "
            "fits is a decoder of text: an embedding, a list of layers that hand a hidden state on, a linear head"
        )
    assert layers is not None
    # Until the model is observed, whatever else in the base has weights counts as the last norm.
    rest = _with_weights(model.get_submodule(base), base, apart=(layers, names[id(embedding)]))
    return Parts(base, layers, names[id(embedding)], names[id(head)], leaving=tuple(rest))


def _longest_list(model: nn.Module) -> str | None:
    """Of lists within no other list; of equally long ones, the first."""
    lists: dict[str, int] = {}
    for name, module in model.named_modules():
        within = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and not within and not OTHER_SENSES.search(name):
            lists[name] = len(module)
    return max(lists, key=lists.__getitem__, default=None)


def _ends(model: PreTrainedModel) -> tuple[nn.Module | None, nn.Module | None]:
    """The embedding and the head, as the model's class knows them."""
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:
        embedding = next((m for name, m in model.named_modules() if is_embedding(name)), None)
    head = model.get_output_embeddings()
    if head is None:
        rows = text_config(model.config).vocab_size
        head = next(
            (
                m
                for n, m in model.named_modules()
                if isinstance(m, nn.Linear) and m.out_features == rows and "head" in n
            ),
            None,
        )
    return embedding if getattr(embedding, "weight", None) is not None else None, head


def _takes(module: nn.Module) -> set[str]:
    return set(inspect.signature(module.forward).parameters)


def takes_positions(base: nn.Module) -> bool:
    """Whether the module that runs the layers can be told the positions of its tokens; recurrent ones know none."""
    taken = inspect.signature(base.forward).parameters
    return "position_ids" in taken


def reads_weight(parent: nn.Module, leaf: str) -> bool:
    """Whether the code of `parent`'s class takes the weight of its module `leaf` instead of calling it, if only on a GPU.

    Mamba's layers hand the weights of their projections to one kernel: an adapter there would have no part in it.
    """
    return (
        re.search(rf"\bself\.{re.escape(leaf)}\.weight\b(?!\.(dtype|device|shape|ndim))", _source(type(parent)))  # type: ignore[arg-type]
        is not None
    )


def casts_to_weight(parent: nn.Module, leaf: str) -> bool:
    """Whether the code of `parent`'s class turns states into the type of the weight of its module `leaf`, which a packed one
    has no longer: DeepSeek's indexers would choose by states in uint8."""
    return re.search(rf"\.to\((dtype=)?self\.{re.escape(leaf)}\.weight\.dtype\)", _source(type(parent))) is not None  # type: ignore[arg-type]


@lru_cache(maxsize=256)
def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return ""


def _with_weights(base: nn.Module, prefix: str, apart: tuple[str, ...]) -> Iterator[str]:
    """Full names of the modules in `base` with weights of their own that are not in one of `apart`."""
    for name, module in base.named_modules(prefix=prefix):
        kept = any(key not in module._non_persistent_buffers_set for key in module._buffers)
        held = any(p is not None for p in module._parameters.values()) or kept
        if held and name != prefix and not any(name == other or name.startswith(f"{other}.") for other in apart):
            yield name


def _hands_on(output: Any, given: Any) -> bool:
    """Whether a module that turned `given` into `output` hands a hidden state on: both are, of as many dimensions."""
    return (
        isinstance(given, Tensor)
        and given.is_floating_point()
        and isinstance(output, Tensor)
        and given.dim() == output.dim()
    )


@contextmanager
def observed(model: PreTrainedModel) -> Iterator[Callable[[], Parts]]:
    """While the model runs inside: what of it runs before the first layer, and after the last; call the result for it.

    The model's parts must be known as far as `find` knows them.
    """
    parts = parts_of(model)
    base, layers = base_of(model), layers_of_model(model)
    ran: dict[str, list[str]] = {"before": [], "after": []}
    adds: set[str] = set()
    tuples: dict[int, int | None] = {}
    beside: list[Tensor] = []  # what the last layer that has run gave beside the hidden state
    second = [False]
    at = ["outside"]
    names = set(_with_weights(base, parts.base, apart=(parts.layers, parts.embedding)))

    def enters(*_: Any) -> None:
        at[0] = "before"

    def given_to(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        at[0] = "within"
        second[0] = second[0] or any(one is other for one in beside for other in (*args, *kwargs.values()))

    def leaves(index: int, output: Any) -> None:
        beside[:] = [one for one in output[1:] if isinstance(one, Tensor)] if isinstance(output, tuple | list) else []
        tuples[index] = len(output) if isinstance(output, tuple | list) else None
        at[0] = "after" if index == len(layers) - 1 else at[0]

    def notes(name: str, given: tuple[Any, ...], output: Any) -> None:
        if at[0] in ran and name not in ran[at[0]]:
            ran[at[0]].append(name)
            if not _hands_on(output, given[0] if given else None):
                adds.add(name)

    hooks = [
        base.register_forward_pre_hook(enters),
        base.register_forward_hook(lambda *_: at.__setitem__(0, "outside")),
    ]
    for index, layer in enumerate(layers):
        hooks.append(layer.register_forward_pre_hook(lambda _, args, kwargs: given_to(args, kwargs), with_kwargs=True))
        hooks.append(layer.register_forward_hook(lambda _, __, output, i=index: leaves(i, output)))
    for name in sorted(names):
        module = model.get_submodule(name)
        hooks.append(module.register_forward_hook(lambda _, given, output, n=name: notes(n, given, output)))

    def result() -> Parts:
        entry = tuple(ran["before"])
        return replace(
            parts,
            entry=entry,
            adds=frozenset(adds & set(entry)),
            leaving=tuple(ran["after"]),
            tuples=tuple(tuples.get(index) for index in range(len(layers))),
            second=second[0],
        )

    try:
        yield result
    finally:
        for hook in hooks:
            hook.remove()
