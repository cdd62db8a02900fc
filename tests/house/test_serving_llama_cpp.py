"""llama.cpp itself on the GGUF LoRA: its logits, against transformers on the folded model.

Skipped unless `llama_cpp` (PyPI llama-cpp-python) can be imported; the project does not depend on it. The base models
are written as GGUF by hand, f32, without a vocabulary. What a conversion does to them is below: Llama-like models' q and
k are permuted, because llama.cpp rotates neighbours where transformers rotates halves; Cohere rotates neighbours in both.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from pipeline.artifacts.export.export import export
from pipeline.artifacts.fold.merge import merge
from tests.helpers.artifacts import VOCABULARY, down_proj, load_model, make_base, multiplicative, tensors_of

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
pytestmark = pytest.mark.slow

OUTPUTS = {**down_proj(), **{f"model.layers.{i}.self_attn.o_proj": (32, 32) for i in range(3)}}
ARCHITECTURES = {"llama": "llama", "cohere": "command-r"}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# Both in fp32, three layers of width 32 to 48: a few hundred roundings of 6e-8, and exp and the rotations by other code.
RELATIVE = 1e-5


def gguf_name(name: str) -> str:
    """A tensor's name in GGUF: model.layers.2.mlp.down_proj.weight is blk.2.ffn_down.weight."""
    module = name.removesuffix(".weight")
    if module in NAMES:
        return f"{NAMES[module]}.weight"
    _, _, layer, inside = module.split(".", 3)
    return f"blk.{layer}.{NAMES[inside]}.weight"


def neighbours(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k: in each head, (x₀ … x₋₁, y₀ … y₋₁), of which x and y are rotated together, to x₀, y₀, x₁, y₁, …"""
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def write_gguf_model(folder: Path, file: Path, family: str) -> None:
    """The model in `folder` as a GGUF file of fp32 tensors, without a vocabulary."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    writer = gguf.GGUFWriter(file, ARCHITECTURES[family])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if family == "cohere":
        writer.add_logit_scale(config.logit_scale)
        writer.add_layer_norm_eps(config.layer_norm_eps)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for name, tensor in tensors_of(folder).items():
        values = tensor.float().numpy()
        which = name.split(".")[-2]
        if family == "llama" and which in heads:
            values = neighbours(values, heads[which])
        writer.add_tensor(gguf_name(name), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tokens() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(5))


def load(model: Path, **settings: Any) -> Any:
    """The model in llama.cpp, its cache in fp32 (fp16 where nothing is said)."""
    return llama_cpp.Llama(
        str(model),
        n_ctx=32,
        n_batch=32,
        n_threads=1,
        logits_all=True,
        flash_attn=False,
        verbose=False,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        **settings,
    )


def by_llama_cpp(model: Path, lora: Path | None = None, scale: float = 1.0) -> np.ndarray:
    """Logits [2, 24, V] of `tokens`."""
    found = []
    for row in tokens().tolist():
        loaded = load(model, lora_path=None if lora is None else str(lora), lora_scale=scale)
        loaded.eval(row)
        found.append(np.array(loaded.scores[: len(row)]))
        loaded.close()
    return np.stack(found).astype(np.float64)


@torch.no_grad()
def by_transformers(folder: Path) -> np.ndarray:
    logits: torch.Tensor = load_model(folder)(tokens()).logits
    return logits.double().numpy()


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """A base, as a folder and as GGUF, and an adapter with s = 1.5 on every down_proj and o_proj of it."""
    folder = tmp_path_factory.mktemp(request.param)
    base = make_base(folder / "base", request.param)
    write_gguf_model(base, folder / "base.gguf", request.param)
    multiplicative(folder / "adapter", OUTPUTS)
    return {"base": base, "gguf": folder / "base.gguf", "adapter": folder / "adapter", "family": request.param}


def test_the_base_is_the_same_model(served: Mapping[str, Any]) -> None:
    assert distance(by_llama_cpp(served["gguf"]), by_transformers(served["base"])) < RELATIVE


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_the_adapter_is_what_the_fold_is(served: Mapping[str, Any], tmp_path: Path, scale: float) -> None:
    """The factor of llama.cpp's --lora-scaled is that of merge_lora.py's --scale."""
    export(served["base"], served["adapter"], tmp_path / "x.gguf", format="gguf")
    merge(served["base"], [served["adapter"]], tmp_path / "folded", scale=scale)
    expected = by_transformers(tmp_path / "folded")
    assert distance(by_llama_cpp(served["gguf"], tmp_path / "x.gguf", scale), expected) < RELATIVE
    assert distance(by_transformers(served["base"]), expected) > 1e-2


# A step is 2⁻¹⁰ of a value in fp16, 2⁻⁷ in bf16. A', B', and in llama.cpp's 16-bit products x and A'·x too, are rounded: an
# error of half a step each at most, and, of random signs, a fraction of that in norm. Relative to what the adapter does.
@pytest.mark.parametrize(("dtype", "step"), [("float16", 2**-10), ("bfloat16", 2**-7)])
def test_sixteen_bits_lose_a_rounding(served: Mapping[str, Any], tmp_path: Path, dtype: str, step: float) -> None:
    export(served["base"], served["adapter"], tmp_path / "x.gguf", format="gguf", dtype=dtype)
    merge(served["base"], [served["adapter"]], tmp_path / "folded")
    expected, before = by_transformers(tmp_path / "folded"), by_transformers(served["base"])
    found = by_llama_cpp(served["gguf"], tmp_path / "x.gguf")
    assert np.linalg.norm(found - expected) < step * np.linalg.norm(expected - before)


def test_a_folded_model_is_served_as_any_other(served: Mapping[str, Any], tmp_path: Path) -> None:
    merge(served["base"], [served["adapter"]], tmp_path / "folded")
    write_gguf_model(tmp_path / "folded", tmp_path / "folded.gguf", served["family"])
    assert distance(by_llama_cpp(tmp_path / "folded.gguf"), by_transformers(tmp_path / "folded")) < RELATIVE


def test_an_adapter_of_another_architecture_is_refused(served: Mapping[str, Any], tmp_path: Path) -> None:
    other = make_base(tmp_path / "other", {"llama": "cohere", "cohere": "llama"}[served["family"]])
    multiplicative(tmp_path / "adapter", OUTPUTS)
    export(other, tmp_path / "adapter", tmp_path / "x.gguf", format="gguf")
    loaded = load(served["gguf"])
    assert not llama_cpp.llama_adapter_lora_init(loaded.model, str(tmp_path / "x.gguf").encode())
    export(served["base"], served["adapter"], tmp_path / "fits.gguf", format="gguf")
    assert llama_cpp.llama_adapter_lora_init(loaded.model, str(tmp_path / "fits.gguf").encode())
