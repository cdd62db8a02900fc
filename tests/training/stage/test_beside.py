"""Taps over stages: loss and gradients equal to the bit however the model is cut, and the unsplit model's with plain formulas.

Stages run here as a pipeline runs them, forward with detached tensors between them, and backward from the last to the first, of
one floating-point tensor at each boundary.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config import loading
from pipeline.model import neftune
from pipeline.model.adapters.base import trainable
from pipeline.model.adapters.switch import adapters_off, holding
from pipeline.model.memory import activation
from pipeline.model.memory.levels import ActivationPolicy, RecomputeLevel
from pipeline.model.structure.build import logit_transform
from pipeline.objectives.distances import BETWEEN, DISTANCES, Numbers
from pipeline.objectives.preference import Preference, StepTotals
from pipeline.objectives.preference_losses import Mixture, Settings
from pipeline.objectives.representation import IS_ANSWER, IS_TOKEN, Tap, WithTaps
from pipeline.objectives.rows import log_probs
from pipeline.training.stage import families
from pipeline.training.stage.beside import Beside
from pipeline.training.start import resolve
from tests.helpers import builders, plain_distances, unsplit
from tests.helpers.mixtures import randomise
from tests.helpers.stages import build, token_ids

LAYERS, CUTS = 4, ([0, 4], [0, 2, 4], [0, 1, 3, 4])
LENGTHS, STARTS, TOKENS = (16, 11, 9, 13), (4, 5, 4, 5), 16  # of chosen, chosen, rejected, rejected
SLOTS, UNITS, PROGRESS, RANK, ALPHA = 2, 2, 0.25, 4, 8
NUMBERS = Numbers(plain_distances.ALPHA, plain_distances.THRESHOLD, plain_distances.K)
CHOSEN, REJECTED = 0, 1
TAPS = (
    Tap("reroute", REJECTED, CHOSEN, (1, 2), "l2", schedule="1 - p/2"),
    Tap("retain", CHOSEN, CHOSEN, (1, 3), "l2", weight=2.0, schedule="p/2"),
    *(Tap(name, CHOSEN, REJECTED if name in BETWEEN else CHOSEN, (2,), name, numbers=NUMBERS) for name in DISTANCES),
    Tap("all", REJECTED, REJECTED, (3,), "cosine", answers_only=False),
    Tap("means", REJECTED, CHOSEN, (1,), "squared", align="mean"),
    Tap("relative", CHOSEN, CHOSEN, (3,), "l2", relative=True, weight=0.5),
)
REFERENCE = torch.tensor([[-20.0, -31.0], [-28.0, -25.0]])


def slots_of(taps: tuple[Tap, ...]) -> tuple[int, ...]:
    return tuple(sorted({slot for tap in taps for slot in tap.reference_slots}))


@pytest.fixture(scope="module")
def adapter(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = builders.write_config(
        tmp_path_factory.mktemp("config") / "c.toml",
        model=str(llama),
        output_dir="o",
        layers_to_transform="1:3",
        lora_dropout=0.3,
    )
    return resolve.resolve(loading.load(str(path), None, [])).trained.adapter


def rows() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids, positions, marks, labels, [B, T]."""
    ids = token_ids(SLOTS * UNITS, TOKENS)
    places = torch.arange(TOKENS)
    there, answer = (
        torch.stack([places < n for n in LENGTHS]),
        torch.stack([(places >= a) & (places < n) for a, n in zip(STARTS, LENGTHS, strict=True)]),
    )
    marks = there.to(torch.int8) * IS_TOKEN + answer.to(torch.int8) * IS_ANSWER
    return ids, places.expand_as(ids).contiguous(), marks, torch.where(answer, ids, -100)


def stages_of(folder: Path, adapter: Any, cuts: list[int], size: float = 0.3) -> list[Any]:
    stages = [build(folder, first, end).train() for first, end in pairwise(cuts)]
    for stage in stages:
        families.inject(stage, adapter)
    if size:
        randomise({name: p for stage in stages for name, p in trainable(stage).items()}, size)
    return stages


