"""Taps in real runs: on one, two and three stages equal to the bit; circuit breakers break their stream and leave the other.

Two stages against the unsplit model, also with a step divided otherwise, is `test_preference_trained.py`'s, which has the
processes for it.
"""

import json
import math
from pathlib import Path

import pytest
import torch

from tests.helpers import builders, stage_runs
from tests.helpers.stage_runs import Case
from tests.helpers.unsplit import UNIT
from tests.training.checkpoint.test_resume import assert_equal, final_state, numbers, run_plan
from tests.training.run.test_preference_trained import UNITS, WORDS, config, text, write_rows

STEPS = 4


@pytest.fixture
def root(tmp_path: Path) -> Path:
    builders.save_model(tmp_path / "cohere", "cohere", logit_scale=1.0)
    write_rows(tmp_path)
    return tmp_path


def breakers(root: Path, keep: float = 0.3) -> Path:
    """Completions of two streams, of unequal number and length, held out of both. `keep`: the weight of what is retained."""
    for stream, count, first in (("breaker", 11, 0), ("retain", 20, 600)):
        rows = [{"prompt": WORDS[first + n], "completion": text(first + 3 * n, n % 7 + 3)} for n in range(count)]
        (root / f"{stream}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows_of = {"dataset_type": "completion", "sequence_len": 64, "chat_template": "none"}
    taps = [
        {"name": "break", "of": "breaker", "layers": [1, 2], "distance": "relu_cosine"},
        {"name": "keep", "of": "retain", "layers": "all", "distance": "l2", "mask": "all", "weight": keep},
    ]
    settings = {
        "model": str(root / "cohere"),
        "output_dir": str(root / "runs" / "breakers"),
        "optimizer": {"type": "adamw", "lr": 1e-2, "weight_decay": 0.0},
        "micro_batch_size_per_gpu": 4,
        "datasets": [
            {"name": stream, "stream": stream, "dataset_path": str(root / f"{stream}.jsonl"), "eval_size": 3, **rows_of}
            for stream in ("breaker", "retain")
        ],
        "objective": {"type": "circuit_breaker", "tap": taps},
    }
    return builders.write_config(root / "breakers.toml", **settings)


@pytest.mark.slow
def test_one_two_and_three_stages_are_bit_equal(root: Path) -> None:
    """Also recomputed."""
    pairs, streams = config(root, "representation"), breakers(root)
    found = {}
    for stages in (1, 2, 3):
        common = [f"pipeline_stages={stages}", "layers_to_transform='1:3'"]

        def case(name: str, of: Path, *more: str) -> Case:
            output = f"output_dir={str(root / 'runs' / f'{name}{stages}')!r}"  # noqa: B023
            return Case(name, of, [output, *common, *more], steps=STEPS, evaluate_at=[0, STEPS])  # noqa: B023

        cases = [case("pairs", pairs), case("streams", streams)]
        if stages == 2:
            cases.append(case("recomputed", pairs, "activation_checkpointing=true"))
        found[stages] = stage_runs.run(stages, cases, root / f"results{stages}")
    for name in ("pairs", "streams"):
        whole = found[1][name]
        for other in (found[2][name], found[3][name]):
            assert other.losses == whole.losses
            assert other.evaluation(STEPS) == whole.evaluation(STEPS)
            for key, weight in whole.weights.items():
                assert torch.equal(other.weights[key], weight), key
    pairs_on_two = found[2]["pairs"]
    assert found[2]["recomputed"].losses == pairs_on_two.losses
    first = next(line for line in builders.metrics(pairs_on_two.run_dir) if "train/loss" in line)
    assert first["train/tap/retain"] == 0
    assert first["tap_cosine/retain/3"] == 1
    terms = [first[f"train/tap/{name}/weighted"] for name in ("reroute", "retain", "axis")]
    terms.append(math.log(2) - first["train/rewards/margins"] / 2)  # margins are rounding here, so −log σ is a line
    assert abs(first["train/loss"] - sum(terms)) <= UNITS * UNIT * sum(map(abs, terms))


@pytest.mark.slow
def test_circuit_breakers_turn_states_away_and_are_resumed_bit_equal(root: Path) -> None:
    """What is retained is only measured: of random text in a random model, both streams are alike, and would be held fast."""
    toml = str(breakers(root, keep=0.0))
    common = ["max_steps=30", "epochs=99", "eval_steps=30", "eval_before_first_step=true"]
    plan = [
        {"config": toml, "overrides": common},
        {"config": toml, "overrides": common, "stop_after": 7},
        {"config": toml, "overrides": common, "resume": 1},
    ]
    result = run_plan(root, 2, plan, name="runs")
    whole, _, resumed = result["runs"]
    assert result["codes"] == [0, 75, 0]
    assert_equal(final_state(resumed), final_state(whole))
    assert numbers(resumed) == numbers(whole)
    lines = builders.metrics(Path(whole))
    evaluated = [line for line in lines if any(key.startswith("eval/streams/tap/") for key in line)]
    before, after = evaluated[0], evaluated[-1]
    assert before["eval/streams/tap/break"] == 2
    assert before["eval/streams/tap/keep"] == 0
    assert after["eval/streams/tap/break"] < 1.5
    trained = [line for line in lines if "train/loss" in line]
    assert trained[-1]["tap_cosine/break/2"] < 0.8 < trained[0]["tap_cosine/break/2"]
    assert trained[-1]["train/tap/keep"] > 0 == trained[-1]["train/tap/keep/weighted"]
