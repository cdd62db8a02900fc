"""No work and no message for gradients that nobody reads, by counts in real processes, with the numbers of the whole model.

Adapters on the upper layers only: stages below them record nothing, send activations and get nothing back. The oracle
of the numbers is `tests/helpers/unsplit.py`; the expected messages are written down here from what must cross a boundary.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline.kernels.cross_entropy import LogitTransform
from torch.utils.flop_counter import FlopCounterMode

from pipeline.data.microbatch import MicroBatch
from pipeline.model.adapters.base import trainable
from pipeline.model.adapters.multiplicative import inject_multiplicative
from pipeline.model.fusion import apply as fusion
from pipeline.objectives.language_modelling import LanguageModelling
from pipeline.training.engine import prefetch, wires
from tests.helpers import builders, stage_runs, unsplit
from tests.helpers.paths import WORKERS
from tests.helpers.quick import only
from tests.helpers.stage_runs import Case, Result
from tests.helpers.stages import build
from tests.helpers.unsplit import GRADIENT_TOLERANCE, LOSS_TOLERANCE, size

WORKER = WORKERS / "traffic_worker.py"
STEPS, MICRO_BATCHES, EVALUATION_ROWS, EVALUATED_AFTER = 3, 3, 4, 1
TOKENS, WIDTH, ALPHA, RANK, LR, EPS = 64, 32, 8, 4, 1e-2, 1e-3
HIDDEN, POSITIONS, HEADER = ("float32", (1, TOKENS, WIDTH)), ("int64", (1, TOKENS)), ("int32", (256,))


@dataclass(frozen=True)
class Cut:
    """Adapted layers (of four), layers per stage, and the stage that owns the first adapted one."""

    layers: str
    per_stage: tuple[int, ...]
    first_trained: int
    replicas: int = 1
    overrides: tuple[str, ...] = ()

    @property
    def stages(self) -> int:
        """How many there are."""
        return len(self.per_stage)

    def __str__(self) -> str:
        replicas = f" × {self.replicas} replicas" if self.replicas > 1 else ""
        return " ".join((f"layers {self.layers} on {self.per_stage}{replicas}", *self.overrides))


CUTS = [
    Cut("0:3", (2, 2), 0),
    Cut("0:1", (2, 2), 0),  # the last stage trains nothing, and backward goes through it
    Cut("2:3", (2, 2), 1),
    Cut("2:3", (2, 2), 1, overrides=("activation_checkpointing=true",)),
    Cut("3", (1, 2, 1), 2),
    Cut("1", (1, 1, 2), 1),  # nothing to train below and above
    Cut("2:3", (2, 2), 1, replicas=2),
]
QUICK = CUTS[2:3]
ALL = only(QUICK, CUTS)
over_cuts = pytest.mark.parametrize("cut", ALL, ids=str)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a text and the configuration of all runs."""
    root = tmp_path_factory.mktemp("nothing_wasted")
    builders.save_model(root / "model", "cohere", logit_scale=1.0)
    (root / "text.txt").write_text((builders.BOOKS / "the_salt_ledger.md").read_text(encoding="utf-8")[:12000])
    builders.write_config(
        root / "run.toml",
        model=str(root / "model"),
        gradient_clipping=0.0,
        optimizer={"type": "adamw", "lr": LR, "eps": EPS, "weight_decay": 0.1},
        datasets=[
            {
                "name": "text",
                "dataset_type": "textfile",
                "dataset_path": str(root / "text.txt"),
                "sequence_len": TOKENS,
                "eval_size": EVALUATION_ROWS,
            }
        ],
    )
    return root


def case(root: Path, cut: Cut) -> Case:
    """`cut` for the worker."""
    return Case(
        str(cut),
        root / "run.toml",
        [
            f"pipeline_stages={cut.stages}",
            f"layers_to_transform={cut.layers!r}",
            f"layers_per_stage={list(cut.per_stage)}",
            f"gradient_accumulation_steps={MICRO_BATCHES}",
            f"output_dir={str(root / 'runs' / str(cut))!r}",
            *cut.overrides,
        ],
        steps=STEPS,
        evaluate_at=[EVALUATED_AFTER],
    )


@pytest.fixture(scope="module")
def result(root: Path) -> Callable[[Cut], Result]:
    """What a cut computed and counted. All of one number of processes are one launch."""

    @cache
    def launched(processes: int, quick: bool) -> dict[str, Result]:
        cuts = [cut for cut in CUTS if (cut in QUICK) == quick]
        cases = [case(root, cut) for cut in cuts if cut.stages * cut.replicas == processes]
        return stage_runs.run(processes, cases, root / f"{processes} processes, quick {quick}", WORKER)

    return lambda cut: launched(cut.stages * cut.replicas, cut in QUICK)[str(cut)]


