"""The figures of every adapter on every dataset, beside the base's, and the lights that say where one is not to be believed.

Takes the scored datasets and tasks; gives cells, one for each adapter, dataset and measure, and stop-lights.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pipeline.evaluation import statistics
from pipeline.evaluation.harness import TaskResult
from pipeline.evaluation.measures import COVERAGE, NLL, Values, measures
from pipeline.evaluation.records import Scored
from pipeline.evaluation.statistics import Estimate

BASE = "base"
IN_SAMPLE = "in-sample"
ROLES = (IN_SAMPLE, "test", "ood", "unrelated")

# Lights: of a training that failed, or of a model that it broke.
NOT_LEARNT, OPPOSITE = "did not learn", "learned the opposite"
INCOHERENT, INACTIVE = "incoherent", "inactive"
WORST_PERPLEXITY = 1.2  # of the base's
LEAST_COVERAGE = 0.8  # of the base's


class Rules(NamedTuple):
    """With what figures are made: bootstrap draws, the confidence of intervals, the seed of the draws, β of the margin."""

    resamples: int
    confidence: float
    seed: int
    beta: float


class About(NamedTuple):
    """What a figure is of; the first fields of a `Cell`."""

    adapter: str
    dataset: str
    role: str
    measure: str
    main: bool
    better: int


class Cell(NamedTuple):
    """One figure. `delta`: its difference to the base's, None for the base; `p`: the sign test's, for what is right or wrong;
    `detectable`: the smallest true difference that would be told from 0. `main`: it is the dataset's first measure."""

    adapter: str
    dataset: str
    role: str
    measure: str
    main: bool
    better: int
    figure: Estimate
    delta: Estimate | None
    p: float | None
    detectable: float | None
    rows: int
    prompts: int

    @property
    def ratio(self) -> tuple[float, tuple[float, float] | None] | None:
        """Of the perplexity to the base's, with its interval; None of all but the loss of a token."""
        if self.measure != NLL or self.delta is None:
            return None
        between = self.delta.interval
        return math.exp(self.delta.value), between and (math.exp(between[0]), math.exp(between[1]))


class Light(NamedTuple):
    """What is wrong with an adapter, on which dataset (None: on all), and the figure that says so."""

    adapter: str
    what: str
    dataset: str | None
    why: str


def cells(scored: Sequence[Scored], rules: Rules) -> list[Cell]:
    """For each of `scored` a cell a measure. The first of those on a dataset is the base's."""
    base: dict[str, Scored] = {}
    found = []
    for one in scored:
        beside = base.setdefault(one.data.name, one)
        prompts = [record.unit.prompt for record in one.records]
        for number, measure in enumerate(measures(one.data.kind, rules.beta)):
            if measure.beside and one is beside:
                continue
            values, ref = measure.of(one.records, beside.records), None
            if one is not beside and not measure.beside:
                ref = measure.of(beside.records, beside.records)
            about = About(one.adapter, one.data.name, one.data.role, measure.name, number == 0, measure.better)
            found.append(_cell(about, prompts, values, ref, measure.counts, rules))
    return found


def task_cells(results: Sequence[TaskResult], role: str, rules: Rules) -> list[Cell]:
    """The same of the harness's tasks: for each a cell a figure that a document has by itself, 'acc' first."""
    base: dict[str, TaskResult] = {}
    found = []
    for one in results:
        beside = base.setdefault(one.task, one)
        documents = [document.hash for document in one.documents]
        names = sorted({name for document in one.documents for name in document.figures}, key=lambda n: (n != "acc", n))
        for number, name in enumerate(names):
            values, ref = _of_documents(one, name), None if one is beside else _of_documents(beside, name)
            about = About(one.adapter, one.task, role, name, number == 0, one.better[name])
            found.append(_cell(about, documents, values, ref, bool(np.isin(values.numbers, (0, 1)).all()), rules))
    return found


def _of_documents(result: TaskResult, name: str) -> Values:
    numbers, weights = np.array([document.figures[name] for document in result.documents], dtype=np.float64).T
    return Values(numbers, weights)


def _cell(
    about: About, prompts: Sequence[str], values: Values, base: Values | None, counts: bool, rules: Rules
) -> Cell:
    """`base`: the base's values where it is compared with. `counts`: the values say what is right."""
    weights = statistics.by_prompt(values.weights, prompts)
    figure = _estimate(statistics.by_prompt(values.numbers, prompts), weights, rules)
    delta = p = None
    if base is not None:
        moved = statistics.by_prompt(values.numbers - base.numbers, prompts)
        delta = _estimate(moved, weights, rules)
        p = statistics.sign_test(moved) if counts else None
    seen = statistics.detectable(delta.error if delta else None, rules.confidence)
    return Cell(*about, figure, delta, p, seen, len(prompts), len(weights))


def _estimate(sums: statistics.Numbers, counts: statistics.Numbers, rules: Rules) -> Estimate:
    return statistics.estimate(sums, counts, resamples=rules.resamples, confidence=rules.confidence, seed=rules.seed)


def lights(scored: Sequence[Scored], found: Sequence[Cell], tasks: Sequence[TaskResult] = ()) -> list[Light]:
    """The stop-lights of all adapters, in their order."""
    said: dict[str, list[tuple[float, ...]]] = {}
    for one in scored:
        said.setdefault(one.adapter, []).extend(record.logprobs for record in one.records)
    for result in tasks:
        said.setdefault(result.adapter, []).extend(document.logprobs for document in result.documents)
    lit = []
    for adapter in (name for name in said if name != BASE):
        if said[adapter] == said[BASE]:
            lit.append(Light(adapter, INACTIVE, None, "every log-probability is the base's"))
            continue
        for cell in found:
            if cell.adapter == adapter and cell.delta is not None:
                lit += _lights(cell, cell.delta, next(c for c in found if _is_base_of(c, cell)))
    return lit


def _is_base_of(one: Cell, cell: Cell) -> bool:
    return (one.adapter, one.dataset, one.measure) == (BASE, cell.dataset, cell.measure)


def _lights(cell: Cell, delta: Estimate, base: Cell) -> list[Light]:
    """Of one figure."""
    lit = []
    if cell.main and cell.role == IN_SAMPLE and cell.prompts > 1:
        low, high = delta.interval or (delta.value, delta.value)  # without variance all prompts moved alike
        why = f"{cell.measure} {delta.value:+.3f} [{low:+.3f}, {high:+.3f}]"
        if low <= 0 <= high:
            lit.append(Light(cell.adapter, NOT_LEARNT, cell.dataset, why))
        elif (high if cell.better > 0 else -low) < 0:
            lit.append(Light(cell.adapter, OPPOSITE, cell.dataset, why))
    if cell.ratio is not None and cell.ratio[0] > WORST_PERPLEXITY:
        why = f"perplexity {cell.ratio[0]:.2f} times the base's"
        lit.append(Light(cell.adapter, INCOHERENT, cell.dataset, why))
    if cell.measure == COVERAGE and cell.figure.value < LEAST_COVERAGE * base.figure.value:
        why = f"answers with an option {cell.figure.value:.1%} of the time, the base {base.figure.value:.1%}"
        lit.append(Light(cell.adapter, INCOHERENT, cell.dataset, why))
    return lit
