"""Which families keep documents apart that share a row: tried on tiny copies, not looked up in a list."""

from typing import Any

import pytest
from transformers import AutoConfig

from pipeline.console import UserError
from pipeline.model import packing_check

APART = ("cohere", "cohere2", "gemma3_text")
NOT_APART = ("gpt_oss", "qwen3_next")
# Tried one by one: those that have a mask of their own, mixtures, and those that are built from older ones.
MORE_APART = (
    *("llama", "mistral", "ministral3", "qwen2", "qwen3", "qwen3_moe", "phi3", "gemma2", "granite", "glm4", "mixtral"),
    *(
        "deepseek_v3",
        "olmo2",
        "olmo3",
        "starcoder2",
        "smollm3",
        "exaone4",
        "helium",
        "seed_oss",
        "arcee",
    ),
    *("apertus", "ernie4_5", "stablelm"),
)
MORE_NOT_APART = ("qwen3_5_text", "granitemoehybrid", "minimax", "olmo_hybrid")
SMALL = {"num_hidden_layers": 4, "n_layer": 4, "vocab_size": 64}


def config(kind: str, **changes: Any) -> Any:
    known = AutoConfig.for_model(kind).to_dict()
    return AutoConfig.for_model(
        kind, **{key: value for key, value in (SMALL | changes).items() if key in known or key in changes}
    )


def slow(kinds: tuple[str, ...]) -> list[Any]:
    return [pytest.param(kind, marks=pytest.mark.slow) for kind in kinds]


@pytest.mark.parametrize("kind", [*APART, *slow(MORE_APART)])
def test_families_that_keep_documents_apart_pass(kind: str) -> None:
    packing_check.check(config(kind), 4096)


@pytest.mark.parametrize("kind", [*NOT_APART, *slow(MORE_NOT_APART)])
def test_families_that_do_not_are_refused_by_name(kind: str) -> None:
    with pytest.raises(UserError, match=rf"model_type '{kind}' does not keep documents apart"):
        packing_check.check(config(kind), 4096)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_rotary_embeddings_that_change_with_length_are_packed_below_that_only(kind: str) -> None:
    factors = {"long_factor": [1.0] * 32, "short_factor": [1.0] * 32} if kind == "longrope" else {"factor": 2.0}
    rope = {"rope_type": kind, "rope_theta": 10000.0, "original_max_position_embeddings": 1024, **factors}
    stretched = config("llama", hidden_size=256, num_attention_heads=4, head_dim=64, rope_parameters=rope)
    with pytest.raises(UserError, match="lower sequence_len to 1,024"):
        packing_check.check(stretched, 2048)
    packing_check.check(stretched, 1024)
