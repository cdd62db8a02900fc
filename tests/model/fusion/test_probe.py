"""What modules compute, found out on miniatures: real families without weights, and modules that only look like one."""

import functools
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from accelerate import init_empty_weights
from pipeline.kernels.norm import layer_norm, rms_norm
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import silu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.activations import ACT2FN
from transformers.models.cohere import modeling_cohere
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from pipeline.model.adapters.multiplicative import MultiplicativeLoRA
from pipeline.model.fusion import apply as fusion
from pipeline.model.fusion import probe

ALL = frozenset(fusion.KERNELS)
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
SMALL |= {"num_hidden_layers": 4, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def empty_layer(name: str, index: int = 0, **changes: Any) -> Any:
    """A decoder layer of a family, its parameters on `meta`."""
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **changes})
    with init_empty_weights():
        return transformers.AutoModelForCausalLM.from_config(config).model.layers[index]


@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_pytorch_tanh", "silu"])
def test_each_activation_is_told_from_the_others(hidden_act: str) -> None:
    assert probe.activation(ACT2FN[hidden_act]) == hidden_act


class NormWithBias(LlamaRMSNorm):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.bias = nn.Parameter(torch.zeros(width))


class NormOfAnother(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) * (1 + self.weight.mean() - 1)


NORMS: list[tuple[Callable[[], nn.Module], Any]] = [
    (lambda: modeling_cohere.CohereLayerNorm(24), (layer_norm, {})),
    (lambda: modeling_cohere.CohereLayerNorm((4, 8)), (layer_norm, {})),  # of queries, per head
    (lambda: LlamaRMSNorm(24), (rms_norm, {})),
    (lambda: Gemma2RMSNorm(24), (rms_norm, {"plus_one": True})),
    (lambda: Olmo2RMSNorm(24), (rms_norm, {"cast_before_weight": False})),
    (lambda: NormWithBias(24), None),  # its bias is not used, but a module with one is none of ours
    (lambda: NormOfAnother(24), None),  # at weights of 1 it is Llama's
    (lambda: nn.LayerNorm(24), None),
]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("make", "form"), NORMS)
def test_a_norm_s_form(make: Callable[[], nn.Module], form: Any, device: str) -> None:
    """Llama's and OLMo 2's differ only in where bf16 is rounded: their own dtype tells."""
    assert probe.norm_form(make().to(torch.bfloat16).to(device)) == form


PARTIAL = "may rotate only a part of the head"
ROTATIONS: list[tuple[str, dict[str, Any], bool | str]] = [
    ("Cohere", {}, True),
    ("Llama", {}, False),
    ("Mistral", {}, False),
    ("Qwen2", {}, False),
    ("Qwen3", {}, False),
    ("Gemma2", {}, False),
    ("Gemma3Text", {}, False),
    ("Granite", {}, False),
    ("Mixtral", {"num_local_experts": 4}, False),
    ("Olmo2", {}, False),
    ("Cohere2", {"layer_types": ["sliding_attention"] * 4}, True),
    ("Cohere2", {"layer_types": ["full_attention"] * 4}, "does not rotate, or not always alike"),
    ("Glm4", {}, PARTIAL),
    ("Phi3", {}, "has no q_proj, k_proj, v_proj, o_proj"),
    ("Nemotron", {}, PARTIAL),
    ("GptOss", {"num_local_experts": 4}, PARTIAL),  # tables of half the width
    ("Moshi", {}, "does not run by itself"),
]


@pytest.mark.parametrize(("name", "changes", "interleaved"), ROTATIONS, ids=str)
def test_a_family_s_rotation(name: str, changes: dict[str, Any], interleaved: bool | str) -> None:
    assert probe.rotation(empty_layer(name, **changes).self_attn) == interleaved


def attention_calling(call: Callable[..., Any]) -> nn.Module:
    """Cohere's attention whose module has `call` as its rotary function."""

    class Attention(modeling_cohere.CohereAttention):
        forward = probe.with_global(modeling_cohere.CohereAttention.forward, probe.ROTATION, call)

    return Attention(transformers.CohereConfig(**SMALL), 0)


def test_a_rotary_function_that_does_more_is_left_alone() -> None:
    theirs, another = modeling_cohere.apply_rotary_pos_emb, "rotates in another way"
    assert probe.rotation(attention_calling(theirs)) is True
    assert probe.rotation(attention_calling(lambda q, k, c, s: theirs(q, k, c * 1.1, s))) == another
    assert probe.rotation(attention_calling(lambda q, k, c, s: (theirs(q, k, c, s)[0], k))) == another


def doubled(forward: Any) -> Any:
    """Twice the output: a decorator that changes what a module computes."""

    @functools.wraps(forward)
    def decorated(*args: Any, **kwargs: Any) -> Any:
        output, *others = forward(*args, **kwargs)
        return output * 2, *others

    return decorated


def renamed(forward: Any) -> Any:
    """Takes an argument under an older name, as transformers 5.24's attentions take `past_key_values`."""

    @functools.wraps(forward)
    def decorated(*args: Any, table: Any = None, **kwargs: Any) -> Any:
        return forward(*args, position_embeddings=table, **kwargs)

    return decorated


