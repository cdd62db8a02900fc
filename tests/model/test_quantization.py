"""Quantised bases: bit for bit what transformers makes of the same folder, on any number of stages, one tensor at a time.

In train mode and with sizes that are multiples of 64: on some processors bitsandbytes takes another way in eval mode.
"""

import copy
import gc
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from pipeline.console import UserError
from pipeline.formats import nf4
from pipeline.model import quantized, quantized_bnb
from pipeline.model.fusion import apply as fusion
from pipeline.model.stage import Stage, check_head, empty_model
from tests.helpers import builders
from tests.helpers.quantization import (
    NF4,
    SCHEMES,
    SIZES,
    adapt,
    build,
    chain,
    save_model,
    stored,
    theirs,
    with_placeholders,
)
from tests.helpers.stages import hidden, token_ids

EIGHT = NF4._replace(bits=8)
over_schemes = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Cohere has a parallel block and a tied head, Qwen2 has biases."""
    root = tmp_path_factory.mktemp("models")
    return {kind: save_model(root / kind, kind) for kind in ("llama", "cohere", "qwen2")}


# Against transformers


@over_schemes
@pytest.mark.parametrize("kind", ["llama", "cohere", "qwen2"])
def test_weights_and_forward_are_those_of_transformers(folders: dict[str, Path], kind: str, scheme: Any) -> None:
    whole, ids = theirs(folders[kind], scheme), token_ids()
    expected = whole.base_model(ids)[0].detach()
    for cuts in ([0, 4], [0, 1, 4]):
        stages = chain(folders[kind], scheme, cuts)
        assert torch.equal(hidden(stages, ids), expected), "not a bit of difference"
        names = [name for stage in stages for name in dict(stage.model.named_parameters()) if name != "lm_head.weight"]
        assert sorted(names) == sorted(n for n in dict(whole.named_parameters()) if n != "lm_head.weight")
        for stage in stages:
            compare(stage, whole)


def compare(stage: Stage, whole: Any) -> None:
    for name, parameter in stage.model.named_parameters():
        module, other = (m.get_submodule(name.rpartition(".")[0]) for m in (stage.model, whole))
        assert not parameter.requires_grad
        if isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt) and name.endswith("weight"):
            ours, expected = (
                stored(parameter, module.state if hasattr(module, "state") else None),
                stored(other.weight, getattr(other, "state", None)),
            )
            assert ours.keys() == expected.keys()
            assert all(torch.equal(ours[key], expected[key]) for key in ours), name
        else:
            assert torch.equal(parameter, whole.get_parameter(name)), name


@pytest.mark.parametrize("scheme", [NF4, EIGHT], ids=["nf4", "8-bit"])
def test_in_bf16_too(folders: dict[str, Path], scheme: Any) -> None:
    scheme = scheme._replace(compute_dtype=torch.bfloat16)
    expected = theirs(folders["llama"], scheme, torch.bfloat16).base_model(token_ids())[0]
    stages = chain(folders["llama"], scheme, [0, 2, 4], torch.bfloat16)
    assert torch.equal(hidden(stages, token_ids()), expected)


def test_skipped_modules_are_those_transformers_skips(folders: dict[str, Path]) -> None:
    for skip in (("o_proj", "down_proj"), ("model.layers.1",), (r"model.layers.[02].mlp",)):
        scheme = NF4._replace(skip=skip)
        ours, whole = build(folders["llama"], scheme, 0, 4), theirs(folders["llama"], scheme)
        quantised = [
            {n for n, p in model.named_parameters() if p.dtype == torch.uint8} for model in (ours.model, whole)
        ]
        assert quantised[0] == quantised[1]
        assert 0 < len(quantised[0]) < 28


def test_embedding_head_and_norms_stay(folders: dict[str, Path]) -> None:
    stage = build(folders["cohere"], NF4, 0, 4)
    plain = {n for n, p in stage.model.named_parameters() if p.is_floating_point()}
    norms = {f"model.layers.{i}.input_layernorm.weight" for i in range(4)} | {"model.norm.weight"}
    assert plain == norms | {"model.embed_tokens.weight"}, "the head is the embedding"


@over_schemes
def test_foreseen_bytes_are_those_that_are_stored(folders: dict[str, Path], scheme: Any) -> None:
    before, stage = with_placeholders(folders["qwen2"], scheme, 0, 4), build(folders["qwen2"], scheme, 0, 4)
    said = sum(p.numel() * p.element_size() for p in before.parameters()) - quantized.saved_bytes(before)
    found = 0
    for parameter in stage.parameters():
        tensors = [parameter] if parameter.is_floating_point() else stored(parameter).values()
        found += sum(t.numel() * t.element_size() for t in tensors)
    assert said == found
    assert quantized.saved_bytes(stage) == 0


# In a stage


@pytest.mark.parametrize("scheme", [NF4, EIGHT], ids=["nf4", "8-bit"])
def test_checks_of_a_stage_and_evaluation_change_nothing(folders: dict[str, Path], scheme: Any) -> None:
    """In eval mode some processors' bitsandbytes repacks 4-bit weights, after which dequantising them is wrong."""
    stages = chain(folders["cohere"], scheme, [0, 2, 4])
    before = hidden(stages, token_ids()).detach()
    kept = {n: copy.deepcopy(p.data) for s in stages for n, p in s.model.named_parameters()}
    check_head(stages[1])
    with torch.no_grad():
        evaluated = hidden([stage.eval() for stage in stages], token_ids())
    # 8 bits on the CPU: eval mode rounds the inputs to 8 bits as well (½/127 of the largest of a row), train mode does not.
    tolerance = 0.0 if scheme.bits == 4 else 0.05 * float(before.abs().max())
    assert (evaluated - before).abs().max() <= tolerance
    assert torch.equal(hidden([stage.train() for stage in stages], token_ids()), before)
    assert all(torch.equal(kept[n], p.data) for s in stages for n, p in s.model.named_parameters())