class Run:
    """One micro-batch through stages; loss, gradients, and how often each layer has run backward."""

    def __init__(
        self,
        stages: list[Any],
        taps: tuple[Tap, ...] = TAPS,
        head: bool = True,
        dropout: bool = False,
        live: bool = False,
        reference: Tensor = REFERENCE,
        as_reference: Callable[[Any], AbstractContextManager[None]] = adapters_off,
    ) -> None:
        if not dropout:
            for stage in stages:
                for name, module in stage.named_modules():
                    if name.endswith("dropout"):
                        module.p = 0.0
        slots = tuple(range(SLOTS)) if live else slots_of(taps)
        tapped = [Beside(stage, taps, SLOTS, slots, partial(as_reference, stage), scores=live) for stage in stages]
        last, step = stages[-1], StepTotals()
        step.begin(PROGRESS)
        transform = logit_transform(last.model.config)
        mixture = Mixture({"sigmoid": 1.0}, Settings(beta=0.3))
        self.reference: Tensor | None = None

        def take() -> Tensor:
            hidden = tapped[-1].take_reference()
            self.reference = log_probs(hidden, labels, last.head, transform)[0].view(SLOTS, UNITS)
            return hidden

        preference = Preference(last.head, transform, mixture, SLOTS, step, take if live else None) if head else None
        objective: Any = WithTaps(preference, taps, SLOTS, step, tapped[-1].take) if taps else preference
        self.backwards: Counter[int] = Counter()
        for stage in stages:
            for index, layer in stage.layers.items():
                layer.register_full_backward_hook(lambda *_, index=index: self.backwards.update([index]))
        ids, positions, marks, labels = rows()
        self.handed: list[tuple[Tensor, ...]] = []
        outputs, carried = [], (ids, positions, torch.tensor(LENGTHS), marks)
        for stage in stages:
            outputs.append(stage(carried))
            if stage is not last:
                carried = tuple(t.detach() for t in outputs[-1])
                self.handed.append(carried)
                carried[0].requires_grad_(outputs[-1][0].requires_grad)
        given = {
            "labels": labels, "loss_scale": torch.tensor(0.1), "unit_scale": torch.tensor(1 / UNITS), "reference": reference,
            "desirable": torch.zeros(UNITS, dtype=torch.bool),
        }  # fmt: skip
        self.loss = objective.loss(outputs[-1], given)
        self.loss.backward()
        for output, handed in reversed(list(zip(outputs[:-1], self.handed, strict=True))):
            if output[0].requires_grad:
                output[0].backward(handed[0].grad)
        leaves = {name: p for stage in stages for name, p in trainable(stage).items()}
        self.gradients = {name: p.grad for name, p in leaves.items() if p.grad is not None}
        self.totals = step.taken()
        self.means = objective.means(self.totals, 0)
        self.logged = {tag: value for one in tapped for tag, value in one.measured().items()}


class Oracle:
    """transformers' whole model, each row alone, and formulas in fp64."""

    def __init__(self, folder: Path, initial: dict[str, Tensor]) -> None:
        ids, _, marks, _ = rows()
        reference, policy = (unsplit.load(folder, torch.float64) for _ in range(2))
        self.leaves = unsplit.with_multiplicative(policy, initial, ALPHA / RANK)
        self.ids, self.marks = ids, marks
        with torch.no_grad():
            self.y, _ = self.states(reference)
        self.x, self.log_probs = self.states(policy)

    def states(self, model: Any) -> tuple[list[dict[int, Tensor]], Tensor]:
        """By row and layer [T, D] of the row's tokens; the answers' log-probabilities [S, U]."""
        found, sums = [], []
        for row, (length, start) in enumerate(zip(LENGTHS, STARTS, strict=True)):
            own: dict[int, Tensor] = {}
            hooks = [
                layer.register_forward_hook(partial(unsplit.keep_output, own, i))
                for i, layer in enumerate(model.model.layers)
            ]
            ids = self.ids[row, :length]
            logits = model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
            sums.append(logits[start - 1 : length - 1].gather(1, ids[start:length, None]).sum())
            for hook in hooks:
                hook.remove()
            found.append({i: state[0] for i, state in own.items()})
        return found, torch.stack(sums).view(SLOTS, UNITS)

    def tapped(self, tap: Tap, unit: int) -> Tensor:
        """The distance of one unit, over the tap's layers."""
        return torch.stack([self.at(tap, layer, unit) for layer in tap.layers]).sum()

    def at(self, tap: Tap, layer: int, unit: int) -> Tensor:
        of, to = tap.of * UNITS + unit, tap.to * UNITS + unit
        bit = IS_ANSWER if tap.answers_only else IS_TOKEN
        here, there = (self.marks[row] & bit != 0 for row in (of, to))

        def mean(states: list[dict[int, Tensor]], row: int, mask: Tensor) -> Tensor:
            return states[row][layer][mask[: LENGTHS[row]]].mean(0)

        if tap.distance in BETWEEN:
            a, v = (mean(states, of, here) - mean(states, to, there) for states in (self.x, self.y))
            return plain_distances.BETWEEN[tap.distance](a, v)
        if tap.align == "mean":
            return plain_distances.OF_ROWS[tap.distance](mean(self.x, of, here)[None], mean(self.y, to, there)[None])
        both = (here & there).nonzero()[:, 0]
        x, y = self.x[of][layer][both], self.y[to][layer][both]
        found = plain_distances.OF_ROWS[tap.distance](x, y)
        return found / y.norm(dim=-1).mean() if tap.relative else found

    def loss(self, taps: tuple[Tap, ...], head: bool = True) -> Tensor:
        schedule = {"constant": 1.0, "1 - p/2": 1 - PROGRESS / 2, "p/2": PROGRESS / 2}
        parts = [tap.weight * schedule[tap.schedule] * self.tapped(tap, u) for tap in taps for u in range(UNITS)]
        if head:
            ratios = self.log_probs - REFERENCE.double()
            parts += list(-torch.nn.functional.logsigmoid(0.3 * (ratios[0] - ratios[1])))
        return torch.stack(parts).sum() / UNITS


