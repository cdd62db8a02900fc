"""A base model's folder as it lies on disk: the one reader of its files, and the one rule for tied heads.

Takes a folder with `config.json` and one `model.safetensors`, or several and their index; gives a `Base`: where every
tensor's bytes are, and the config as plain JSON. Headers are read here, and of weights only a head and an embedding that
are both stored while the config ties them. What is taken, and how names are looked for, follows transformers' loader.
Also says which of the folder's other files belong to the model and are to be copied along.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from pipeline.console import UserError, warn
from pipeline.foreign import printable, read_object
from pipeline.formats.dtypes import FLOATS
from pipeline.formats.links import check_links
from pipeline.formats.safetensors import Header, StoredTensor, read_floats, read_header, read_pieces
from pipeline.names import HEAD, INDEX, SINGLE, WEIGHT_SUFFIXES, is_embedding

WITH_STOPS = ("generation_config.json", "config.json")  # where a model says at which ids it stops, the first there is

ADAPTER_CONFIG = "adapter_config.json"  # would make transformers look for an adapter in the result
LEFT_OUT_NAMES = (ADAPTER_CONFIG,)

# What quantisers store beside a weight, or in its place, by the ends of names: x.weight_scale_inv, x.SCB, x.qweight, …
SCALES = ("_scale_inv", "_scale", "_scale_2", ".scale", ".scales", ".SCB", ".scale_weight", ".absmax")
PACKED = (".qweight", ".weight_packed", "_blocks")
COMPARED_ITEMS = 2**20
# What is read of config.json here and in the fold, and what it is where it is not null.
CONFIG_TYPES = {"model_type": str, "text_config": dict, "tie_word_embeddings": bool}


@dataclass(frozen=True)
class Base:
    """A base model. `tensors` maps a tensor's name, as it is stored, to its place; `headers` a file's name to what it holds.

    `taken`: which file the weights are read from, in words. `remarks`: what else lies in the folder and is not read,
    though a reader might expect it: a sentence each.
    """

    folder: Path
    headers: dict[str, Header]
    tensors: dict[str, StoredTensor]
    index: dict[str, Any] | None
    config: dict[str, Any]
    taken: str
    remarks: tuple[str, ...]

    def find(self, name: str) -> StoredTensor | None:
        """The place of the causal model's tensor `name`: under its own name, or without the base model's prefix.

        AutoModel saves `model.layers.0.…` as `layers.0.…`. A tied head is not looked for under the embedding's name:
        `head_of` does that.
        """
        return self.tensors.get(name) or self.tensors.get(name.partition(".")[2])


@dataclass(frozen=True)
class Head:
    """Where the head and the embedding of a causal model are stored: one place where the file holds one for both.

    `tied`: whether they are one weight. One that is None is in no file.
    """

    head: StoredTensor | None
    embedding: StoredTensor | None
    tied: bool


def read_base(folder: Path, asked: str = "--input") -> Base:
    """Read the headers and the config of a model's folder; a single file goes before an index, as in transformers.

    `asked`: the key or flag that named the folder, with which messages about it begin. Raises UserError where the folder
    holds no safetensors model, is incomplete, has a link that leads out of it, or is quantised (its packed weights cannot
    take a small change: fold into the 16-bit original).
    """
    if not folder.is_dir():
        raise UserError(f"{asked}: there is no folder {printable(folder)}.")
    check_links(folder)
    config = read_object(folder / "config.json", f"{asked}: a model's folder has one")
    _check_types(folder, config)
    _check_not_quantised(folder, config)
    names = _files_taken(folder, config, asked)
    if names == [SINGLE]:
        index, headers = None, {SINGLE: read_header(folder / SINGLE)}
    else:
        index = read_object(folder / INDEX, "the index of the weights")
        headers = _indexed_headers(folder, index)
    tensors = {tensor.name: tensor for header in headers.values() for tensor in header.tensors}
    _check_scales(folder, tensors)
    taken = SINGLE if index is None else f"{len(headers)} files of {INDEX}"
    return Base(folder, headers, tensors, index, config, taken, _remarks(folder, index))


def has_weights(folder: Path) -> bool:
    """Whether `read_base` would find weights in the folder, whole or not."""
    return (folder / SINGLE).is_file() or (folder / INDEX).is_file()


def warn_of_remarks(base: Base) -> None:
    """Warn of what lies beside the weights that were taken and is not read."""
    for remark in base.remarks:
        warn(remark)


def head_of(base: Base, ties: bool | None = None) -> Head:
    """Where the head and the embedding are stored, and whether they are one weight, as transformers loads them.

    `ties`: what the model's config says, with its family's default; without it, what config.json says by itself. Of two
    that are tied the file may hold either. Where it holds both and they differ, they are two, whatever the config says;
    finding that out reads both.
    """
    ties = config_ties(base.config) if ties is None else ties
    head, table = base.find(HEAD), embedding_of(base)
    if head is not None and table is not None:
        return Head(head, table, tied=ties is True and same_values(head, table))
    if ties is False:
        return Head(head, table, tied=False)
    return Head(head or table, table or head, tied=True)


def config_ties(config: dict[str, Any]) -> bool | None:
    """What config.json says about the head: tied, not tied, or nothing (then its family's default holds)."""
    text = config.get("text_config")
    for part in (text if isinstance(text, dict) else {}, config):
        if isinstance(said := part.get("tie_word_embeddings"), bool):
            return said
    return None


def untie(config: dict[str, Any]) -> None:
    """Mark head and embedding as untied in `config`, and in its text_config where that has its own value."""
    text = config.get("text_config")
    if isinstance(text, dict) and "tie_word_embeddings" in text:
        text["tie_word_embeddings"] = False
    config["tie_word_embeddings"] = False


def same_values(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two stored tensors hold the same numbers. Reads until the first difference, in pieces."""
    stamps = tuple((tensor.file.stat().st_mtime_ns, tensor.file.stat().st_size) for tensor in (one, other))
    return _same_values(one, other, stamps)


@lru_cache(maxsize=8)
def _same_values(one: StoredTensor, other: StoredTensor, stamps: tuple[tuple[int, int], ...]) -> bool:
    """Remembered while the files stay as they are: an embedding has gigabytes, and a run asks more than once."""
    if one.shape != other.shape:
        return False
    if one.dtype not in FLOATS or other.dtype not in FLOATS:
        same = one.dtype == other.dtype
        return same and all(a == b for a, b in zip(read_pieces(one), read_pieces(other), strict=True))
    pieces = zip(read_floats(one, 1, COMPARED_ITEMS), read_floats(other, 1, COMPARED_ITEMS), strict=True)
    return all(torch.equal(a.double(), b.double()) for a, b in pieces)


def embeddings_of(base: Base) -> list[str]:
    """Names of the tensors that are an embedding of tokens, by name and shape."""
    found = [name for name in base.tensors if name.endswith(".weight") and is_embedding(name.removesuffix(".weight"))]
    return [name for name in found if len(base.tensors[name].shape) == 2]


def embedding_of(base: Base) -> StoredTensor | None:
    """The model's embedding; None where several might be it, or none is found.

    Layers that predict further tokens bring copies of it under longer names.
    """
    found = embeddings_of(base)
    fewest = min((name.count(".") for name in found), default=0)
    shortest = [name for name in found if name.count(".") == fewest]
    return base.tensors[shortest[0]] if len(shortest) == 1 else None


def _files_taken(folder: Path, config: dict[str, Any], asked: str) -> list[str]:
    if named := config.get("transformers_weights"):
        raise UserError(
            f"{folder / 'config.json'}: transformers_weights = {printable(named)!r} names the weights, which is not built: "
            f"save the model again with save_pretrained, which calls them {SINGLE}."
        )
    if (folder / SINGLE).is_file():
        return [SINGLE]
    if (folder / INDEX).is_file():
        return [INDEX]
    raise UserError(f"{asked}: {folder} holds neither {SINGLE} nor {INDEX}.{_what_else(folder)}")


def _check_types(folder: Path, config: dict[str, Any]) -> None:
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key, kind in CONFIG_TYPES.items():
            if not isinstance(value := part.get(key), kind | None):
                raise UserError(f"{folder / 'config.json'}: {key} = {printable(value, 60)} is no {kind.__name__}.")


def _check_not_quantised(folder: Path, config: dict[str, Any]) -> None:
    text = config.get("text_config")
    quantised = config.get("quantization_config") or (isinstance(text, dict) and text.get("quantization_config"))
    if not quantised:
        return
    method = quantised.get("quant_method", "an unnamed method") if isinstance(quantised, dict) else quantised
    raise UserError(
        f"{folder} is quantised ({printable(method)}). A change of a few percent is lost in packed weights: "
        "take the original 16-bit model, and quantise the result."
    )


def _check_scales(folder: Path, tensors: dict[str, StoredTensor]) -> None:
    """Raise UserError for weights that mean nothing without the scales beside them, though the config says no word."""
    for name, tensor in tensors.items():
        packed = name.endswith(PACKED) and tensor.dtype not in FLOATS
        stem = next((name.removesuffix(end) for end in SCALES if name.endswith(end)), None)
        weight = stem and (tensors.get(stem) or tensors.get(f"{stem}.weight"))
        if packed or (weight and weight.dtype not in FLOATS):
            what = f"{weight.name} is {weight.dtype}, to be multiplied by {name}" if weight else f"{name} is packed"
            raise UserError(
                f"{folder} is quantised, though config.json has no quantization_config: {printable(what)}. Without the "
                "quantiser these numbers are not the weights: take the original 16-bit model."
            )


def _indexed_headers(folder: Path, index: dict[str, Any]) -> dict[str, Header]:
    """The headers of an index's files, where the index and the files name the same tensors in the same places."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{folder / INDEX} has no weight_map; the download is incomplete.")
    if not isinstance(index.get("metadata"), dict | None):
        raise UserError(f"{folder / INDEX}: its metadata is not a JSON object. The file is damaged.")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name or not name.isprintable() or len(name.encode()) > 255:
            raise UserError(
                f"{folder / INDEX} places {printable(tensor)!r} in {printable(name)!r}, which is not "
                "the name of a file in this folder."
            )
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} of {len(names)} files of weights are missing, {printable(missing[0])} first; {INDEX} "
            "names them, so the download is incomplete."
        )
    headers = {name: read_header(folder / name) for name in names}
    held = {(tensor.name, name) for name, header in headers.items() for tensor in header.tensors}
    differing = sorted(held ^ set(weight_map.items()))
    if differing:
        tensor, file = differing[0]
        where = "is not in the index" if (tensor, file) in held else f"is not in {file}, where the index places it"
        if tensor in weight_map and (tensor, weight_map[tensor]) in held and (tensor, file) in held:
            where = f"is in {file} and in {weight_map[tensor]}"
        raise UserError(
            f"{folder}: the files and {INDEX} disagree on {len(differing)} tensors: {printable(tensor)!r} {where}."
        )
    return headers


