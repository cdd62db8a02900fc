"""What a reference in every step and taps add to a plan: forward work, states at tapped layers, a second state on the wires."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.config import loading
from pipeline.model.memory.levels import ActivationPolicy, RecomputeLevel
from pipeline.objectives.preference_losses import Mixture, Settings
from pipeline.objectives.representation import Tap
from pipeline.planning.quantities import HeadCost, LayerCost, LevelCost, ModelCost, Rates, Shape, Work
from pipeline.planning.solve import solve
from pipeline.training.start import resolve
from pipeline.training.start.objective import ObjectiveSpec
from pipeline.training.start.plan import shape_of, with_objective
from tests.helpers.configs import small

HIDDEN, TOKENS, MICRO_BATCHES = 64, 100, 4
LEVELS = {
    RecomputeLevel.INPUT: LevelCost(HIDDEN, Work(100.0)),
    RecomputeLevel.EVERYTHING: LevelCost(10 * HIDDEN, Work(0.0)),
}
LAYER = LayerCost(1000, 10, Work(100.0, 5.0), Work(200.0, 9.0), LEVELS, 50.0)
COST = ModelCost([LAYER] * 4, 100, 0, HeadCost(100, 0, Work(80.0), 7), HIDDEN, 0)
RATES = Rates(1e3, 1e6, 1e6, 1e6, 1e4, "none")
SHAPE = Shape(TOKENS, MICRO_BATCHES, 2)
DPO = Mixture({"sigmoid": 1.0}, Settings())
RETAIN = Tap("retain", 0, 0, (1, 2), "l2")


def plan(objective: ObjectiveSpec | None) -> list[float]:
    cost = with_objective(COST, objective)
    found = solve(
        cost, [10**9] * 2, RATES, SHAPE, 0, ranges=[(0, 2), (2, 4)], keeping=ActivationPolicy(RecomputeLevel.INPUT)
    )
    return [value for s in found.stages for value in (s.activation_bytes, s.forward_s, s.flops)]


@pytest.mark.parametrize(
    ("kind", "changes", "rows"),
    [
        ("completion", {}, 3),
        ("preference", {}, 2 * 3),
        ("ranked", {"ranks": 4}, 4 * 3),
    ],
)
def test_rows_of_a_micro_batch_are_those_of_its_units(
    base: Path, kind: str, changes: dict[str, Any], rows: int
) -> None:
    data = {"dataset_type": kind, "dataset_path": "x.jsonl", "sequence_len": 64, **changes}
    loss = {"completion": {}, "preference": {"type": "preference"}}.get(
        kind, {"type": "preference", "loss_type": "plackett_luce"}
    )
    keys: dict[str, Any] = {"datasets": [data], "micro_batch_size_per_gpu": 3, **({"objective": loss} if loss else {})}
    config = loading.validate(small(model=str(base), **keys), "x.toml")
    layout = resolve.resolve(config).layout
    assert layout.rows == rows
    assert shape_of(layout, 2).tokens == rows * 64


def test_a_cached_reference_costs_a_step_nothing() -> None:
    assert plan(ObjectiveSpec(DPO, 2, "base")) == plan(None)


def test_a_live_reference_runs_every_layer_and_the_head_forward() -> None:
    before, after = plan(None), plan(ObjectiveSpec(DPO, 2, "base", live=True))
    state = HIDDEN * TOKENS
    assert after[0] - before[0] == state, "the first stage hands it on"
    assert after[3] - before[3] == 2 * state, "the last one receives it; nothing is kept"
    assert after[2] - before[2] == 2 * 100
    assert after[5] - before[5] == 2 * 100 + 80 / 2
    assert after[1] > before[1]


def test_taps_run_half_the_rows_and_keep_their_states_in_flight() -> None:
    before, after = plan(None), plan(ObjectiveSpec(None, 2, "base", (RETAIN,)))
    state = HIDDEN * TOKENS / 2  # one of two rows
    assert after[0] - before[0] == state * 2 + state, "of a tapped layer for two micro-batches in flight, and handed on"
    assert after[3] - before[3] == state + 2 * state
    assert after[2] - before[2] == pytest.approx(2 * 50)
    assert after[5] - before[5] == pytest.approx(50 - 80), "one layer more, and no head"
