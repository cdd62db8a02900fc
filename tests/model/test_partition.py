"""Which stage owns which layers: against all cuts there are, and the costs against PyTorch's counter of operations."""

from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from pipeline.console import UserError
from pipeline.model import partition
from pipeline.model.partition import Costs
from pipeline.model.stage import empty_model
from tests.helpers.builders import model_config

Ranges = list[tuple[int, int]]


def costs(layers: list[float], head: float = 0.0) -> Costs:
    return Costs(layers=layers, head=head, layer_bytes=[10] * len(layers), embedding_bytes=7, head_bytes=5)


def every_cut(n_layers: int, n_stages: int) -> list[Ranges]:
    return [[*pairwise((0, *inner, n_layers))] for inner in combinations(range(1, n_layers), n_stages - 1)]


def stage_costs(cost: Costs, ranges: Ranges) -> list[float]:
    return [sum(cost.layers[a:b]) + (cost.head if b == len(cost.layers) else 0.0) for a, b in ranges]


@given(st.lists(st.integers(0, 20), min_size=1, max_size=8), st.integers(0, 60), st.integers(1, 5))
@example([4, 3, 2, 5, 3, 0], 8, 4)  # the best beginning is not the beginning of the best split
@example([4, 12, 2, 4, 7], 4, 3)  # the smallest spread is not that of the fastest split
def test_split_is_the_best_of_all_cuts(layers: list[int], head: int, n_stages: int) -> None:
    cost = costs([float(c) for c in layers], float(head))
    if n_stages > len(layers):
        with pytest.raises(UserError, match=f"pipeline_stages = {n_stages}.*only {len(layers)} decoder layers"):
            partition.split(cost, n_stages)
        return
    ranges = partition.split(cost, n_stages)
    assert [layer for first, end in ranges for layer in range(first, end)] == list(range(len(layers)))
    assert all(first < end for first, end in ranges)
    assert len(ranges) == n_stages

    def key(ranges: Ranges) -> tuple[float, float]:
        each = stage_costs(cost, ranges)
        return max(each), sum(c * c for c in each)

    # The slowest stage as fast as can be; among such cuts, the smallest spread.
    assert key(ranges) == min(key(other) for other in every_cut(len(layers), n_stages))


def test_head_counts_as_work_of_the_last_stage() -> None:
    """40 layers of 1 and a head of 3: 21 and 19 + 3, rather than 20 and 20 + 3."""
    assert partition.split(costs([1.0] * 40, 3.0), 2) == [(0, 21), (21, 40)]
    assert partition.split(costs([1.0] * 40), 2) == [(0, 20), (20, 40)]
    assert partition.split(costs([1.0] * 4, 100.0), 2) == [(0, 3), (3, 4)]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_explicit_split(layers_per_stage: list[int]) -> None:
    total = sum(layers_per_stage)
    ranges = partition.explicit(layers_per_stage, total)
    assert [end - first for first, end in ranges] == layers_per_stage
    assert [layer for first, end in ranges for layer in range(first, end)] == list(range(total))


@pytest.mark.parametrize("layers_per_stage", [[21, 20], [20, 19], [40, 1]])
def test_explicit_split_that_does_not_add_up(layers_per_stage: list[int]) -> None:
    with pytest.raises(UserError, match=rf"adds up to {sum(layers_per_stage)} layers, but the model has 40"):
        partition.explicit(layers_per_stage, 40)


def test_shares_and_bytes() -> None:
    cost = costs([1.0, 1.0, 2.0], 4.0)
    assert partition.shares(cost, [(0, 2), (2, 3)]) == [0.25, 0.75]
    assert partition.stage_bytes(cost, [(0, 2), (2, 3)]) == [27, 15]
    assert partition.stage_bytes(cost, [(0, 3)]) == [42]


# Costs

T, B = 16, 2


def counted(kind: str, **changes: object) -> tuple[torch.nn.Module, list[float], float]:
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
        return partition.costs(
            model.base_model, model.get_output_embeddings(), sequence_len=T, key_width=32, **{"recompute": False, **how}
        )

    # Causal attention needs half of the scores: 2·T·32 per token where PyTorch counts 4·T·32.
    forward = [n + 2 * T * 32 for n in layers]
    assert of(first_adapted=2).layers == forward, "below the first adapter nothing runs backward"
    # Backward through frozen weights: the gradient of the input, as much as forward; of trained ones, that twice.
    assert of(first_adapted=1).layers == [forward[0], 2 * forward[1]]
    assert of(first_adapted=None).layers == [3 * f for f in forward]
    assert of(first_adapted=1, recompute=True).layers == [forward[0], 3 * forward[1]]
    assert of(first_adapted=0).head == 2 * head
    assert of(first_adapted=None).head == 3 * head


def test_experts_count_as_far_as_they_are_used() -> None:
    config = model_config("mixtral", layers=2, num_local_experts=4, num_experts_per_tok=2)
    model = empty_model(config, torch.float32, None)
    args = {"first_adapted": 2, "recompute": False, "sequence_len": 0, "key_width": 32}
    every, half = (
        partition.costs(model.base_model, model.get_output_embeddings(), **args, active_share_of_experts=share)
        for share in (1.0, 0.5)
    )
    experts = 2 * 4 * 3 * 32 * 64  # 2 operations · 4 experts · 3 matrices of 32 × 64
    assert [a - b for a, b in zip(every.layers, half.layers, strict=True)] == [experts / 2] * 2


def test_bytes_are_those_of_the_weights() -> None:
    model = empty_model(model_config("cohere", layers=2), torch.bfloat16, None)
    cost = partition.costs(
        model.base_model, model.get_output_embeddings(), first_adapted=0, recompute=False, sequence_len=8, key_width=32
    )
    assert cost.embedding_bytes == cost.head_bytes == 320 * 32 * 2
    attention, mlp, norm = 2 * 32 * 32 + 2 * 32 * 16, 3 * 32 * 64, 32
    assert cost.layer_bytes == [2 * (attention + mlp + norm)] * 2