def _remarks(folder: Path, index: dict[str, Any] | None) -> tuple[str, ...]:
    found = []
    if index is None and (folder / INDEX).is_file():
        found.append(
            f"{folder} holds {SINGLE} and {INDEX}: the single file is read, as in transformers, and the index and the "
            "files it names are not. Remove what is left over from another download."
        )
    if (folder / ADAPTER_CONFIG).is_file():
        found.append(
            f"{folder} holds {ADAPTER_CONFIG} beside the model: the weights are read without that adapter, which "
            "transformers would load on top of them."
        )
    return tuple(found)


def _what_else(folder: Path) -> str:
    if (folder / ADAPTER_CONFIG).is_file():
        return f" {ADAPTER_CONFIG} says that it is an adapter: give the folder of the model that it was trained on."
    if pickles := sorted(folder.glob("pytorch_model*.bin")) or sorted(folder.glob("*.bin")):
        return (
            f" It has {printable(pickles[0].name)}, a pickle, which can run code when it is read: load the model with "
            "transformers and save it again (save_pretrained writes safetensors)."
        )
    if any(folder.glob("*.gguf")):
        return " It has a GGUF file: take the original model; a folded one can be converted again."
    if other := sorted(path.name for path in folder.iterdir() if path.name.lower().endswith(".safetensors")):
        return f" It has {printable(other[0])}, a name under which transformers does not look for weights."
    return " There are no weights in it."


