"""Small random mixtures of experts, saved by transformers in their families' own form, and adapters of their experts."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config import loading
from pipeline.config.schema import Config
from tests.helpers.artifacts import VOCABULARY
from tests.helpers.configs import small

LAYERS = 3
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DEEPSEEK = {
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
# model_type: what is set beside SIZES; the running module of its experts, the stored tensor of the last layer's (the first
# expert's), and how that lies: one by one, together, or transposed.
MIXTURES: dict[str, tuple[dict[str, Any], str, str]] = {
    "mixtral": ({}, "mlp.experts", "block_sparse_moe.experts.0.w2.weight"),
    "qwen3_moe": ({"intermediate_size": 48}, "mlp.experts", "mlp.experts.0.down_proj.weight"),
    "deepseek_v3": (DEEPSEEK, "mlp.experts", "mlp.experts.0.down_proj.weight"),
    "granitemoe": ({}, "block_sparse_moe.experts", "block_sparse_moe.output_linear.weight"),
    "gpt_oss": ({}, "mlp.experts", "mlp.experts.down_proj"),
}


@torch.no_grad()
def save_mixture(folder: Path, kind: str, **changes: Any) -> Any:
    """The model, with weights of useful size and no bias or norm that hides something; saved to `folder`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(5)
    config = AutoConfig.for_model(kind, **{**SIZES, **MIXTURES[kind][0], **changes})
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape) / (parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 4.0))
        if parameter.dim() == 1:
            parameter += 1.0
    model.save_pretrained(folder)
    return model


def config_of(folder: Path, stages: int = 1, **changes: Any) -> Config:
    """A run over the model in `folder` with an adapter on its experts."""
    raw = {
        "model": str(folder),
        "pipeline_stages": stages,
        "model_weight_dtype": "float32",
        "lora_weight_dtype": "float32",
        "target_modules": ["experts"],
        **changes,
    }
    return loading.validate(small(**raw), "x.toml")


@torch.no_grad()
def randomise(parameters: dict[str, Tensor], size: float = 0.3) -> None:
    """Values for A and B that depend on the name alone."""
    for number, (_, parameter) in enumerate(sorted(parameters.items())):
        generator = torch.Generator().manual_seed(number)
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * size / parameter.shape[1] ** 0.5)
