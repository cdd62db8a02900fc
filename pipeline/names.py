"""What names say: the layer of a module, the order of layers, the head and the embedding, the model that is meant.

Takes names of modules and tensors ('model.layers.3.mlp.down_proj.weight'), of files of weights, layers as a user writes
them ('0:10,20'), and names of models (a folder or a Hub id); gives numbers, sort keys, and names that may be shared.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path

# As transformers names them in the models that a stage can be cut from.
HEAD_MODULE, EMBEDDING_MODULE = "lm_head", "embed_tokens"
HEAD, EMBEDDING = f"{HEAD_MODULE}.weight", f"{EMBEDDING_MODULE}.weight"
# What other models, and adapters of them, call the two.
EMBEDDINGS = (EMBEDDING_MODULE, "wte", "word_embeddings", "embed_in", "tok_embeddings", "embeddings")
HEADS = (HEAD_MODULE, "embed_out")
# What chooses a token's experts: small, and a rounding there sends tokens elsewhere. qlora-pipe leaves out `gate` too.
ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})

# The files of a model's folder that transformers reads weights from.
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Weights in any format, and pickles.
WEIGHT_SUFFIXES = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".pkl",
    ".pickle",
    ".gguf",
    ".ggml",
    ".h5",
    ".msgpack",
    ".onnx",
    ".onnx_data",
    ".npz",
    ".tflite",
    ".index.json",
)

LAYER_RANGES = re.compile(r"\s*\d+\s*(:\s*\d+\s*)?(,\s*\d+\s*(:\s*\d+\s*)?)*")
_LAYER = re.compile(r"\.(\d+)(?:\.|$)")


def layer_of(name: str) -> int | None:
    """The layer of a module or tensor: the first number in its name; None for the embedding, the head and the last norm."""
    found = _LAYER.search(name)
    return int(found[1]) if found else None


def layers_of(names: Iterable[str]) -> list[int]:
    """The layers that `names` are in, each once, in order."""
    return sorted({layer for name in names if (layer := layer_of(name)) is not None})


def within_layer(name: str) -> str:
    """'model.layers.3.mlp.down_proj' → 'mlp.down_proj'; a name without a layer as it is."""
    found = _LAYER.search(name)
    return name[found.end() :] if found else name


def any_layer(name: str) -> str:
    """The name with '*' for its numbers: 'model.layers.3.mlp.down_proj' → 'model.layers.*.mlp.down_proj'."""
    return re.sub(r"\.\d+(?=\.)", ".*", name)


def natural_order(name: str) -> list[tuple[int, str]]:
    """A sort key that puts `layers.2` before `layers.10`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def holders(name: str) -> list[str]:
    """The modules around a parameter: 'a.b.c' → ['a.b', 'a']."""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1)]


def last_part(name: str) -> str:
    """'model.layers.3.mlp.down_proj' → 'down_proj'."""
    return name.rpartition(".")[2]


def is_embedding(module: str) -> bool:
    """Whether a module is the embedding of the tokens, by its name."""
    return last_part(module) in EMBEDDINGS


def is_router(name: str) -> bool:
    """Whether a module or tensor is, or is part of, what chooses a token's experts, by its name."""
    return not ROUTERS.isdisjoint(name.split("."))


def is_head(module: str) -> bool:
    """Whether a module is the output head, by its name."""
    return last_part(module) in HEADS


def layer_ranges(text: str) -> list[tuple[int, int]]:
    """'0:10,20' → [(0, 10), (20, 20)]; both ends inclusive, as in qlora-pipe. Raises ValueError."""
    if not LAYER_RANGES.fullmatch(text):
        raise ValueError("write layers as '0:38' (both ends included), '5', or several such separated by commas")
    ranges = []
    for part in text.split(","):
        first, _, last = part.partition(":")
        low, high = int(first), int(last or first)
        if high < low:
            raise ValueError(f"'{part.strip()}' runs backwards: write '{high}:{low}'")
        ranges.append((low, high))
    return ranges


def as_ranges(layers: Iterable[int]) -> str:
    """Layer numbers as `layer_ranges` reads them: [0, 1, 2, 7] → '0:2,7'."""
    parts: list[list[int]] = []
    for layer in sorted(set(layers)):
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}:{part[-1]}" for part in parts)


def hub_model(text: str) -> tuple[str, str | None] | None:
    """'OWNER/NAME' or 'OWNER/NAME@REVISION' as the two (None: the Hub's default branch); None for what names no repository."""
    found = re.fullmatch(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w-][\w.-]*(?:/[\w-][\w.-]*)*))?", text)
    return (found[1], found[2]) if found and not text.lower().endswith(".gguf") else None


def public_name(base_model: str) -> str:
    """A Hub id (`owner/name`) as it is; of a path, the last part: an adapter that is shared tells no private paths."""
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", base_model) and not os.path.exists(base_model):
        return base_model
    return Path(os.path.abspath(os.path.expanduser(base_model))).name


def loadable_name(base_model: str) -> str:
    """What transformers loads on this machine: a Hub id as it is, the whole path of a folder that is there.

    Of a folder that is not there, the last part of its path.
    """
    name, folder = public_name(base_model), Path(os.path.abspath(os.path.expanduser(base_model)))
    return name if (name == base_model and "/" in name) or not folder.is_dir() else str(folder)


def id_in_cache(folder: Path) -> str | None:
    """OWNER/NAME of a model that lies in a Hub cache (models--OWNER--NAME/snapshots/...), as it is or behind links."""
    for place in (folder.absolute(), folder.resolve()):
        for part in place.parts:
            if part.startswith("models--") and part.count("--") == 2:
                return part.removeprefix("models--").replace("--", "/")
    return None