@pytest.mark.skipif(not bnb.functional.has_avx512bf16(), reason="only processors with AVX512-BF16 repack")
def test_bitsandbytes_still_repacks_in_eval_mode() -> None:
    """Fails when Linear4bit need not say that there is no such processor."""
    layer = bnb.nn.Linear4bit(128, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32).to("cpu")
    x = torch.randn(3, 128)
    before = copy.deepcopy(layer.weight.data)
    with torch.no_grad():
        layer.eval()(x)
    assert not torch.equal(layer.weight.data.flatten(), before.flatten())


@pytest.mark.parametrize("scheme", [NF4, NF4._replace(double_quant=True), EIGHT], ids=["nf4", "double", "8-bit"])
@pytest.mark.parametrize("bias", [False, True])
def test_gradient_of_the_input_is_that_through_the_dequantised_weight(scheme: Any, bias: bool) -> None:
    """Formula: ∂L/∂x = ∂L/∂h · W with W dequantised by bitsandbytes, in fp64."""
    torch.manual_seed(0)
    layer = layer_of(nn.Linear(128, 64, bias), scheme)
    x: Any = torch.randn(2, 5, 128, requires_grad=True)
    gradient, h = torch.randn(2, 5, 64), layer(x)
    if scheme.bits == 4:
        W = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    else:
        W = bnb.functional.int8_vectorwise_dequant(layer.state.CB, layer.state.SCB)
    assert torch.allclose(h.double(), x.double() @ W.double().T + (layer.bias.double() if bias else 0), atol=1e-5)
    h.backward(gradient)
    # fp32: sums of 64 products below 1, each with a rounding of 6e-8.
    assert torch.allclose(x.grad.double(), gradient.double() @ W.double(), atol=1e-5)


def layer_of(plain: nn.Linear, scheme: Any) -> Any:
    """A quantised layer with `plain`'s weights."""
    made: Any = (quantized_bnb.Linear4bit if scheme.bits == 4 else quantized_bnb.Linear8bit)(
        quantized.QuantizedPlaceholder(plain, scheme)
    )
    made.requires_grad_(False)
    made.weight = made.pack(plain.weight.detach())
    if plain.bias is not None:
        made.bias = nn.Parameter(plain.bias.detach().clone(), requires_grad=False)
    return made.train()


def test_rows_that_are_no_multiple_of_a_block_have_their_own_scales() -> None:
    """Blocks of 64 run over the ends of rows. bitsandbytes 0.50.2 forgets that, on processors with AVX512 alone."""
    plain = nn.Linear(96, 48, bias=False)
    W = torch.randn(48, 96, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 49)[:, None]
    plain.weight.data.copy_(W)
    layer = layer_of(plain, NF4)
    indices, absmax = nf4.quantise(W.flatten(), nf4.CODE, nf4.BLOCK)
    right = nf4.dequantise(indices, absmax, nf4.CODE, nf4.BLOCK).view_as(W)
    assert torch.equal(quantized_bnb.dequantised(layer.weight.data, layer.weight.quant_state), right)
    x: Any = torch.randn(5, 96, generator=torch.Generator().manual_seed(1), requires_grad=True)
    y = layer(x)
    assert torch.equal(y, x @ right.T)
    y.square().sum().backward()
    assert torch.equal(x.grad, (2 * y.detach()) @ right)


@pytest.mark.parametrize("scheme", [NF4, EIGHT], ids=["nf4", "8-bit"])
def test_nothing_is_kept_for_backward(scheme: Any) -> None:
    """Neither by autograd nor beside it: what the layer reads is freed, so that recomputing a layer is worth its time."""
    ours = layer_of(nn.Linear(128, 64), scheme)
    assert freed(ours)
    bitsandbytes_own = bnb.nn.Linear8bitLt(128, 64, has_fp16_weights=False, threshold=6.0).to("cpu").train()
    assert not freed(bitsandbytes_own), "bitsandbytes no longer holds on to the input: Linear8bit needs no forward"


