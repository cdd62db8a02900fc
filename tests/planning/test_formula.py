"""What the cost formula gives: against PyTorch's counter of operations."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from pipeline.model.stage import empty_model
from pipeline.planning import formula
from pipeline.planning.formula import Costs
from tests.helpers.builders import model_config


def test_shares_and_bytes() -> None:
    cost = Costs(layers=[1.0, 1.0, 2.0], head=4.0, layer_bytes=[10] * 3, embedding_bytes=7, head_bytes=5)
    assert formula.shares(cost, [(0, 2), (2, 3)]) == [0.25, 0.75]
    assert formula.stage_bytes(cost, [(0, 2), (2, 3)]) == [27, 15]
    assert formula.stage_bytes(cost, [(0, 3)]) == [42]


T, B = 16, 2


def counted(kind: str, **changes: object) -> tuple[PreTrainedModel, list[float], float]:
    """The model, PyTorch's count per token of each layer's forward without attention's own products, and the head's."""
    model = AutoModelForCausalLM.from_config(model_config(kind, layers=2, **changes), attn_implementation="eager")
    attention = 2 * 2 * B * 4 * T * T * 8  # q·kᵀ and p·v: 2 operations, B rows, 4 heads, T × T scores, 8 wide
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(B, T, dtype=torch.int64))
    by_module = counter.get_flop_counts()
    name = type(model).__name__
    layers = [sum(by_module[f"{name}.model.layers.{i}"].values()) for i in (0, 1)]
    return model, [(n - attention) / (B * T) for n in layers], sum(by_module[f"{name}.lm_head"].values()) / (B * T)


@pytest.mark.parametrize("kind", ["cohere", "llama", "gemma2", "qwen2"])
def test_costs_are_the_operations_that_pytorch_counts(kind: str) -> None:
    model, layers, head = counted(kind)

    def of(**how: object) -> Costs:
        return formula.costs(model, sequence_len=T, **{"recompute": False, **how})

    # Causal attention needs half of the scores: 2·T·32 per token where PyTorch counts 4·T·32.
    forward = [n + 2 * T * 32 for n in layers]
    assert of(first_trained=2).layers == forward, "below the first adapter nothing runs backward"
    # Backward through frozen weights: the gradient of the input, as much as forward; of trained ones, that twice.
    assert of(first_trained=1).layers == [forward[0], 2 * forward[1]]
    assert of(first_trained=None).layers == [3 * f for f in forward]
    assert of(first_trained=1, recompute=True).layers == [forward[0], 3 * forward[1]]
    assert of(first_trained=0).head == 2 * head
    assert of(first_trained=None).head == 3 * head


def test_experts_count_as_far_as_they_are_used() -> None:
    def layers(used: int) -> list[float]:
        config = model_config("mixtral", layers=2, num_local_experts=4, num_experts_per_tok=used)
        model = empty_model(config, torch.float32, None)
        return formula.costs(model, first_trained=2, recompute=False, sequence_len=0).layers

    experts = 2 * 4 * 3 * 32 * 64  # 2 operations · 4 experts · 3 matrices of 32 × 64
    assert [a - b for a, b in zip(layers(4), layers(2), strict=True)] == [experts / 2] * 2


def test_bytes_are_those_of_the_weights() -> None:
    model = empty_model(model_config("cohere", layers=2), torch.bfloat16, None)
    cost = formula.costs(model, first_trained=0, recompute=False, sequence_len=8)
    assert cost.embedding_bytes == cost.head_bytes == 320 * 32 * 2
    attention, mlp, norm = 2 * 32 * 32 + 2 * 32 * 16, 3 * 32 * 64, 32
    assert cost.layer_bytes == [2 * (attention + mlp + norm)] * 2