@pytest.fixture(scope="module")
def runs(llama: Path, adapter: Any) -> list[Run]:
    return [Run(stages_of(llama, adapter, cuts)) for cuts in CUTS]


def initial(llama: Path, adapter: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainable(stages_of(llama, adapter, [0, 4])[0]).items()}


def test_stages_are_bit_equal_and_the_unsplit_models(runs: list[Run], llama: Path, adapter: Any) -> None:
    whole, *others = runs
    for other in others:
        assert torch.equal(other.loss, whole.loss)
        assert other.gradients.keys() == whole.gradients.keys()
        assert all(torch.equal(other.gradients[name], gradient) for name, gradient in whole.gradients.items())
    oracle = Oracle(llama, initial(llama, adapter))
    loss = oracle.loss(TAPS)
    loss.backward()
    assert float(whole.loss) == pytest.approx(float(loss), rel=unsplit.LOSS_TOLERANCE)
    largest = max(unsplit.size(leaf.grad) for leaf in oracle.leaves.values())
    for name, leaf in oracle.leaves.items():
        assert unsplit.size(whole.gradients[name] - leaf.grad) <= unsplit.GRADIENT_TOLERANCE * largest, name


def test_each_tap_is_the_formula(runs: list[Run], llama: Path, adapter: Any) -> None:
    oracle = Oracle(llama, initial(llama, adapter))
    for tap in TAPS:
        expected = torch.stack([oracle.tapped(tap, unit) for unit in range(UNITS)]).mean()
        assert runs[0].means[f"tap/{tap.name}"] == pytest.approx(float(expected), rel=1e-4), tap.name


def test_a_layer_runs_backward_once_whatever_is_tapped(runs: list[Run]) -> None:
    for run in runs:
        assert run.backwards == {1: 1, 2: 1, 3: 1}, "layers above the first that is trained, and that one"


def test_what_is_logged(runs: list[Run]) -> None:
    for run in runs:
        assert run.means["loss"] == pytest.approx(float(runs[0].loss), rel=1e-5)
        assert run.means["tap/retain/weighted"] == pytest.approx(2.0 * PROGRESS / 2 * run.means["tap/retain"])
        assert {"tap_cosine/reroute/1", "tap_cosine/reroute/2", "tap_cosine/retain/3"} <= run.logged.keys()
        assert all(-1 <= value <= 1 for value in run.logged.values())
        assert run.logged == runs[0].logged


def test_one_float_crosses_and_the_reference_only_as_far_as_it_is_read(llama: Path, adapter: Any) -> None:
    low = (Tap("low", CHOSEN, CHOSEN, (1,), "l2"),)
    run = Run(stages_of(llama, adapter, [0, 1, 2, 4]), low, head=False)
    for handed in run.handed:
        assert [t.is_floating_point() for t in handed] == [True] + [False] * (len(handed) - 1)
    assert [len(handed) for handed in run.handed] == [4, 3]
    oracle = Oracle(llama, initial(llama, adapter))
    loss = oracle.loss(low, head=False)
    assert float(run.loss) == pytest.approx(float(loss), rel=1e-5)
    assert run.backwards == {1: 1}, "above the last tap nothing runs backward"
    assert all(".layers.1." in name for name in run.gradients)


@pytest.mark.parametrize("level", [RecomputeLevel.INPUT, RecomputeLevel.EVERYTHING])
def test_recomputed_it_is_bit_equal(runs: list[Run], llama: Path, adapter: Any, level: RecomputeLevel) -> None:
    stages = stages_of(llama, adapter, [0, 2, 4])
    for stage in stages:
        activation.apply(stage, dict.fromkeys(stage.layers, ActivationPolicy(level)), None, stage is not stages[0])
    run = Run(stages)
    assert torch.equal(run.loss, runs[0].loss)
    assert all(torch.equal(run.gradients[name], gradient) for name, gradient in runs[0].gradients.items())


