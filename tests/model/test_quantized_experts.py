"""Experts in 4 and 8 bits: what is packed, what it computes, and that the fold with --base-quant is the live model.

Oracles: nf4 by our own plain torch from the original weights; transformers' model with every weight replaced by what the
packed one stands for; and, for the fold, the stages that trained.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline.kernels.packed_experts import PackedExperts
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.artifacts.fold.merge import merge
from pipeline.console import UserError
from pipeline.formats import nf4
from pipeline.model import quantized, quantized_bnb, weights
from pipeline.model.adapters.base import trainable, written
from pipeline.model.stage import Stage
from pipeline.training.stage import families, parts
from pipeline.training.start import resolve
from tests.helpers import mixtures
from tests.helpers.quantization import NF4, dequantise_into, packed_in
from tests.helpers.stages import CPU

IDS = torch.arange(3, 19).view(2, 8)
LLAMA4 = {"intermediate_size_mlp": 48, "interleave_moe_layer_step": 1, "attention_chunk_size": 64}
KINDS = [*mixtures.MIXTURES, "llama4_text"]
QUICK = ("mixtral",)
over_kinds = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in KINDS]
)
DOUBLE = ("gpt_oss",)  # bitsandbytes' rounding of scales is its own on the CPU, where one lies between two codes
SCHEMES = {"nf4-double": NF4._replace(double_quant=True), "8-bit": NF4._replace(bits=8)}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's model, made once, as that family stores it."""

    @cache
    def get(kind: str) -> Path:
        folder = tmp_path_factory.mktemp("bases") / kind
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(mixtures.MIXTURES, "llama4_text", (LLAMA4, "feed_forward.experts", ""))
            mixtures.save_mixture(folder, kind)
        return folder

    return get


def config_of(folder: Path, scheme: str, stages: int = 1, **changes: Any) -> Any:
    four = {"load_in_4bit": True, "bnb_4bit_use_double_quant": scheme == "nf4-double"}
    bits = {"load_in_8bit": True} if scheme == "8-bit" else four
    return mixtures.config_of(folder, stages, quantization={"bnb": bits}, layers_to_transform="0:2", **changes)


def stages_of(plan: Any) -> list[Stage]:
    """Loaded as a run loads them, without adapters."""
    stages = [Stage(plan.meta_model.make(), first, end) for first, end in plan.ranges]
    for stage in stages:
        parts.put_quantised(stage, plan.base.scheme)
        weights.load(stage, plan.base.folder, plan.base.dtype, CPU)
    return [stage.train() for stage in stages]


def run(stages: list[Stage]) -> Tensor:
    carried: Any = (IDS, torch.arange(IDS.shape[1]).expand_as(IDS))
    for stage in stages:
        carried = stage(carried)
    return stages[-1].head(carried)


def dequantised(folder: Path, stages: list[Stage]) -> Any:
    """transformers' model of `folder` with what the quantised weights stand for."""
    whole = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    return dequantise_into(whole, stages)


