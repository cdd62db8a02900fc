"""Kernels that were asked for: what is said of those that no module took, and modules that take more than a hidden state."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from pipeline.config import loading
from pipeline.kernels import dispatch
from pipeline.model.fusion import apply as fusion
from pipeline.model.stage import Stage
from pipeline.training.stage import parts
from pipeline.training.stage.meta_model import MetaModel
from pipeline.training.stage.spec import Trained
from pipeline.training.start import check, kernel_places, to_train
from tests.helpers.builders import model_config, save_model, train, write_config

ALL = frozenset(fusion.KERNELS)
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts_per_tok": 2,
}
GATED_NORMS: dict[str, dict[str, Any]] = {  # a state space model's norm takes the gate as a second argument
    "GraniteMoeHybrid": {
        "layer_types": ["mamba", "attention"] * 2,
        "position_embedding_type": "rope",
        "num_local_experts": 4,
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 16,
        "shared_intermediate_size": 64,
    },
    "Qwen3Next": {
        "head_dim": 8,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
}


def gradients(model: Any, stage: Stage) -> dict[str, Tensor]:
    """Of a random linear function of the hidden state, with the hidden state itself."""
    model.zero_grad()
    ids = torch.randint(3, 64, (2, 24), generator=torch.Generator().manual_seed(3))
    hidden = stage.train()((ids, torch.arange(24).expand(2, 24)))
    (hidden * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(4))).sum().backward()
    return {"hidden": hidden.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", GATED_NORMS)
def test_a_norm_with_a_gate_is_left_alone(name: str) -> None:
    """Called without its gate it is one of the kernel's forms; with it, granitemoehybrid's ended in a traceback."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SMALL, **GATED_NORMS[name])
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():  # weights of 1 would hide much
        for parameter in model.parameters():
            parameter.add_(torch.rand_like(parameter) * 0.2)
    stage = Stage(model, 0, 4)
    expected = gradients(model, stage)
    taken = fusion.apply(stage, ALL)
    assert taken["norm"] >= 9  # two a layer and the last: those without a gate
    found = gradients(model, stage)
    gated = [m for m in stage.modules() if type(m).__name__.endswith("NormGated")]
    assert gated
    assert not any("forward" in vars(m) for m in gated)
    assert expected.keys() == found.keys()
    for parameter, tensor in expected.items():
        assert (found[parameter] - tensor).norm() <= 1e-4 * tensor.norm() + 1e-5, parameter