def freed(layer: Callable[[Tensor], Tensor]) -> bool:
    """Whether the layer's input is gone while its checkpointed output waits for backward."""
    noted: list[Any] = []

    def block(x: Tensor) -> Tensor:
        inner = x * 2
        noted.append(weakref.ref(inner.untyped_storage()))
        return layer(inner)

    output: Any = checkpoint(block, torch.randn(4, 128, requires_grad=True), use_reentrant=False)
    gc.collect()
    gone = noted[0]() is None
    assert output.requires_grad
    return gone


def test_kernels_over_a_quantised_base(folders: dict[str, Path]) -> None:
    """Norms, rotary embeddings and the product of a gated MLP are ours; an adapter's kernel wants a weight to multiply by."""
    plain, ours = (chain(folders["cohere"], NF4, [0, 4]) for _ in range(2))
    for stages in (plain, ours):
        adapt(stages, "multiplicative_lora", ["down_proj"], [0, 1, 2], folders["cohere"])
    taken = fusion.apply(ours[0], frozenset(fusion.KERNELS))
    assert taken == {"norm": 5, "rope": 4, "swiglu": 4}
    a, b = hidden(plain, token_ids()), hidden(ours, token_ids())
    # fp32: the kernels sum in another order, four layers deep.
    assert (a - b).abs().max() <= 1e-5 * a.abs().max()


def test_what_the_planner_counts_takes_the_same_kernels(folders: dict[str, Path]) -> None:
    counted, real = with_placeholders(folders["cohere"], NF4, 0, 4), build(folders["cohere"], NF4, 0, 4)
    for stage in (counted, real):
        adapt([stage], "multiplicative_lora", ["down_proj"], [0, 1, 2], folders["cohere"])
    wanted = frozenset(fusion.KERNELS)
    assert fusion.apply(counted, wanted) == fusion.apply(real, wanted)


# What cannot be quantised


@pytest.mark.parametrize(
    ("skip", "said"),
    [
        ("o_porj", r"no module 'o_porj'; a layer's are self_attn\.q_proj"),
        ("o_proj(", "llm_int8_skip_modules: 'o_proj\\(' is not a valid regular expression"),
        ("model.layers", "leaves nothing to quantise"),
    ],
)
def test_modules_to_skip_that_make_no_sense(skip: str, said: str) -> None:
    meta_model = empty_model(builders.model_config("llama", **SIZES), torch.float32, None)
    with pytest.raises(UserError, match=said):
        quantized.put_placeholders(meta_model, NF4._replace(skip=(skip,)))


# Memory

MEASURE = """
import os, sys, threading, time, torch
from pathlib import Path
from pipeline.model import quantized as packed, quantized_bnb as quantization, weights
from pipeline.model.stage import Stage, empty_model, read_model_config

def anonymous():
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024

stage_of = lambda folder: empty_model(read_model_config(folder), torch.bfloat16, None)
meta_model = stage_of(sys.argv[1])
scheme = packed.Scheme(int(sys.argv[2]), "nf4", True, torch.bfloat16, 6.0, ())
packed.put_placeholders(meta_model, scheme)
stage = Stage(meta_model, 0, len(meta_model.base_model.layers))
plain = sum(p.numel() * p.element_size() for p in stage.parameters())
own = plain - packed.saved_bytes(stage)
quantization.put_in(stage)
before, peak, done = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.0005)

thread = threading.Thread(target=watch)
thread.start()
weights.load(stage, sys.argv[1], torch.bfloat16, torch.device("cpu"))
done.set()
thread.join()
print("found", plain, own, peak - before, anonymous() - before, flush=True)
"""
MIB = 2**20


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads RssAnon from /proc")
@pytest.mark.parametrize("bits", [4, 8])
def test_loading_never_holds_the_16_bit_model(tmp_path: Path, bits: int) -> None:
    """340 MiB of bf16 weights, of which the largest tensor has 2 MiB.

    On its way to 4 bits a tensor is, on the CPU, in fp32 four times over and in int32 once (bitsandbytes' own steps), in bf16
    and fp32 before: 24 bytes a weight of the largest tensor, 24 MiB. The rest is the interpreter's. Each block of memory is
    mapped by itself, so that what is resident is what is alive, without the gaps of glibc's heap.
    """
    size = {"hidden_size": 512, "intermediate_size": 2048, "head_dim": 128, "num_key_value_heads": 4}
    config = builders.model_config("llama", layers=42, **size)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in AutoModelForCausalLM.from_config(config).state_dict().items()}
    drawn = {shape: torch.randn(shape, dtype=torch.bfloat16) for shape in set(shapes.values())}
    save_file({name: drawn[shape].clone() for name, shape in shapes.items()}, tmp_path / "model.safetensors")
    command = [sys.executable, "-c", MEASURE, str(tmp_path), str(bits)]
    environment = {**builders.environment(), "PYTHONPATH": str(builders.ROOT), "MALLOC_MMAP_THRESHOLD_": str(64 * 1024)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("found"))
    plain, own, peak, after = map(int, line.split()[1:])
    assert 300 * MIB < plain < 380 * MIB
    assert own < plain * (0.28 if bits == 4 else 0.52)
    assert own * 0.9 <= after <= own + 16 * MIB
    assert peak <= own + 24 * MIB + 16 * MIB, (plain, own, peak, after)
