"""A base model's folder as it lies on disk.

Takes a folder with `config.json` and one `model.safetensors`, or several and their index; gives a `Base`: where every
tensor's bytes are, and the config as plain JSON. No weight is read here. Also says which of the folder's other files
belong to the model and are to be copied along.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.console import UserError
from pipeline.foreign import read_object
from pipeline.formats.safetensors import Header, StoredTensor, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Weights in any format, and pickles. `adapter_config.json` would make transformers look for an adapter in the result.
WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx",
    ".onnx_data", ".npz", ".tflite", ".index.json",
)  # fmt: skip
LEFT_OUT_NAMES = ("adapter_config.json",)


@dataclass(frozen=True)
class Base:
    """A base model. `tensors` maps a tensor's name to its place; `headers` a file's name to what it holds."""

    folder: Path
    headers: dict[str, Header]
    tensors: dict[str, StoredTensor]
    index: dict[str, Any] | None
    config: dict[str, Any]


def read_base(folder: Path) -> Base:
    """Read the headers and the config of a model's folder; a single file goes before an index, as in transformers.

    Raises UserError where the folder is no model in safetensors, is incomplete, or is quantised (its packed weights
    cannot take a small change: fold into the 16-bit original).
    """
    if not folder.is_dir():
        raise UserError(f"--input: there is no folder {folder}.")
    config = read_object(folder / "config.json", "--input: a model's folder has one")
    quantised = config.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method", "an unnamed method") if isinstance(quantised, dict) else quantised
        raise UserError(
            f"{folder} is quantised ({method}). A change of a few percent is lost in packed weights: "
            "fold into the original 16-bit model and quantise the result."
        )
    if (folder / SINGLE).is_file():
        index, headers = None, {SINGLE: read_header(folder / SINGLE)}
    elif (folder / INDEX).is_file():
        index = read_object(folder / INDEX, "the index of the weights")
        headers = _indexed_headers(folder, index)
    else:
        raise UserError(f"{folder} holds neither {SINGLE} nor {INDEX}.{_what_else(folder)}")
    tensors = {tensor.name: tensor for header in headers.values() for tensor in header.tensors}
    return Base(folder, headers, tensors, index, config)


def _indexed_headers(folder: Path, index: dict[str, Any]) -> dict[str, Header]:
    """The headers of an index's files, where the index and the files name the same tensors in the same places."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{folder / INDEX} has no weight_map.")
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder}: {len(missing)} of {len(names)} files of weights are missing, {missing[0]} first.")
    headers = {name: read_header(folder / name) for name in names}
    held = {(tensor.name, name) for name, header in headers.items() for tensor in header.tensors}
    differing = sorted(held ^ set(weight_map.items()))
    if differing:
        tensor, file = differing[0]
        where = "is not in the index" if (tensor, file) in held else f"is not in {file}, where the index places it"
        raise UserError(f"{folder}: the files and {INDEX} disagree on {len(differing)} tensors: {tensor!r} {where}.")
    return headers


def _what_else(folder: Path) -> str:
    if any(folder.glob("pytorch_model*.bin")):
        return (
            " It holds pytorch_model.bin, a pickle, which can run code when it is read: load the model with "
            "transformers and save it again (save_pretrained writes safetensors)."
        )
    if any(folder.glob("*.gguf")):
        return " It holds a GGUF file: fold into the original model and convert the result."
    return ""


def files_to_copy(folder: Path) -> list[Path]:
    """The files of a model's folder that are not weights, relative to it: config, tokenizer, chat template, licence ...

    Hidden files and folders (`.git`, `.cache`) are left out.
    """
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    return [
        file
        for file in files
        if not any(part.startswith(".") for part in file.parts)
        and not file.name.lower().endswith(WEIGHT_SUFFIXES)
        and file.name not in LEFT_OUT_NAMES
    ]
