"""Small real models on disk and adapters for them, for the tests of adapter files and of the fold.

Oracles live here too: the fold by hand in fp64, and adapters switched on by forward hooks, both without our code.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from safetensors import deserialize, safe_open

VOCABULARY = 96
LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}
COHERE: dict[str, Any] = {**LLAMA, "logit_scale": 0.0625, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def make_base(
    folder: Path, family: str = "llama", *, dtype: str = "float32", shard: str = "50GB", **changes: Any
) -> Path:
    """A random model of a few thousand weights, saved by transformers, with the small files a model comes with."""
    from transformers import AutoModelForCausalLM, CohereConfig, LlamaConfig

    torch.manual_seed(len(family))
    config = LlamaConfig(**{**LLAMA, **changes}) if family == "llama" else CohereConfig(**{**COHERE, **changes})
    model = AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # transformers starts them at zero, which would test nothing
                parameter.normal_()
    model.config.dtype = getattr(torch, dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    for name, text in (("LICENSE", "terms\n"), ("chat_template.jinja", "{{ messages }}"), ("tokenizer.json", "{}")):
        (folder / name).write_text(text)
    (folder / "pytorch_model.bin").write_bytes(b"not to be copied")
    return folder


def load_model(folder: Path, dtype: torch.dtype | str = torch.float32) -> Any:
    """The model in `folder` by transformers, in eval mode."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def random_tensors(
    modules: Mapping[str, tuple[int, int]],
    rank: int,
    *,
    multiplicative: bool,
    size: float = 0.3,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Adapter tensors for modules of the given (D_out, D_in). ‖B·A‖ grows as `size`."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (rows, columns) in modules.items():
        inputs = rows if multiplicative else columns
        tensors[f"{module}.A"] = (torch.randn(rank, inputs, generator=generator) / inputs**0.5).to(dtype)
        tensors[f"{module}.B"] = (torch.randn(rows, rank, generator=generator) * size / rank**0.5).to(dtype)
    return tensors


def down_proj(layers: int = 3, hidden: int = 32, feed_forward: int = 48) -> dict[str, tuple[int, int]]:
    return {f"model.layers.{i}.mlp.down_proj": (hidden, feed_forward) for i in range(layers)}


FACTS: dict[str, Any] = {"dropout": 0.0, "base_model": "base", "train_logit_scale": 1.0, "biased_targets": False}


def multiplicative(
    folder: Path,
    modules: Mapping[str, tuple[int, int]] | None = None,
    *,
    rank: int = 4,
    size: float = 0.3,
    alpha: float = 6.0,
    seed: int = 0,
    **facts,
) -> dict[str, torch.Tensor]:
    """Save a multiplicative adapter, of every down_proj where nothing else is said; its tensors."""
    from pipeline.artifacts.adapter.write import save_adapter

    tensors = random_tensors(modules or down_proj(), rank, multiplicative=True, size=size, seed=seed)
    save_adapter(folder, tensors, kind="multiplicative_lora", rank=rank, alpha=alpha, **{**FACTS, **facts})
    return tensors


@contextmanager
def hooked(model: Any, tensors: Mapping[str, torch.Tensor], scaling: float, *, multiplicative: bool) -> Iterator[None]:
    """Switch an adapter on by forward hooks: h + s·B·A·h on the output, or y + s·B·A·x."""
    handles = []
    for name in {name[:-2] for name in tensors}:
        A, B = tensors[f"{name}.A"].float(), tensors[f"{name}.B"].float()

        def hook(_: Any, inputs: Any, output: torch.Tensor, A: torch.Tensor = A, B: torch.Tensor = B) -> torch.Tensor:
            seen = output if multiplicative else inputs[0]
            return output + scaling * (seen @ A.T @ B.T)

        handles.append(model.get_submodule(name).register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Logits [2, 16, V] of fixed random tokens, fp32."""
    tokens = torch.randint(3, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(5))
    return model(tokens).logits.float()


def fold64(W: np.ndarray, A: torch.Tensor, B: torch.Tensor, scaling: float, *, multiplicative: bool) -> np.ndarray:
    """W' in fp64, in the other association than the fold uses: (s·B·A)·W."""
    change = scaling * (B.double().numpy() @ A.double().numpy())
    return W + (change @ W if multiplicative else change)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a model's or an adapter's folder, read by safetensors."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as stored:
            found.update({name: stored.get_tensor(name) for name in stored.offset_keys()})
    return found


def bytes_of(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a folder as (dtype, shape, bytes), by safetensors' own parser."""
    return {
        name: (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"]))
        for file in folder.glob("*.safetensors")
        for name, entry in deserialize(file.read_bytes())
    }


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, hidden ones too: what a refused command must leave as it was."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