def test_at_its_start_an_adapter_changes_nothing(llama: Path, adapter: Any) -> None:
    """Retain taps are exactly 0, cosines of a row to itself exactly 1: policy and reference are computed alike."""
    of_itself = tuple(
        Tap(f"{name}{slot}", slot, slot, (1, 2, 3), name)
        for name in ("l2", "relu_cosine")
        for slot in (CHOSEN, REJECTED)
    )
    run = Run(stages_of(llama, adapter, [0, 2, 4], size=0.0), of_itself, dropout=True)
    for slot in (CHOSEN, REJECTED):
        assert run.means[f"tap/l2{slot}"] == 0
        assert run.means[f"tap/relu_cosine{slot}"] == 3
    assert set(run.logged.values()) == {1.0}


def test_the_reference_sees_neither_dropout_nor_noise(llama: Path, adapter: Any) -> None:
    """Of an adapter in a folder, as the base's adapters drop nothing while they are off. The policy sees both."""
    (other,) = stages_of(llama, adapter, [0, 4], 0.2)
    values = {name: parameter.detach().clone() for name, parameter in trainable(other).items()}

    def run(seed: int, noise: bool) -> Run:
        stages = stages_of(llama, adapter, [0, 2, 4])
        if noise:
            neftune.apply(stages[0], 5.0)
        torch.manual_seed(seed)
        return Run(stages, (), dropout=noise, live=True, as_reference=partial(holding, values=values))

    quiet, noisy, again = run(0, noise=False), run(0, noise=True), run(1, noise=True)
    assert len({float(one.loss) for one in (quiet, noisy, again)}) == 3
    for one in (noisy, again):
        assert torch.equal(one.reference, quiet.reference)  # type: ignore[arg-type]


def test_without_marks_a_stage_is_as_it_was(llama: Path, adapter: Any) -> None:
    """Generation, and the pass that scores the reference."""
    ids, positions, _, _ = rows()
    plain, tapped = (stages_of(llama, adapter, [0, 2, 4]) for _ in range(2))
    for stage in tapped:
        Beside(stage, TAPS, SLOTS, slots_of(TAPS), partial(adapters_off, stage))
    with torch.no_grad():
        found = []
        for stages in (plain, tapped):
            for stage in stages:
                stage.eval()
            found.append(stages[1](stages[0]((ids, positions, torch.tensor(LENGTHS)))))
    assert torch.equal(*found)


@pytest.mark.parametrize("cuts", CUTS)
def test_a_live_reference_is_the_model_without_adapters(llama: Path, adapter: Any, cuts: list[int]) -> None:
    """Its log-probabilities are the unsplit base's, and the policy's gradients what a cached reference gives, to the bit."""
    live = Run(stages_of(llama, adapter, cuts), (), live=True)
    assert [len(handed) for handed in live.handed] == [4] * (len(cuts) - 2)
    oracle = Oracle(llama, initial(llama, adapter))
    with torch.no_grad():
        _, base = oracle.states(unsplit.load(llama, torch.float64))
    assert live.reference is not None
    torch.testing.assert_close(live.reference.double(), base, rtol=1e-5, atol=1e-4)
    cached = Run(stages_of(llama, adapter, cuts), (), reference=live.reference)
    assert torch.equal(live.loss, cached.loss)
    assert all(torch.equal(live.gradients[name], gradient) for name, gradient in cached.gradients.items())
    assert live.backwards == cached.backwards == {1: 1, 2: 1, 3: 1}


def test_a_live_reference_and_taps_go_together(llama: Path, adapter: Any, runs: list[Run]) -> None:
    live = Run(stages_of(llama, adapter, [0, 2, 4]), TAPS, live=True)
    cached = Run(stages_of(llama, adapter, [0, 2, 4]), TAPS, reference=live.reference)
    assert live.means["loss"] == pytest.approx(cached.means["loss"], rel=1e-6)
    assert {name: value for name, value in live.means.items() if name.startswith("tap/")} == pytest.approx(
        {name: value for name, value in runs[0].means.items() if name.startswith("tap/")}, rel=1e-5, abs=1e-6
    )


def test_another_adapter_is_the_reference_and_leaves_the_trained_one(llama: Path, adapter: Any) -> None:
    """Also while another micro-batch's backward is to come."""
    (stage,), (other,) = (stages_of(llama, adapter, [0, 4], size) for size in (0.3, 0.2))
    for one in (stage, other):
        one.eval()  # no dropout
    values = {name: parameter.detach().clone() for name, parameter in trainable(other).items()}
    before = {name: parameter.detach().clone() for name, parameter in trainable(stage).items()}
    ids, positions, _, _ = rows()
    expected = stage((ids, positions)).sum()
    expected.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in trainable(stage).items()}
    stage.zero_grad()
    output = stage((ids, positions)).sum()
    with torch.no_grad(), holding(stage, values):
        as_other = stage((ids, positions))
    output.backward()
    with torch.no_grad():
        assert torch.equal(as_other, other((ids, positions)))
    for name, parameter in trainable(stage).items():
        assert torch.equal(parameter, before[name])
        assert torch.equal(parameter.grad, gradients[name])