def test_decorators_of_a_forward_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they do, they do around ours too, in their order."""

    class Attention(modeling_cohere.CohereAttention):
        forward = doubled(doubled(modeling_cohere.CohereAttention.forward))

    attention: Any = Attention(transformers.CohereConfig(**SMALL), 0)
    attention.config._attn_implementation = "eager"
    tables = torch.randn(2, 1, 5, 8).unbind()
    given = {"hidden_states": torch.randn(1, 5, 32), "position_embeddings": tables, "attention_mask": None}
    expected = attention(**given)[0]
    calls: list[bool] = []
    ours = fusion.rope
    monkeypatch.setattr(fusion, "rope", lambda *args, **options: calls.append(True) or ours(*args, **options))
    assert fusion.put_into(attention, frozenset({"rope"})) == {"rope": 1}
    torch.testing.assert_close(attention(**given)[0], expected)
    assert calls == [True]


def test_a_decorator_that_hides_its_function_leaves_the_attention_alone() -> None:
    """It is not in the decorator's closure, so a copy would go on calling the original."""
    hidden = [modeling_cohere.CohereAttention.forward]

    class Attention(modeling_cohere.CohereAttention):
        @functools.wraps(hidden[0])
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return hidden[0](self, *args, **kwargs)

    assert probe.rotation(Attention(transformers.CohereConfig(**SMALL), 0)) == "does not run by itself"


def test_an_argument_may_be_renamed_on_its_way() -> None:
    class Attention(modeling_cohere.CohereAttention):
        forward = renamed(modeling_cohere.CohereAttention.forward)

    attention: Any = Attention(transformers.CohereConfig(**SMALL), 0)
    attention.config._attn_implementation = "eager"
    tables, x = torch.randn(2, 1, 5, 8).unbind(), torch.randn(1, 5, 32)
    ours = probe.with_global(Attention.forward, probe.ROTATION, lambda q, k, *_: (q * 0, k))
    found = ours(attention, hidden_states=x, table=tables, attention_mask=None)[1]
    # Queries of zero attend to all alike; the names have gone through both.
    torch.testing.assert_close(found, torch.full_like(found, 1 / 5))


def test_an_attention_that_names_another_dimension_is_left_alone() -> None:
    class Attention(modeling_cohere.CohereAttention):
        def forward(self, hidden_states: Tensor, position_embeddings: Any, attention_mask: Any, **_: Any) -> Any:
            q = self.q_proj(hidden_states).unflatten(-1, (-1, self.head_dim))
            k = self.k_proj(hidden_states).unflatten(-1, (-1, self.head_dim))
            return apply_rotary_pos_emb(q, k, *position_embeddings, unsqueeze_dim=2)

    reason = probe.rotation(Attention(transformers.CohereConfig(**SMALL), 0))
    assert reason == "gives apply_rotary_pos_emb more than q, k, cos and sin"


apply_rotary_pos_emb = modeling_cohere.apply_rotary_pos_emb  # the name by which the class above finds it


def test_transformers_module_stays_as_it_is() -> None:
    theirs, layer = modeling_cohere.apply_rotary_pos_emb, empty_layer("Cohere")
    assert fusion.put_into(layer, frozenset({"rope"})) == {"rope": 1}
    assert modeling_cohere.apply_rotary_pos_emb is theirs
    assert inspect.unwrap(layer.self_attn.forward).__globals__[probe.ROTATION] is not theirs
    assert inspect.unwrap(modeling_cohere.CohereAttention.forward).__globals__[probe.ROTATION] is theirs


class GatedMLP(nn.Module):
    """With `twist` between the parts: of the product, and of the output."""

    def __init__(self, twist: Callable[["GatedMLP", Tensor], Tensor], bias: bool = False) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(8, 12, bias=bias) for _ in range(2))
        self.down_proj = nn.Linear(12, 8, bias=bias)
        self.act_fn, self.twist = nn.SiLU(), twist
        self.dropout, self.limit = nn.Dropout(0.1), 0.5
        self.scale = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(12))

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.twist(self, self.act_fn(self.gate_proj(x)) * self.up_proj(x)))