@over_kinds
def test_packed_trained_and_folded(base: Callable[[str], Path], kind: str, tmp_path: Path) -> None:
    """Two stages: the codes are nf4's; logits and the gradient of the embedding those of the dequantised model; and an
    adapter of the experts, folded with --base-quant, gives transformers' model the stages' logits."""
    folder = base(kind)
    scheme: Any = "nf4-double" if kind in DOUBLE else "nf4"
    plan = resolve.resolve(config_of(folder, scheme, 2))
    stages = stages_of(plan)
    packed, original = packed_in(stages), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    stacked = {name for name, p in original.named_parameters() if p.dim() == 3}
    assert packed.keys() == stacked
    assert not stacked & {name for stage in stages for name, _ in stage.model.named_parameters()}
    one_by_one = kind in ("mixtral", "qwen3_moe", "deepseek_v3")
    for name, experts in packed.items():
        halves = 2 if one_by_one and name.endswith("gate_up_proj") else 1
        matrices = [W.chunk(halves) for W in original.get_parameter(name)]
        right = [torch.cat([through_nf4(piece, kind in DOUBLE) for piece in pieces]) for pieces in matrices]
        assert torch.equal(torch.stack([unpack() for unpack in experts.unpacks]), torch.stack(right))
    whole = dequantised(folder, stages)
    rows = stages[0].model.get_input_embeddings().weight.requires_grad_(True)
    theirs, ours = whole(IDS, use_cache=False).logits, run(stages)
    # Products in fp32 in another order, over three layers.
    assert (ours - theirs).abs().max() <= 2**-17 * theirs.abs().max()
    weigh = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    (ours * weigh).sum().backward()
    (theirs * weigh).sum().backward()
    expected = whole.get_input_embeddings().weight.grad
    assert (rows.grad - expected).abs().max() <= 2**-15 * expected.abs().max()
    rows.requires_grad_(False)
    for stage in stages:
        families.inject(stage, plan.trained.adapter)
    mixtures.randomise({name: p for stage in stages for name, p in trainable(stage).items()})
    tensors = {name: tensor for stage in stages for name, tensor in written(stage).items()}
    with torch.no_grad():
        live = run(stages)
    assert (live - ours).abs().max() > 1e-2 * ours.abs().max()
    (tmp_path / "adapter").mkdir()
    families.writer(plan.trained.adapter, plan.base)(tmp_path / "adapter", tensors)
    merge(folder, tmp_path / "adapter", tmp_path / "folded", base_quant=scheme)
    folded = AutoModelForCausalLM.from_pretrained(tmp_path / "folded", dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        found = folded(IDS, use_cache=False).logits
    assert (found - live).abs().max() <= 2**-15 * live.abs().max()


def through_nf4(W: Tensor, double: bool) -> Tensor:
    """A matrix after nf4 and back, in plain torch."""
    indices, absmax = nf4.quantise(W.detach().flatten(), nf4.CODE, nf4.BLOCK)
    scales = nf4.double_quantised(absmax) if double else absmax
    return nf4.dequantise(indices, scales, nf4.CODE, nf4.BLOCK).view(W.shape)


def test_8_bits_compute_what_the_dequantised_weights_do(base: Callable[[str], Path]) -> None:
    """The experts alone: of a linear layer 8 bits round the inputs as well."""
    folder = base("mixtral")
    (stage,) = stages_of(resolve.resolve(config_of(folder, "8-bit")))
    ours: Any = stage.layers[1].mlp.experts
    theirs: Any = dequantised(folder, [stage]).model.layers[1].mlp.experts
    W = theirs.down_proj.detach()
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).model.layers[1].mlp.experts.down_proj
    # Half a step of 1/127 of a row's largest, and float16's rounding before.
    assert ((W - plain).abs() <= (0.5 / 127 + 2**-10) * plain.abs().amax(dim=-1, keepdim=True)).all()
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    routed = (torch.tensor([[0, 1], [1, 2], [3, 0]] * 2), torch.rand(6, 2))
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    found, right = ours(one, *routed), theirs(other, *routed)
    found.square().sum().backward()
    right.square().sum().backward()
    assert (found - right).abs().max() <= 2**-19 * right.abs().max()
    assert (one.grad - other.grad).abs().max() <= 2**-18 * other.grad.abs().max()


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_nothing_is_kept_for_backward_and_recomputing_changes_nothing(scheme: Any) -> None:
    torch.manual_seed(0)
    W = torch.randn(2, 64, 128)
    experts = PackedExperts([quantized_bnb.pack_expert(scheme, [w]) for w in W], W.shape, W.dtype, W.device)
    kept: list[Tensor] = []
    x = torch.randn(5, 128, requires_grad=True)

    def product(x: Tensor) -> Tensor:
        return nn.functional.linear(x, experts[1]) @ experts[torch.tensor(0)]  # type: ignore[arg-type,operator]

    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        h = product(x)
    assert not kept
    h.square().sum().backward()
    once = x.grad
    x.grad = None
    checkpoint(product, x, use_reentrant=False).square().sum().backward()
    assert torch.equal(x.grad, once)
    with pytest.raises(TypeError, match="not built for packed experts"):
        torch.einsum("ij,kj->ik", x, experts[0])
    with pytest.raises(TypeError, match="several experts at once"):
        experts[torch.tensor([0, 1])]


def test_the_plan_counts_packed_bytes() -> None:
    scheme = SCHEMES["nf4-double"]
    model = resolve.MetaModel(AutoConfig.for_model("mixtral", **mixtures.SIZES), torch.bfloat16, None, scheme).make()
    layer = model.model.layers[0]
    experts = sum(p.numel() for p in layer.mlp.experts.parameters())
    attention = sum(p.numel() for name, p in layer.self_attn.named_parameters())
    packed = 4 * (scheme.packed_bytes(48, 32) + scheme.packed_bytes(32, 24))
    packed += sum(scheme.packed_bytes(*p.shape) for _, p in layer.self_attn.named_parameters())
    assert quantized.saved_bytes(layer) == 2 * (experts + attention) - packed
    assert quantized.dequantised_bytes(layer) == 48 * 32 * 4  # one expert's, in the compute dtype
    forward, backward = quantized.dequantising_traffic(layer)
    assert forward == backward == packed + 4 * (experts + attention)


def test_experts_can_be_left_out_and_what_cannot_be_packed_is_refused(
    base: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = {"load_in_4bit": True, "llm_int8_skip_modules": ["experts"]}
    plan = resolve.resolve(mixtures.config_of(base("mixtral"), 1, quantization={"bnb": raw}, layers_to_transform="0:2"))
    (stage,) = stages_of(plan)
    assert not packed_in([stage])
    original = AutoModelForCausalLM.from_pretrained(base("mixtral"), dtype=torch.float32)
    name = "model.layers.2.mlp.experts.gate_up_proj"
    assert torch.equal(stage.model.get_parameter(name), original.get_parameter(name))
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.kernels.packed_experts.LINEAR", ())
        with pytest.raises(
            UserError, match=r"experts of model_type 'mixtral' cannot be quantised \(.*leave them out with"
        ):
            resolve.resolve(config_of(base("mixtral"), "8-bit"))
