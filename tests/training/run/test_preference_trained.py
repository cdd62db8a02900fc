"""Preference training over two processes against the unsplit model: loss, gradients, weights, metrics, whatever the division.

The oracle scores whole rows with transformers' own logits; of the losses, which `test_preference_losses.py` compares with TRL,
it takes the formulas.
"""

import json
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

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
from tests.helpers.quick import only
from tests.helpers.stage_runs import Case, Result
from tests.helpers.unsplit import UNIT

STEPS, LR, EPS, RANK, ALPHA, BETA = 3, 1e-2, 1e-3, 4, 8, 0.5
MICRO_BATCHES, UNITS = 4, 8  # of a step
# A plain fp32 loop rounds about as often as ours, in another order, so both are off from fp64 alike. Most of it is what the sums
# of log-probabilities leave in the factors of a step's 8 units, of which a norm is a draw of few. A loss is a mean over units,
# and so off by no more than the worst of them.
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
DIVIDED = {
    "one by one": ("micro_batch_size_per_gpu=1", "gradient_accumulation_steps=8"),
    "all at once": ("micro_batch_size_per_gpu=8", "gradient_accumulation_steps=1"),
    "replicas": ("pipeline_stages=1", "gradient_accumulation_steps=2"),
}
TRAINED = ("kto", "representation")  # in `make test`
QUICK = (*TRAINED, "taps, one by one", "taps, all at once")
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

    live = "objective.reference.precompute_ref_log_probs=false"
    cases = [
        *(case(name, name) for name in OBJECTIVES),
        *(case(name, "sigmoid", *division) for name, division in DIVIDED.items()),
        *(case(f"taps, {name}", "representation", *division) for name, division in DIVIDED.items()),
        case("recomputed", "sigmoid", "activation_checkpointing=true"),
        case("own start", "sigmoid", 'objective.reference.model="start"'),
        case("live", "sigmoid", live, *DIVIDED["one by one"]),
        case("taps, live", "representation", live, *DIVIDED["one by one"]),
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

    def of_units(self, division: list[list[int]], progress: float = 0.5) -> Tensor:
        """[U]: the losses of units, whose mean is that of a step with these micro-batches."""
        micro_batches = [units for units in division if units]
        batches = [self.batch(units) for units in micro_batches]
        units = sum(map(len, micro_batches))
        words = sum(int(batch.tokens[0].sum()) for batch in batches)
        found = [self.mixture.per_unit(batch) - self.mixture.nll * batch.policy[0] * units / words for batch in batches]
        if self.taps:
            tapped = [torch.stack([self.tapped(unit, progress) for unit in units]) for units in micro_batches]
            found = [one + other for one, other in zip(found, tapped, strict=True)]
        return torch.cat(found)

    def run(self) -> "Trained":
        """Three steps."""
        optimizer = torch.optim.AdamW(self.leaves.values(), lr=LR, eps=EPS, weight_decay=0.1, betas=(0.9, 0.99))
        evaluated = [self.evaluated()]
        steps, gradients = [], []
        for step, division in enumerate(self.steps):
            losses = self.of_units(division, step / STEPS)
            losses.mean().backward()
            steps.append(losses.detach())
            gradients.append({name: leaf.grad.clone() for name, leaf in self.leaves.items()})  # type: ignore[union-attr]
            torch.nn.utils.clip_grad_norm_(list(self.leaves.values()), 0.1)
            optimizer.step()
            optimizer.zero_grad()
        evaluated.append(self.evaluated())
        weights = {name: leaf.detach() for name, leaf in self.leaves.items()}
        return Trained(torch.stack(steps), torch.stack(evaluated), gradients, weights)

    @torch.no_grad()
    def evaluated(self) -> Tensor:
        """[U]: of the units that are held out."""
        return self.of_units([self.held_out])


def _weights(objective: dict[str, Any]) -> tuple[list[str], list[float]]:
    names = objective["loss_type"]
    names = [names] if isinstance(names, str) else names
    return names, objective.get("loss_weights", [1.0] * len(names))


class Trained(NamedTuple):
    """What a plain loop computed: of each step the losses of its units [STEPS, U] and the gradients; those of the held-out units
    before and after [2, U]; the weights in the end."""

    losses: Tensor
    evaluated: Tensor
    gradients: list[dict[str, Tensor]]
    weights: dict[str, Tensor]


class Oracles:
    """By objective: the oracle, and what it computes in fp64 and in fp32, from where a run of it began."""

    def __init__(self, root: Path) -> None:
        self._root, self._known = root, dict[str, tuple[Oracle, Trained, Trained]]()
        self._began: dict[str, dict[str, Tensor]] = {}

    def of(self, name: str, result: Result) -> tuple[Oracle, Trained, Trained]:
        if name not in self._known:
            self._began[name] = result.initial
            oracle = Oracle(self._root, name, result.initial)
            plain = Oracle(self._root, name, result.initial, oracle)
            self._known[name] = oracle, oracle.run(), plain.run()
        began = self._began[name]
        assert began.keys() == result.initial.keys()
        assert all(torch.equal(tensor, result.initial[key]) for key, tensor in began.items())
        return self._known[name]


@pytest.fixture(scope="module")
def oracles(root: Path) -> Oracles:
    return Oracles(root)


@pytest.mark.parametrize("name", only(TRAINED, OBJECTIVES))
def test_stages_train_what_the_whole_model_would(results: Launched, oracles: Oracles, name: str) -> None:
    result = results[name]
    oracle, exact, plain = oracles.of(name, result)
    assert len(result.losses) == STEPS
    near(result.losses, exact.losses, plain.losses)
    for step, (right, other) in enumerate(zip(exact.gradients, plain.gradients, strict=True), start=1):
        ours = result.gradients(step)
        assert ours.keys() == right.keys()
        assert apart(ours, right) <= AS_NEAR * apart(other, right), step
    if not LOSSES[next(iter(oracle.mixture.weights))].compares:
        near([result.evaluation(step)["pairs"] for step in (0, STEPS)], exact.evaluated, plain.evaluated)
    assert apart(result.weights, exact.weights) <= AS_NEAR * apart(plain.weights, exact.weights)


def near(ours: list[float], exact: Tensor, plain: Tensor) -> None:
    """Means over units, fp32, against the losses of these [steps, U] in fp64, and as a plain loop in fp32 has them."""
    worst = (plain.double() - exact).abs().max()
    rounded = exact.shape[1] * UNIT * exact.abs().mean(1)  # a sum of as many numbers
    assert ((torch.tensor(ours, dtype=torch.float64) - exact.mean(1)).abs() <= AS_NEAR * worst + rounded).all()


def apart(some: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
    """The 2-norm of the difference of all tensors together."""
    return math.sqrt(sum(unsplit.size(some[key].detach().double() - tensor) ** 2 for key, tensor in exact.items()))


@pytest.mark.parametrize("name", TRAINED)
def test_each_layer_runs_backward_once_a_micro_batch(results: Launched, name: str) -> None:
    """Adapters are on layers 0 to 2 of four, so backward goes down to layer 0; whatever is compared or tapped."""
    assert [rank["backwards"] for rank in results[name].ranks] == [
        rank["layers"] * MICRO_BATCHES * STEPS for rank in results[name].ranks
    ]


@pytest.mark.slow
def test_the_first_loss_of_dpo_is_that_of_no_preference(results: Launched) -> None:
    """Policy and reference are the same operations on the same shapes, so only the sum over units rounds."""
    losses = results["one by one"].losses
    assert losses[0] == pytest.approx(math.log(2), rel=UNITS * UNIT)
    assert losses[-1] < losses[0]


def test_taps_begin_at_the_reference(results: Launched) -> None:
    """Retained rows are where they were, to the bit, and so are the differences that a projection is of."""
    first, *_ = (line for line in builders.metrics(results["representation"].run_dir) if "train/loss" in line)
    assert first["train/tap/retain"] == 0
    assert first["tap_cosine/retain/1"] == first["tap_cosine/retain/3"] == first["tap_cosine/axis/2"] == 1
    assert 0 < first["tap_cosine/reroute/1"] < 1 < first["train/tap/reroute"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "cached"), [("live", "one by one"), ("taps, live", "taps, one by one")])
def test_a_live_reference_is_the_cached_one(results: Launched, name: str, cached: str) -> None:
    """To the bit, as rows have the same shapes in both; in evaluation, too. Taps without a head's loss have no cached one."""
    ours, other = results[cached], results[name]
    assert other.losses == ours.losses
    for step in (0, STEPS):
        assert other.evaluation(step) == ours.evaluation(step)
    for key, weight in ours.weights.items():
        assert torch.equal(other.weights[key], weight), key


@pytest.mark.parametrize("name", only(QUICK, [f"{taps}{name}" for taps in ("taps, ", "") for name in DIVIDED]))
def test_a_step_is_the_mean_over_its_units_however_divided(results: Launched, oracles: Oracles, name: str) -> None:
    """Micro-batches of other sizes and other padding: each the whole model's, to rounding; so is where taps' schedules are."""
    result = results[name]
    _, exact, plain = oracles.of("representation" if "taps" in name else "sigmoid", result)
    near(result.losses, exact.losses, plain.losses)
    near([result.evaluation(step)["pairs"] for step in (0, STEPS)], exact.evaluated, plain.evaluated)
    assert apart(result.weights, exact.weights) <= AS_NEAR * apart(plain.weights, exact.weights)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["recomputed", "own start"])