TWISTS: dict[str, Callable[[GatedMLP, Tensor], Tensor]] = {
    "clamp": lambda mlp, m: m.clamp(max=mlp.limit),
    "dropout": lambda mlp, m: mlp.dropout(m),
    "learned scale": lambda mlp, m: m * mlp.scale,
    "learned offset": lambda mlp, m: m + (mlp.bias[:1] * 0.1),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_gated_mlp_that_does_more_is_left_alone(device: str, bias: bool) -> None:
    """A scale is 1 and an offset 0 where training starts, which real weights would not show."""
    taken = {name: fusion.put_into(GatedMLP(twist, bias).to(device), ALL) for name, twist in TWISTS.items()}
    assert not any(taken.values()), taken
    assert fusion.put_into(GatedMLP(lambda _, m: m, bias).to(device), ALL) == {"swiglu": 1}


def adapted(layer: Any) -> Any:
    """`layer` with a multiplicative adapter on its frozen down_proj."""
    layer.requires_grad_(False)
    old = layer.mlp.down_proj
    layer.mlp.down_proj = MultiplicativeLoRA(old, 2, 4, 0.0, torch.float32, old.weight.device)
    if not old.weight.is_meta:  # its memory is as it was found until it is drawn
        torch.nn.init.normal_(layer.mlp.down_proj.A)
    return layer


class Twisted(modeling_cohere.CohereDecoderLayer):
    """Cohere's layer with something of its own in the sum."""

    twist: str

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        normed = self.input_layernorm(hidden_states)
        given = {**kwargs, "attention_mask": None} if self.twist == "mask" else kwargs
        attention, _ = self.self_attn(hidden_states=normed, **given)
        mlp = self.mlp(hidden_states if self.twist == "unnormed" else normed)
        if self.twist == "dropout":
            mlp = nn.functional.dropout(mlp, 0.1, self.training)
        y = hidden_states + attention * (0.9 if self.twist == "scale" else 1) + mlp
        return (y,) if self.twist == "tuple" else y


@pytest.mark.parametrize("twist", ["none", "mask", "unnormed", "dropout", "scale", "tuple"])
def test_a_block_that_does_more_keeps_its_own_sum(twist: str) -> None:
    made = Twisted(transformers.CohereConfig(**SMALL), 0)
    made.twist = twist
    assert fusion.put_into(adapted(made), ALL)["parallel_block"] == (twist == "none")


def test_a_sequential_block_is_no_parallel_one() -> None:
    assert fusion.put_into(adapted(empty_layer("Llama")), ALL) == {
        "norm": 2,
        "rope": 1,
        "multiplicative": 1,
        "shared_input": 2,
    }


def test_a_parallel_block_hands_everything_on_to_attention() -> None:
    layer = adapted(modeling_cohere.CohereDecoderLayer(transformers.CohereConfig(**SMALL), 0))
    received: dict[str, Any] = {}

    class Attention(nn.Module):
        def forward(self, **kwargs: Any) -> tuple[Tensor, None]:
            received.update(kwargs)
            return kwargs["hidden_states"] * 2, None

    layer.self_attn = Attention()
    x, mask, tables = torch.randn(1, 3, 32), object(), (object(), object())
    expected = layer(x, attention_mask=mask, position_embeddings=tables, cu_seq_lens_q=7)
    asked, received = dict(received), {}
    assert fusion.put_into(layer, ALL)["parallel_block"] == 1
    y = layer(x, attention_mask=mask, position_embeddings=tables, cu_seq_lens_q=7)
    torch.testing.assert_close(y, expected)
    assert received.pop("hidden_states").shape == x.shape
    assert asked.pop("hidden_states") is not None
    assert received == asked
    assert received["cu_seq_lens_q"] == 7


def test_a_forward_that_has_been_replaced_is_left_alone() -> None:
    """So nothing is taken twice."""
    layer = adapted(empty_layer("Cohere"))
    assert sum(fusion.put_into(layer, ALL).values()) == 5
    assert not fusion.put_into(layer, ALL)


class Largest(TorchDispatchMode):
    """Remembers the largest real tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(result) if isinstance(t, Tensor) and not t.is_meta]
        self.elements = max([self.elements, *sizes])
        return result


def test_command_r_s_layer_is_found_out_without_its_size() -> None:
    """And without a random number of the run's: dropout and shuffling do not depend on which kernels are wanted."""
    layer = adapted(
        empty_layer(
            "Cohere",
            hidden_size=8192,
            intermediate_size=22528,
            num_attention_heads=64,
            num_key_value_heads=64,
            head_dim=128,
        )
    )
    before = torch.get_rng_state()
    with Largest() as largest:
        taken = fusion.put_into(layer, ALL)
    assert taken == {"norm": 1, "rope": 1, "multiplicative": 1, "parallel_block": 1, "shared_input": 1}
    assert largest.elements <= 8192 * probe.WIDTH  # a projection's heads, of a hidden state of 16
    assert torch.equal(torch.get_rng_state(), before)


def test_decisions_are_the_same_on_fake_tensors() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer = adapted(modeling_cohere.CohereDecoderLayer(transformers.CohereConfig(**SMALL), 0))
        assert fusion.put_into(layer, ALL) == {
            "norm": 1,
            "rope": 1,
            "multiplicative": 1,
            "parallel_block": 1,
            "shared_input": 1,
        }
        tables = modeling_cohere.CohereRotaryEmbedding(transformers.CohereConfig(**SMALL))(
            torch.empty(1, 6, 32), torch.arange(6)[None]
        )
        assert layer(torch.empty(1, 6, 32), position_embeddings=tables, attention_mask=None).shape == (1, 6, 32)


def test_a_module_of_another_structure_raises_nothing() -> None:
    strange: Any = SimpleNamespace(gate_proj=None, up_proj=None, down_proj=None, act_fn=None)
    assert not probe.computes_the_same(strange, lambda mlp: silu)
    assert not probe.is_parallel_block(nn.Linear(2, 2))