def adamw(leaves: list[torch.Tensor]) -> torch.optim.Optimizer:
    """PyTorch's, with the configuration's values."""
    return torch.optim.AdamW(leaves, lr=LR, betas=(0.9, 0.99), eps=EPS, weight_decay=0.1)


@over_cuts
def test_the_numbers_are_the_whole_models(cut: Cut, root: Path, result: Callable[[Cut], Result]) -> None:
    """Loss, evaluation, every gradient and the weights."""
    given, ours = case(root, cut), result(cut)
    steps, held_out = unsplit.rows(given.config, given.overrides, STEPS, cut.replicas)

    def trained(count: int) -> tuple[Any, unsplit.Trace]:
        model = unsplit.load(root / "model")
        leaves = unsplit.with_multiplicative(model, ours.initial, ALPHA / RANK)
        return model, unsplit.train(model, leaves, steps[:count], adamw, 0.0)

    evaluated = unsplit.evaluate(trained(EVALUATED_AFTER)[0], held_out["text"])
    assert ours.evaluation(EVALUATED_AFTER)["text"] == pytest.approx(evaluated, rel=0, abs=LOSS_TOLERANCE)
    trace = trained(STEPS)[1]
    assert ours.losses == pytest.approx(trace.losses, rel=0, abs=LOSS_TOLERANCE)
    for step, expected in enumerate(trace.gradients, start=1):
        found = ours.gradients(step)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert size(found[name] - gradient) <= step * GRADIENT_TOLERANCE * size(gradient), (step, name)
    for name, weight in trace.weights.items():
        assert size(ours.weights[name] - weight) <= unsplit.weight_tolerance(trace, name, LR, EPS), name


@over_cuts
def test_messages_of_a_step(cut: Cut, result: Callable[[Cut], Result]) -> None:
    """Hidden state and positions up, one gradient down to the first adapted stage and no further; a header where shapes
    are new: at the start and after an evaluation."""
    for rank in result(cut).ranks:
        stage = rank["stage"]
        for number, step in enumerate(rank["steps"]):
            expected: Counter[Any] = Counter()
            if stage < cut.stages - 1:
                expected[(stage + 1, *HIDDEN)] += MICRO_BATCHES
                expected[(stage + 1, *POSITIONS)] += MICRO_BATCHES
                expected[(stage + 1, *HEADER)] += number in (0, EVALUATED_AFTER)
            if stage > cut.first_trained:
                expected[(stage - 1, *HIDDEN)] += MICRO_BATCHES
            assert messages(step) == +expected, f"stage {stage}, step {number}"


@pytest.mark.parametrize("cut", [pytest.param(c, marks=pytest.mark.slow) for c in CUTS if c.replicas > 1], ids=str)
def test_replicas_exchange_the_adapters_gradients_and_nothing_else(cut: Cut, result: Callable[[Cut], Result]) -> None:
    """In fp32, once a step, whatever the base weighs; beside them a loss and the like."""
    first, last = (int(layer) for layer in cut.layers.split(":"))
    for rank in result(cut).ranks:
        begins = sum(cut.per_stage[: rank["stage"]])
        adapted = len(set(range(begins, begins + cut.per_stage[rank["stage"]])) & set(range(first, last + 1)))
        replicas = [rank["stage"] * cut.replicas + replica for replica in range(cut.replicas)]
        for step in rank["steps"]:
            sums = [n_bytes for n_bytes, ranks in step["reduced"] if ranks == replicas]
            assert sum(n for n in sums if n > 8) == adapted * 2 * RANK * WIDTH * 4
            assert sum(n for n in sums if n <= 8) <= 64
        assert sum(len(step["reduced"]) for step in rank["steps"]) > 0


@pytest.mark.slow
def test_the_host_waits_once_a_micro_batch_and_a_few_times_a_step(root: Path) -> None:
    """Once a micro-batch transformers looks whether its positions are those of packed rows; the numbers of a step (loss, norm,
    whether it is finite) are taken out once a step."""
    cuts = [Cut("0:3", (2, 2), 0, overrides=(f"gradient_accumulation_steps={n}",)) for n in (3, 9)]
    results = stage_runs.run(2, [case(root, cut) for cut in cuts], root / "waits", WORKER)
    few, many = ([[step["asked_host"] for step in rank["steps"]] for rank in results[str(cut)].ranks] for cut in cuts)
    for three, nine in zip(few, many, strict=True):
        assert [b - a for a, b in zip(three, nine, strict=True)] == [9 - 3] * len(three)