def files_to_copy(folder: Path) -> list[Path]:
    """The files of a model's folder that are not weights, relative to it: config, tokenizer, chat template, licence ...

    Hidden files and folders (`.git`, `.cache`) are left out. Raises UserError for a link that leads out of the folder.
    """
    check_links(folder)
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    return [
        file
        for file in files
        if not any(part.startswith(".") for part in file.parts)
        and not file.name.lower().endswith(WEIGHT_SUFFIXES)
        and file.name not in LEFT_OUT_NAMES
    ]


def stop_ids(folder: Path) -> list[int]:
    """At which a server stops beside the tokenizer's EOS: `eos_token_id` of the model's generation_config.json; of its
    config.json where there is no such file, as transformers has it."""
    file = next((file for name in WITH_STOPS if (file := folder / name).is_file()), None)
    if file is None:
        return []
    ids = read_object(file, "where the model stops").get("eos_token_id")
    return [id for id in (ids if isinstance(ids, list) else [ids]) if type(id) is int]


def with_stops(folder: Path, more: Sequence[int]) -> dict[str, Any]:
    """The model's generation_config.json with `more` ids at which it stops; made of its config.json where there is none."""
    own = folder / WITH_STOPS[0]
    if own.is_file():
        there = read_object(own, "how the model generates")
    else:
        config = read_object(folder / WITH_STOPS[1], "the model's configuration")
        there = {key: config[key] for key in ("bos_token_id", "pad_token_id") if type(config.get(key)) is int}
    ids = list(dict.fromkeys([*stop_ids(folder), *more]))
    return {**there, "eos_token_id": ids if len(ids) > 1 else ids[0]}