def test_recomputed_or_compared_with_its_start_it_is_the_same(results: Launched, name: str) -> None:
    """The start of an adapter is the base."""
    ours, other = results["sigmoid"], results[name]
    assert other.losses == ours.losses
    for key, weight in ours.weights.items():
        assert torch.equal(other.weights[key], weight), key


def test_metrics_have_trls_names(results: Launched) -> None:
    lines = [line for line in builders.metrics(results["taps, one by one"].run_dir) if "train/loss" in line]
    first, last = lines[0], lines[-1]
    assert first["train/rewards/margins"] == 0
    difference = last["train/rewards/chosen"] - last["train/rewards/rejected"]
    assert abs(last["train/rewards/chosen"]) + abs(last["train/rewards/rejected"]) < 1
    assert last["train/rewards/margins"] == pytest.approx(difference, abs=2 * UNIT), "a difference below 1, rounded"
    assert last["train/rewards/margins"] > 1e-3
    assert 0 <= last["train/rewards/accuracies"] <= 1
    assert first["train/logps/chosen"] < 0 > first["train/logps/rejected"]
    rated = [line for line in builders.metrics(results["kto"].run_dir) if "train/loss" in line][-1]
    assert rated["train/kl"] >= 0
    assert {"train/rewards/chosen", "train/rewards/rejected", "train/rewards/margins"} <= rated.keys()