@over_cuts
def test_work_of_a_step(cut: Cut, result: Callable[[Cut], Result]) -> None:
    """Stages below the first adapted one record nothing and have no backward; at it, the input asks for no gradient."""
    for rank in result(cut).ranks:
        stage = rank["stage"]
        assert len(rank["steps"]) == STEPS
        for step in rank["steps"]:
            assert len(step["asked"]) == MICRO_BATCHES
            assert step["asked"] == [stage > cut.first_trained] * MICRO_BATCHES
            assert step["backward"] == (0 if stage < cut.first_trained else MICRO_BATCHES)
            assert (step["saved"] == 0) == (stage < cut.first_trained)
            assert step["left"] == 0


@over_cuts
def test_evaluation_fills_the_pipeline(cut: Cut, result: Callable[[Cut], Result]) -> None:
    """A set of n micro-batches is one pass of n + p − 1 ticks (a call per micro-batch would take n·p); forward only."""
    n = EVALUATION_ROWS // cut.replicas
    for rank in result(cut).ranks:
        (counts,) = rank["evaluated"]
        stage = rank["stage"]
        assert counts["ticks"] == [n + cut.stages - 1]
        up = Counter({(stage + 1, *HIDDEN): n, (stage + 1, *POSITIONS): n, (stage + 1, *HEADER): 1})
        assert messages(counts) == (up if stage < cut.stages - 1 else Counter())
        assert (len(counts["asked"]), counts["backward"], counts["saved"], counts["left"]) == (n, 0, 0, 0)


def messages(counts: dict[str, Any]) -> Counter[Any]:
    """(stage, dtype, shape) of what was sent, with how many there were."""
    return Counter((stage, dtype, tuple(shape)) for stage, dtype, shape in counts["sent"])


@pytest.mark.parametrize("kernels", [frozenset(), frozenset(fusion.KERNELS)], ids=["modules", "kernels"])
def test_backward_of_the_first_adapted_layer_ends_at_its_adapter(root: Path, kernels: frozenset[str]) -> None:
    """Its FLOPs are the adapter's products alone, and below the adapter nothing is kept."""
    feed_forward = 64
    stage = build(root / "model", 2, 3)
    inject_multiplicative(stage, ["model.layers.2.mlp.down_proj"], RANK, ALPHA, 0.0, torch.float32, 0)
    fusion.apply(stage, kernels)
    parameters = list(trainable(stage).values())
    own = {p.data_ptr() for p in stage.parameters()}
    saved: list[torch.Tensor] = []

    def backward(asks: bool) -> int:
        hidden = torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0)).requires_grad_(asks)
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
            output = stage.train()((hidden, torch.arange(TOKENS).unsqueeze(0)))[0]
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(output, [*parameters, *([hidden] if asks else [])], torch.ones_like(output))
        return counter.get_total_flops()

    product = 2 * TOKENS * WIDTH * RANK
    # g·B, gᵀ·z, and then gzᵀ·h, or with the kernel (gzᵀ·m)·Wᵀ
    last = 2 * RANK * feed_forward * (TOKENS + WIDTH) if kernels else product
    assert backward(asks=False) == 2 * product + last
    kept = {t.data_ptr(): t.numel() for t in saved if t.data_ptr() not in own}
    # h and z; with the kernel gate, up and z
    assert sum(kept.values()) == TOKENS * (2 * feed_forward + RANK if kernels else WIDTH + RANK)
    assert backward(asks=True) > 10 * (2 * product + last), "the layer's own products"


def test_prefetch_is_one_ahead_and_changes_nothing() -> None:
    """The same tensors in the same order; the next is read before this one is used, and none before the first is asked for."""
    read: list[int] = []

    def micro_batches() -> Any:
        for index in range(4):
            read.append(index)
            ids = torch.full((2, 8), index)
            yield MicroBatch(ids, ids + 10, ids + 20, torch.full((2,), 8), index / 2, (None, None))

    objective = LanguageModelling(None, LogitTransform())
    given = prefetch.ahead(wires.pack_all(micro_batches(), objective), torch.device("cpu"))
    assert read == []
    for index, ((ids, positions, lengths), (labels, scale)) in enumerate(given):
        assert read == list(range(min(index + 2, 4)))
        assert {t.dtype for t in (ids, positions, lengths, labels)} == {torch.int64}
        assert scale.dtype == torch.float32
        for found, expected in zip(
            (ids, positions, lengths, labels, scale), (index, index + 20, 8, index + 10, index / 2), strict=True
        ):
            assert (found == expected).all()
    assert index == 3
    assert list(prefetch.ahead([], torch.device("cpu"))) == []


def test_layouts_are_what_they_say() -> None:
    """Four layers each, and `first_trained` is the stage that has the lowest adapted layer."""
    for cut in CUTS:
        ends = [sum(cut.per_stage[: i + 1]) for i in range(cut.stages)]
        assert ends[-1] == 4
        lowest = int(cut.layers.split(":")[0])
        assert [first <= lowest < end for first, end in pairwise([0, *ends])].index(True) == cut.first_trained
