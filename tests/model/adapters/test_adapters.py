"""The multiplicative adapter against fp64 arithmetic and PEFT's PEANuT; which modules are adapted.

Letters: D_in, D_out the module's widths, R rank, s = alpha/R.
"""

import pytest
import torch
from peft import LoraConfig, PeanutConfig, get_peft_model
from torch import Tensor, nn

from pipeline.console import UserError
from pipeline.model.adapters.multiplicative import MultiplicativeLoRA
from pipeline.model.adapters.targets import describe_layers, resolve_layers, resolve_targets
from pipeline.model.stage import empty_model
from tests.helpers.builders import model_config
from tests.helpers.stages import CPU

D_IN, D_OUT, RANK, ALPHA = 128, 64, 8, 12.0
S = ALPHA / RANK
# fp32 sums of at most D_in, then D_out, then R products, each rounded to 2⁻²⁴: relative to the largest entry.
FP32 = (D_IN + D_OUT + RANK) * 2**-24


def linear(bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(D_IN, D_OUT, bias=bias).to(dtype).requires_grad_(False)


def adapter(base: nn.Module, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> MultiplicativeLoRA:
    """With A and B of useful size."""
    module = MultiplicativeLoRA(base, RANK, ALPHA, dropout, dtype, CPU)
    torch.manual_seed(2)
    with torch.no_grad():
        module.A.copy_(torch.randn(RANK, D_OUT) / D_OUT**0.5)
        module.B.copy_(torch.randn(D_OUT, RANK) / RANK**0.5)
    return module


def by_hand(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, g: Tensor) -> dict[str, Tensor]:
    """h' = h + s·B·A·h for rows h = x·Wᵀ + b, and the gradients of Σ g·h', in fp64 and written out."""
    x, W, A, B, g = (t.detach().double() for t in (x, W, A, B, g))
    h = x @ W.T + (0 if b is None else b.double())
    return {
        "output": h + S * h @ A.T @ B.T,
        "B": S * g.T @ (h @ A.T),
        "A": S * (g @ B).T @ h,
        "x": (g + S * g @ B @ A) @ W,
    }


def run(module: MultiplicativeLoRA, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    output = module(x)
    d_A, d_B, d_x = torch.autograd.grad((output * g).sum(), [module.A, module.B, x])
    return {"output": output.detach(), "A": d_A, "B": d_B, "x": d_x}


def assert_close(found: dict[str, Tensor], right: dict[str, Tensor], relative: float) -> None:
    """Largest difference relative to the largest entry."""
    for name, value in right.items():
        difference = (found[name].double() - value).abs().max() / value.abs().max()
        assert difference <= relative, (name, float(difference))


def inputs(seed: int = 3, rows: int = 10) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, D_IN, generator=g), torch.randn(rows, D_OUT, generator=g)


# The arithmetic


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_forward_and_gradients_against_fp64(bias: bool) -> None:
    base, (x, g) = linear(bias), inputs()
    module = adapter(base)
    assert_close(run(module, x, g), by_hand(x, base.weight, base.bias, module.A, module.B, g), FP32)


def test_any_number_of_leading_dimensions() -> None:
    module, (x, _) = adapter(linear()), inputs(rows=12)
    torch.testing.assert_close(module(x.view(2, 3, 2, D_IN)).view(12, D_OUT), module(x))


def test_against_pefts_peanut() -> None:
    base, (x, g) = linear(bias=False), inputs()
    module = adapter(base)
    config = PeanutConfig(r=RANK, depth=0, act_fn="linear", scaling=S, target_modules=["down_proj"])
    theirs = get_peft_model(nn.ModuleDict({"down_proj": base}), config).base_model.model["down_proj"]  # type: ignore[arg-type]
    A, B = theirs.peanut_A["default"].weight, theirs.peanut_B["default"].weight
    with torch.no_grad():
        A.copy_(module.A), B.copy_(module.B)
    x_theirs = x.clone().requires_grad_()
    output = theirs(x_theirs)
    d_A, d_B, d_x = torch.autograd.grad((output * g).sum(), [A, B, x_theirs])
    # Both are in fp32, so each may be off by FP32.
    assert_close(run(module, x, g), {"output": output.detach(), "A": d_A, "B": d_B, "x": d_x}, 2 * FP32)


def test_over_a_4_bit_layer() -> None:
    """The adapter needs only the output of bitsandbytes' layer; the oracle reads the weight that nf4 stands for.

    In train mode and with sizes that are multiples of 64: bitsandbytes repacks for some processors otherwise.
    """
    import bitsandbytes as bnb

    base = bnb.nn.Linear4bit(D_IN, D_OUT, bias=True, compute_dtype=torch.float32, quant_type="nf4")
    base.load_state_dict(linear().state_dict())
    base = base.to(CPU).requires_grad_(False).train()
    W = bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state)
    assert base.weight.dtype == torch.uint8
    assert W.shape == (D_OUT, D_IN)
    module, (x, g) = adapter(base), inputs()
    assert_close(run(module, x, g), by_hand(x, W, base.bias, module.A, module.B, g), FP32)


def test_16_bit_base_with_fp32_adapter_rounds_once() -> None:
    base, x = linear(dtype=torch.bfloat16), inputs()[0].bfloat16()
    module = adapter(base)
    output, h = module(x), base(x).double()
    assert output.dtype == torch.bfloat16
    exact = h + S * h @ module.A.double().T @ module.B.double().T
    # Half a unit in the last place of bf16 (2⁻⁸ of the value), and the fp32 sums before it.
    assert ((output.double() - exact).abs() <= exact.abs() * 2**-8 + FP32 * exact.abs().max()).all()
    output.float().sum().backward()
    assert module.A.grad.dtype == torch.float32
    assert module.B.grad.dtype == torch.float32


def test_fp32_base_with_16_bit_adapter_leaves_the_base_output_in_fp32() -> None:
    base, (x, _) = linear(), inputs()
    module = adapter(base, torch.bfloat16)
    output, h = module(x), base(x)
    assert output.dtype == torch.float32
    exact = S * h.double() @ module.A.double().T @ module.B.double().T
    # The correction: h, A·h and B·A·h each rounded to bf16 (2⁻⁸); the sum to fp32.
    bound = 3 * 2**-8 * S * (h.double().abs() @ module.A.double().abs().T @ module.B.double().abs().T)
    assert ((output - h).double() - exact).abs().le(bound + 2**-23 * output.abs()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_untrained_adapter_changes_nothing(dtype: torch.dtype) -> None:
    for base in (linear(), linear(dtype=torch.bfloat16)):
        module, x = MultiplicativeLoRA(base, RANK, ALPHA, 0.0, dtype, CPU), inputs()[0].to(base.weight.dtype)
        nn.init.normal_(module.A)
        assert torch.equal(module(x), base(x))


def test_dropout_acts_on_what_the_adapter_reads_alone() -> None:
    """With A = B = 1 the correction is s·dropout(h): 0 or 2·s·h for p = 1/2; in eval mode s·h."""
    base, (x, _) = linear(), inputs(rows=100)
    module = MultiplicativeLoRA(base, D_OUT, D_OUT * S, 0.5, torch.float32, CPU)
    with torch.no_grad():
        module.A.copy_(torch.eye(D_OUT)), module.B.copy_(torch.eye(D_OUT))
    h = base(x)
    ratio = (module(x) - h) / (S * h)
    zero, double = ratio.abs() < 1e-3, (ratio - 2).abs() < 1e-3
    assert (zero | double).all()
    assert abs(float(zero.float().mean()) - 0.5) < 5 * 0.5 / (100 * D_OUT) ** 0.5  # five standard deviations
    torch.testing.assert_close(module.eval()(x), h * (1 + S))


# Which modules


@pytest.mark.parametrize(
    ("text", "layers"),
    [(None, [0, 1, 2, 3]), ("0:2", [0, 1, 2]), ("3", [3]), ("2,0:1", [0, 1, 2]), ("0:1,1:2", [0, 1, 2]), ("1", [1])],
)
def test_resolve_layers(text: str | None, layers: list[int]) -> None:
    assert resolve_layers(text, 4) == layers


@pytest.mark.parametrize("text", ["4", "0:4", "0,9"])
def test_layers_the_model_does_not_have(text: str) -> None:
    with pytest.raises(UserError, match=r"4 decoder layers, 0 to 3"):
        resolve_layers(text, 4)


def test_layers_in_words() -> None:
    assert describe_layers(resolve_layers("0:38", 40), 40) == "layers 0 to 38 (39 of 40: all but the last)"
    assert describe_layers([0, 1, 2, 3], 4) == "layers 0 to 3 (all)"
    assert describe_layers([0, 1, 2, 7, 9, 10], 12) == "layers 0 to 2, 7, 9 to 10 (6 of 12)"
    assert describe_layers([0], 1) == "layers 0 (all)"


@pytest.mark.parametrize("kind", ["cohere", "llama", "gemma2", "qwen2"])
@pytest.mark.parametrize(
    "targets",
    ["all-linear", ["down_proj"], ["o_proj", "up_proj"], ["mlp.down_proj"], ["self_attn.q_proj", "gate_proj"]],
    ids=str,
)
@pytest.mark.parametrize("layers", [[0, 1, 2, 3], [1, 3]], ids=str)
def test_targets_are_those_of_peft(kind: str, targets: list[str] | str, layers: list[int]) -> None:
    model = empty_model(model_config(kind), torch.float32, None)
    ours = resolve_targets(model, targets, layers)
    with torch.device("meta"):
        theirs = get_peft_model(model, LoraConfig(target_modules=targets)).targeted_module_names
    assert ours == [name for name in theirs if int(name.split(".")[2]) in layers]


def test_targets_of_a_mixture_of_experts_are_linear_modules() -> None:
    model = empty_model(model_config("mixtral"), torch.float32, None)
    names = resolve_targets(model, "all-linear", [0])
    assert names == [f"model.layers.0.self_attn.{p}_proj" for p in "qkvo"]


@pytest.mark.parametrize("target", ["down", "own_proj", "lm_head", "layers.0.mlp.down_proj", "w2"])
def test_target_that_matches_nothing_is_named_with_what_there_is(target: str) -> None:
    model = empty_model(model_config("cohere"), torch.float32, None)
    with pytest.raises(UserError, match=f"no linear module '{target}'.*mlp.down_proj.*self_attn.q_proj"):
        resolve_targets(model, ["down_proj", target], [0, 1])
