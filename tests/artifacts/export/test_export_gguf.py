"""The GGUF export: read back by the gguf package, multiplied out by hand as llama.cpp does, against s·B·A·W in fp64.

llama.cpp (src/llama-adapter.cpp) asks for general.type, general.architecture, adapter.type, and pairs `<name>.lora_a`
of shape {D_in, R} and `.lora_b` of shape {R, D_out} in ggml's order, and applies alpha / R, R = the pair's own; an
alpha of 0 it takes for "no scaling".
"""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from pipeline import version
from pipeline.artifacts.adapter.write import save_adapter
from pipeline.artifacts.export import gguf as export_gguf
from pipeline.artifacts.export.export import export
from pipeline.console import UserError
from tests.helpers.artifacts import FACTS, down_proj, edit_json, make_base, multiplicative, random_tensors, tensors_of

O_PROJ = {f"model.layers.{i}.self_attn.o_proj": (32, 32) for i in range(3)}
NAMES = {
    **{f"model.layers.{i}.mlp.down_proj": f"blk.{i}.ffn_down.weight" for i in range(3)},
    **{f"model.layers.{i}.self_attn.o_proj": f"blk.{i}.attn_output.weight" for i in range(3)},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("models") / "llama", dtype="bfloat16")


@pytest.fixture(scope="module")
def cohere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("models") / "cohere", "cohere", dtype="bfloat16", shard="20KB")


def field(reader: gguf.GGUFReader, key: str) -> object:
    found = reader.get_field(key)
    assert found is not None, key
    return found.contents()


def numbers(tensor: gguf.ReaderTensor) -> np.ndarray:
    """A tensor's values in fp64; bf16 from its bits, which are the upper half of fp32's."""
    if tensor.tensor_type == gguf.GGMLQuantizationType.BF16:
        bits = tensor.data.view(np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32).astype(np.float64)
    return tensor.data.astype(np.float64)


def applied(file: Path) -> dict[str, np.ndarray]:
    """{weight: what llama.cpp adds to it}, from the file alone."""
    reader = gguf.GGUFReader(file)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    alpha, changes = field(reader, "adapter.lora.alpha"), {}
    for name in {name.rsplit(".", 1)[0] for name in stored}:
        a, b = stored.pop(f"{name}.lora_a"), stored.pop(f"{name}.lora_b")
        assert a.shape[1] == b.shape[0]  # in ggml's order: the rank
        changes[name] = float(alpha) / int(b.shape[0]) * (numbers(b) @ numbers(a))  # type: ignore[arg-type]
    assert not stored
    return changes


# One product of 32 terms in fp32, one rounding of the file's dtype on each of A' and B' (half a step is 2⁻⁸ of a value in
# bf16, 2⁻¹¹ in fp16), summed over R = 4 with random signs; in norm over the whole matrix.
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float16", 2**-10), ("bfloat16", 2**-7)])
@pytest.mark.parametrize(("family", "arch"), [("llama", "llama"), ("cohere", "command-r")])
def test_what_llama_cpp_adds_is_s_B_A_W(request, tmp_path: Path, family: str, arch: str, dtype: str, tolerance) -> None:
    base = request.getfixturevalue(family)
    tensors = multiplicative(tmp_path / "adapter", {**down_proj(), **O_PROJ}, base_model="owner/name")
    export(base, tmp_path / "adapter", tmp_path / "out.gguf", format="gguf", dtype=dtype)
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    assert field(reader, "mulora_pipe.version") == version.full()
    assert [field(reader, key) for key in ("general.type", "general.architecture", "adapter.type")] == [
        "adapter",
        arch,
        "lora",
    ]
    assert (field(reader, "adapter.lora.alpha"), field(reader, "general.base_model.0.name")) == (6.0, "owner/name")
    expected_type = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {expected_type}
    changes, weights = applied(tmp_path / "out.gguf"), tensors_of(base)
    assert changes.keys() == set(NAMES.values())
    for module, name in NAMES.items():
        W = weights[f"{module}.weight"].double().numpy()
        A, B = (tensors[f"{module}.{letter}"].double().numpy() for letter in "AB")
        exact = 1.5 * (B @ A) @ W
        assert np.linalg.norm(changes[name] - exact) < tolerance * np.linalg.norm(exact), name


def test_an_additive_adapter_is_written_as_it_is(llama: Path, tmp_path: Path) -> None:
    tensors = random_tensors(down_proj(), 4, multiplicative=False)
    save_adapter(tmp_path / "adapter", tensors, kind="lora", rank=4, alpha=2, **FACTS)
    export(llama, tmp_path / "adapter", tmp_path / "out.gguf", format="gguf")
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert len(stored) == len(tensors)
    for module in down_proj():
        for letter in "AB":
            found = stored[f"{NAMES[module]}.lora_{letter.lower()}"]
            assert np.array_equal(found, tensors[f"{module}.{letter}"].numpy())


@pytest.mark.parametrize("module", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj"])
def test_modules_whose_rows_a_conversion_may_reorder_are_refused(llama: Path, tmp_path: Path, module: str) -> None:
    rows = {"q": 32, "k": 16, "v": 16, "u": 48}[module.split(".")[1][0]]
    chosen = {**down_proj(), f"model.layers.1.{module}": (rows, 32)}
    multiplicative(tmp_path / "adapter", chosen)
    with pytest.raises(UserError, match=rf"1 of the adapter's 4 modules .*layers\.1\.{module}.*convert_lora_to_gguf"):
        export(llama, tmp_path / "adapter", tmp_path / "out.gguf", format="gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_bias_that_would_be_lost_is_refused_and_one_of_zeros_is_not(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = make_base(tmp_path / "base", mlp_bias=True)
    multiplicative(tmp_path / "adapter", biased_targets=True)
    with pytest.raises(UserError, match=r"3 of the adapter's modules have a bias.*s·B·A·b.*merge_lora\.py"):
        export(base, tmp_path / "adapter", tmp_path / "out.gguf", format="gguf")
    assert not (tmp_path / "out.gguf").exists()
    model = AutoModelForCausalLM.from_pretrained(base)
    for layer in model.model.layers:
        layer.mlp.down_proj.bias.data.zero_()
    model.save_pretrained(base)
    export(base, tmp_path / "adapter", tmp_path / "out.gguf", format="gguf")
    assert len(applied(tmp_path / "out.gguf")) == 3


def test_an_unknown_family_is_refused_by_name(llama: Path, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    edit_json(base / "config.json", model_type="gpt2")
    multiplicative(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"model_type 'gpt2'.*--format peft"):
        export(base, tmp_path / "adapter", tmp_path / "out.gguf", format="gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_every_family_of_the_table_has_its_modules_in_gguf_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models themselves, one layer on meta: each has an output-side Linear that writes the hidden size."""
    from transformers import AutoConfig, AutoModelForCausalLM

    known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    for family, arch in export_gguf.ARCHITECTURES.items():
        config = AutoConfig.for_model(family, num_hidden_layers=1, num_key_value_heads=8)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        table = gguf.get_tensor_name_map(known[arch], 1)
        found = set()
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and table.get_type(name) in export_gguf.OUTPUT_SIDE:
                assert module.out_features == config.hidden_size, (family, name)
                found.add(table.get_name(name))
        assert "blk.0.attn_output" in found, family
        assert found & {"blk.0.ffn_down", "blk.0.ffn_down_shexp"} or family in ("mixtral", "qwen3_moe"), family
