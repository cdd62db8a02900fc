"""Preference training over two processes against the unsplit model: loss, gradients, weights, metrics, whatever the division.

The oracle scores whole rows with transformers' own logits; of the losses, which `test_preference_losses.py` compares with TRL,
it takes the formulas.
"""

import json
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config import loading
from pipeline.data import tokenizer
from pipeline.data.batches import Position
from pipeline.objectives.preference_losses import LOSSES, Batch, Mixture, Settings
from pipeline.training.data import specs
from pipeline.training.data.batches import micro_batches
from pipeline.training.data.read import read_data
from tests.helpers import builders, plain_distances, stage_runs, unsplit
from tests.helpers.data import prose
from tests.helpers.stage_runs import Case, Result

STEPS, LR, EPS, RANK, ALPHA, BETA = 3, 1e-2, 1e-3, 4, 8, 0.5
MICRO_BATCHES, UNITS = 4, 8  # of a step
# A plain fp32 loop rounds about as often as ours, in another order, so both are off from fp64 alike. Most of it is what the sums
# of log-probabilities leave in the factors of a step's 8 units, of which a norm is a draw of few.
AS_NEAR = 4
WORDS = prose(1500, seed=4).split()
OBJECTIVES: dict[str, dict[str, Any]] = {
    "sigmoid": {"loss_type": "sigmoid"},
    "mixture": {"loss_type": ["ipo", "sft"], "loss_weights": [1.0, 0.25]},
    "orpo": {"loss_type": "orpo"},
    "kto": {"loss_type": "kto"},
    "ranked": {"loss_type": "plackett_luce"},
    "representation": {
        "type": "representation",
        "loss_type": "sigmoid",
        "tap": [
            {
                "name": "reroute",
                "of": "rejected",
                "to": "chosen",
                "layers": [1, 2],
                "distance": "l2",
                "schedule": "1 - p/2",
            },
            {"name": "retain", "of": "chosen", "layers": [1, 3], "distance": "l2", "weight": 2.0, "schedule": "p/2"},
            {"name": "axis", "of": "chosen", "to": "rejected", "layers": [2], "distance": "projection", "weight": 0.3},
        ],
    },
}
QUICK = ("kto", "representation")
KINDS = {"kto": "unpaired", "ranked": "ranked"}


def text(start: int, words: int) -> str:
    return " " + " ".join(WORDS[start : start + words])