class Residual(nn.Module):
    """A gated MLP that adds a second argument, where it is given: not the sum of a parallel block."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(8, 12, bias=False) for _ in range(2))
        self.down_proj, self.act_fn = nn.Linear(12, 8, bias=False), nn.SiLU()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return y if residual is None else y + residual


def test_an_mlp_that_takes_more_is_left_alone() -> None:
    assert not fusion.put_into(Residual(), ALL)


SAID = {  # model, its changes, the run's keys: what no module takes, and why
    "a sequential block": (
        "llama",
        {},
        {},
        {
            "parallel_block": "LlamaDecoderLayer is no parallel block, x + attention(norm(x)) + mlp(norm(x)) (4 of them)",
        },
    ),
    "another adapter": (
        "cohere",
        {},
        {"adapter_type": "lora"},
        {
            "multiplicative": "CohereMLP has no multiplicative adapter on its down_proj (4 of them)",
            "parallel_block": "CohereDecoderLayer has an MLP without the 'multiplicative' kernel, which would make the sum "
            "(4 of them)",
        },
    ),
    "dropout": (
        "llama",
        {},
        {"lora_dropout": 0.1, "kernels": ["multiplicative"], "layers_to_transform": "0:3"},
        {
            "multiplicative": "LlamaMLP has an adapter with dropout (4 of them)",
        },
    ),
    "no parts of that kind": (
        "mixtral",
        {"num_local_experts": 4},
        {"target_modules": ["o_proj"]},
        {
            "swiglu": "no module has gate_proj, up_proj, down_proj and act_fn",
            "multiplicative": "no module has gate_proj, up_proj, down_proj and act_fn",
            "parallel_block": "MixtralDecoderLayer is no parallel block, x + attention(norm(x)) + mlp(norm(x)) (4 of them)",
        },
    ),
    "another activation": (
        "llama",
        {"hidden_act": "relu"},
        {"kernels": ["swiglu"]},
        {
            "swiglu": "LlamaMLP has another activation than silu, gelu, gelu_pytorch_tanh (4 of them)",
        },
    ),
    "no rotation": (
        "cohere2",
        {"layer_types": ["full_attention"] * 4},
        {"kernels": ["rope", "norm"]},
        {
            "rope": "Cohere2Attention does not rotate, or not always alike (4 of them)",
        },
    ),
    "nothing missing": ("cohere", {}, {}, {}),
}


@pytest.mark.parametrize("case", SAID)
def test_what_found_no_place_is_said_with_the_reason(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, changes, keys, expected = SAID[case]
    model_config(kind, **changes).save_pretrained(tmp_path)
    file = write_config(
        tmp_path / "run.toml", model=str(tmp_path), output_dir=str(tmp_path / "runs"), **{"kernels": "all", **keys}
    )
    config = loading.load(file, [])
    meta_model = MetaModel(model_config(kind, **changes), torch.float32)
    layers = range(4) if "layers_to_transform" in keys else range(3)
    part = {"o_proj": "self_attn.o_proj"}.get(keys.get("target_modules", [""])[0], "mlp.down_proj")
    adapter = to_train.adapter_of(config, [f"{meta_model.shared.base_model_prefix}.layers.{i}.{part}" for i in layers])
    kernel_places.foresee(config.kernels, meta_model, Trained(adapter))
    lines = capsys.readouterr().out.splitlines()
    said = dict(line.removeprefix("kernels:  no place for ").split(": ", 1) for line in lines if "no place" in line)
    assert said == expected


@pytest.mark.slow
def test_check_says_what_the_run_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Over two stages, of which the first one's layers alone have an adapter."""
    save_model(tmp_path / "base")
    file = write_config(
        tmp_path / "run.toml",
        model=str(tmp_path / "base"),
        output_dir=str(tmp_path / "runs"),
        kernels="all",
        max_steps=1,
        layers_per_stage=[2, 2],
        layers_to_transform="0:1",
        lora_dropout=0.1,
    )
    check.check(loading.load(file, []), None)
    foreseen = [line for line in capsys.readouterr().out.splitlines() if "kernels:" in line]
    said = [line for line in train(2, "--config", str(file)).splitlines() if "kernels:" in line]
    assert said == foreseen
    assert said == [
        "kernels:  norm in 5 modules, swiglu in 4 modules, rope in 4 modules, shared_input in 8 modules",
        "kernels:  no place for multiplicative: CohereMLP has an adapter with dropout (2 of them); "
        "CohereMLP has no multiplicative adapter on its down_proj (2 of them)",
        "kernels:  no place for parallel_block: CohereDecoderLayer has an MLP without the 'multiplicative' kernel, "
        "which would make the sum (4 of them)",
    ]


def test_auto_takes_all_kernels_on_the_cpu_and_none_on_a_gpu_nobody_has_checked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert parts.chosen_kernels("auto", on_gpu=False) == "all"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (9, 0) if i else (8, 6))
    monkeypatch.setitem(dispatch.CHECKED, "sm_90", "benchmarks/results/one.json")
    assert kernel_places.choose("auto", on_gpu=True) == "none"
    assert "'none', not checked on sm_86 yet" in capsys.readouterr().out
    monkeypatch.setitem(dispatch.CHECKED, "sm_86", "benchmarks/results/other.json")
    assert kernel_places.choose("auto", on_gpu=True) == "all"
    assert "benchmarks/results/other.json" in capsys.readouterr().out
    assert kernel_places.choose(["norm"], on_gpu=True) == ["norm"]
    assert not capsys.readouterr().out


def test_a_plan_for_gpus_that_are_not_here_counts_what_a_run_there_would_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert parts.chosen_kernels("auto", on_gpu=True) == "none"