def write_rows(root: Path) -> None:
    """Pairs of answers of many lengths, some prompts with two; the same as ranked answers."""
    pairs = [
        {"prompt": WORDS[7 * (n // 2)], "chosen": text(3 * n, n % 9 + 1), "rejected": text(500 + 3 * n, n % 5 + 2)}
        for n in range(40)
    ]
    ranked = [
        {"prompt": row["prompt"], "answers": [row["chosen"], row["rejected"], text(900 + n, 4)]}
        for n, row in enumerate(pairs)
    ]
    for name, rows in (("preference", pairs), ("unpaired", pairs), ("ranked", ranked)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def config(root: Path, name: str) -> Path:
    kind = KINDS.get(name, "preference")
    ranks = {"ranks": 3} if kind == "ranked" else {}
    rows = {"dataset_type": kind, "dataset_path": str(root / f"{kind}.jsonl"), "sequence_len": 64, **ranks}
    builders.write_config(
        root / f"{name}.toml",
        model=str(root / "cohere"),
        output_dir=str(root / "runs" / name),
        optimizer={"type": "adamw", "lr": LR, "eps": EPS, "weight_decay": 0.1},
        gradient_accumulation_steps=MICRO_BATCHES,
        gradient_clipping=0.1,
        micro_batch_size_per_gpu=2,
        datasets=[{"name": "pairs", **rows, "eval_size": 6}],
        objective={"type": "preference", "beta": BETA, **OBJECTIVES[name]},
    )
    return root / f"{name}.toml"


class Launched:
    """Results by name: those of `make test` in one launch, all others in a second, when one of them is asked for."""

    def __init__(self, folder: Path, cases: list[Case]) -> None:
        self._folder, self._cases, self._found = folder, cases, dict[str, Result]()

    def __getitem__(self, name: str) -> Result:
        if name not in self._found:
            quick = name in QUICK
            cases = [case for case in self._cases if (case.name in QUICK) == quick]
            self._found |= stage_runs.run(2, cases, self._folder / ("quick" if quick else "slow"))
        return self._found[name]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("preference")
    builders.save_model(root / "cohere", "cohere", logit_scale=1.0)
    write_rows(root)
    for name in OBJECTIVES:
        config(root, name)
    return root


@pytest.fixture(scope="module")
def results(root: Path) -> Launched:
    """All objectives on two stages; DPO also with other divisions of a step, over replicas, recomputed."""

    def case(name: str, of: str, *overrides: str) -> Case:
        output = f"output_dir={str(root / 'runs' / name)!r}"
        return Case(name, root / f"{of}.toml", [output, *overrides], steps=STEPS, evaluate_at=[0, STEPS])

    cases = [
        *(case(name, name) for name in OBJECTIVES),
        case("one by one", "sigmoid", "micro_batch_size_per_gpu=1", "gradient_accumulation_steps=8"),
        case("all at once", "sigmoid", "micro_batch_size_per_gpu=8", "gradient_accumulation_steps=1"),
        case("replicas", "sigmoid", "pipeline_stages=1", "gradient_accumulation_steps=2"),
        case("recomputed", "sigmoid", "activation_checkpointing=true"),
        case("own start", "sigmoid", 'objective.reference.model="start"'),
        case("live", "sigmoid", "objective.reference.precompute_ref_log_probs=false"),
        case("live, taps", "representation", "objective.reference.precompute_ref_log_probs=false"),
    ]
    return Launched(root / "results", cases)


class Oracle:
    """The whole model, a plain loop over the same units."""

    def __init__(
        self, root: Path, name: str, initial: dict[str, Tensor], compared_with: "Oracle | None" = None
    ) -> None:
        """In fp64; or in fp32, beside the references that one in fp64 found, rounded: so the two do not err alike."""
        dtype = torch.float32 if compared_with else torch.float64
        chosen = loading.load(str(root / f"{name}.toml"), None, [])
        spec = specs.data_of(chosen)
        data = read_data(spec, tokenizer.load(chosen.model))
        batches = micro_batches(spec, data)
        self.mixture = Mixture(dict(zip(*_weights(OBJECTIVES[name]), strict=True)), Settings(beta=BETA))
        self.model = unsplit.load(root / "cohere", dtype)
        self.steps, position = [], Position()
        for _ in range(STEPS):
            micro, info = batches.step(position)
            self.steps.append([[row[1] for row in batch.rows if row] for batch in micro])
            position = info.next_position
        self.store: Any = batches.stores[0]
        self.held_out = [int(row) for row in data.evaluation["pairs"].rows]
        needed = sorted({unit for step in self.steps for batch in step for unit in batch} | set(self.held_out))
        self.taps: list[dict[str, Any]] = OBJECTIVES[name].get("tap", [])
        if compared_with:
            self.reference = {unit: sums.float() for unit, sums in compared_with.reference.items()}
            self.as_base = {
                unit: [{layer: state.float() for layer, state in row.items()} for row in rows]
                for unit, rows in compared_with.as_base.items()
            }
        else:
            with torch.no_grad():
                self.reference = {unit: self.sums(unit) for unit in needed}
                self.as_base = {unit: self.states(unit) for unit in needed} if self.taps else {}
        self.leaves = unsplit.with_multiplicative(self.model, initial, ALPHA / RANK)

    def sums(self, unit: int) -> Tensor:
        """[S]: Σ log p of each row's answer."""
        found = []
        for slot in self.store.slots:
            ids = torch.from_numpy(slot.ids(unit).copy()).long()
            ((start, end),) = slot.spans(unit)
            logits = self.model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
            found.append(logits[start - 1 : end - 1].gather(1, ids[start:end, None]).sum())
        return torch.stack(found)

    def states(self, unit: int) -> list[dict[int, Tensor]]:
        """By row and layer, [n, D]: those of the answer's tokens."""
        found = []
        for slot in self.store.slots:
            own: dict[int, Tensor] = {}
            hooks = [
                layer.register_forward_hook(partial(unsplit.keep_output, own, i))
                for i, layer in enumerate(self.model.model.layers)
            ]
            self.model(input_ids=torch.from_numpy(slot.ids(unit).copy()).long()[None], use_cache=False)
            for hook in hooks:
                hook.remove()
            ((start, end),) = slot.spans(unit)
            found.append({i: state.reshape(-1, state.shape[-1])[start:end] for i, state in own.items()})
        return found

    def tapped(self, unit: int, progress: float) -> Tensor:
        """What the taps add to the loss of one unit."""
        policy, base, total = self.states(unit), self.as_base[unit], torch.zeros(())
        schedules = {"constant": 1.0, "1 - p/2": 1 - progress / 2, "p/2": progress / 2}
        for tap in self.taps:
            of, to = (("chosen", "rejected").index(tap.get(key, tap["of"])) for key in ("of", "to"))
            weight = tap.get("weight", 1.0) * schedules[tap.get("schedule", "constant")]
            for layer in tap["layers"]:
                if tap["distance"] == "projection":
                    a, v = (rows[of][layer].mean(0) - rows[to][layer].mean(0) for rows in (policy, base))
                    total = total + weight * plain_distances.projection(a, v)
                else:
                    n = min(len(policy[of][layer]), len(base[to][layer]))
                    x, y = policy[of][layer][:n], base[to][layer][:n]
                    total = total + weight * plain_distances.OF_ROWS[tap["distance"]](x, y)
        return total

    def batch(self, units: list[int]) -> Batch:
        slots = self.store.slots
        return Batch(
            torch.stack([self.sums(unit) for unit in units], dim=1),
            torch.stack([self.reference[unit] for unit in units], dim=1),
            torch.tensor([[int(slot.targets[unit]) for unit in units] for slot in slots]),
            torch.tensor([bool(self.store.desirable[unit]) for unit in units]),
            self.mixture.settings,
        )

    def loss(self, division: list[list[int]], progress: float = 0.5) -> Tensor:
        """Of a step whose micro-batches hold these units."""
        batches = [self.batch(units) for units in division if units]
        units = sum(len(batch.policy[0]) for batch in batches)
        words = sum(int(batch.tokens[0].sum()) for batch in batches)
        per_unit = sum(self.mixture.per_unit(batch).sum() for batch in batches) / units
        per_unit = per_unit + sum(self.tapped(unit, progress) for own in division for unit in own if self.taps) / units
        return per_unit - self.mixture.nll * sum(batch.policy[0].sum() for batch in batches) / words  # type: ignore[return-value]

    def run(self) -> tuple[list[float], list[dict[str, Tensor]]]:
        optimizer = torch.optim.AdamW(self.leaves.values(), lr=LR, eps=EPS, weight_decay=0.1, betas=(0.9, 0.99))
        losses, gradients = [], []
        for step, division in enumerate(self.steps):
            loss = self.loss(division, step / STEPS)
            loss.backward()
            losses.append(loss.item())
            gradients.append({name: leaf.grad.clone() for name, leaf in self.leaves.items()})  # type: ignore[union-attr]
            torch.nn.utils.clip_grad_norm_(list(self.leaves.values()), 0.1)
            optimizer.step()
            optimizer.zero_grad()
        return losses, gradients


def _weights(objective: dict[str, Any]) -> tuple[list[str], list[float]]:
    names = objective["loss_type"]
    names = [names] if isinstance(names, str) else names
    return names, objective.get("loss_weights", [1.0] * len(names))


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in OBJECTIVES])
def test_stages_train_what_the_whole_model_would(root: Path, results: Launched, name: str) -> None:
    result = results[name]
    oracle = Oracle(root, name, result.initial)
    plain = Oracle(root, name, result.initial, oracle)
    with torch.no_grad():
        before = float(oracle.loss([oracle.held_out]))
    losses, gradients = oracle.run()
    _, rounded = plain.run()
    assert result.losses == pytest.approx(losses, rel=1e-4, abs=1e-5)
    assert len(result.losses) == STEPS
    for step, (exact, other) in enumerate(zip(gradients, rounded, strict=True), start=1):
        ours = result.gradients(step)
        assert ours.keys() == exact.keys()
        assert apart(ours, exact) <= AS_NEAR * apart(other, exact), step
    if not LOSSES[next(iter(oracle.mixture.weights))].compares:
        assert result.evaluation(0)["pairs"] == pytest.approx(before, rel=1e-5, abs=1e-5)
        with torch.no_grad():
            after = float(oracle.loss([oracle.held_out]))
        assert result.evaluation(STEPS)["pairs"] == pytest.approx(after, rel=1e-4, abs=1e-5)
    weights = {key: leaf.detach() for key, leaf in oracle.leaves.items()}
    assert apart(result.weights, weights) <= AS_NEAR * apart(plain.leaves, weights)


def apart(some: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
    """The 2-norm of the difference of all tensors together."""
    return math.sqrt(sum(unsplit.size(some[key].detach().double() - tensor) ** 2 for key, tensor in exact.items()))


@pytest.mark.parametrize("name", QUICK)
def test_each_layer_runs_backward_once_a_micro_batch(results: Launched, name: str) -> None:
    """Adapters are on layers 0 to 2 of four, so backward goes down to layer 0; whatever is compared or tapped."""
    assert [rank["backwards"] for rank in results[name].ranks] == [
        rank["layers"] * MICRO_BATCHES * STEPS for rank in results[name].ranks
    ]


def test_the_first_loss_of_dpo_is_that_of_no_preference(results: Launched) -> None:
    assert results["sigmoid"].losses[0] == pytest.approx(0.693147, abs=1e-5)
    assert results["sigmoid"].losses[-1] < results["sigmoid"].losses[0]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "cached"), [("live", "sigmoid"), ("live, taps", "representation")])
def test_a_live_reference_is_the_cached_one(results: Launched, name: str, cached: str) -> None:
    """To the rounding of products of other shapes; in evaluation, too."""
    ours, other = results[cached], results[name]
    assert other.losses == pytest.approx(ours.losses, rel=1e-5)
    for step in (0, STEPS):
        assert other.evaluation(step) == pytest.approx(ours.evaluation(step), rel=1e-5)
    for key, weight in ours.weights.items():
        assert unsplit.size(other.weights[key] - weight) <= 1e-3 * unsplit.size(weight)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one by one", "all at once", "replicas", "recomputed", "own start"])
def test_a_step_is_the_mean_over_its_units_however_divided(results: Launched, name: str) -> None:
    """Micro-batches of other sizes and other padding: the same to rounding. Recomputation and an own start: to the bit."""
    ours, other = results["sigmoid"], results[name]
    exact = name in ("recomputed", "own start")
    assert other.losses == (ours.losses if exact else pytest.approx(ours.losses, rel=1e-5))
    for key, weight in ours.weights.items():
        difference = unsplit.size(other.weights[key] - weight)
        assert difference <= (0 if exact else 1e-3 * unsplit.size(weight))


def test_metrics_have_trls_names(results: Launched) -> None:
    lines = [line for line in builders.metrics(results["sigmoid"].run_dir) if "train/loss" in line]
    first, last = lines[0], lines[-1]
    assert abs(first["train/rewards/margins"]) < 1e-4
    assert last["train/rewards/margins"] == pytest.approx(
        last["train/rewards/chosen"] - last["train/rewards/rejected"], abs=1e-5
    )
    assert last["train/rewards/margins"] > 1e-3
    assert 0 <= last["train/rewards/accuracies"] <= 1
    assert first["train/logps/chosen"] < 0 > first["train/logps/rejected"]
    rated = [line for line in builders.metrics(results["kto"].run_dir) if "train/loss" in line][-1]
    assert rated["train/kl"] >= 0
    assert {"train/rewards/chosen", "train/rewards/rejected", "train/rewards/margins"} <= rated.keys()
