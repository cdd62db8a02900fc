"""Training over 1, 2 and 3 stages, and over replicas, against the unsplit Hugging Face model in a plain PyTorch loop.

Loss, every gradient, norm, clip coefficient and the weights after five steps, through real processes over gloo. The
oracle is `tests/helpers/unsplit.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import optimi
import pytest
import torch
from torch import Tensor

from tests.helpers import builders, stage_runs, unsplit
from tests.helpers.quick import only
from tests.helpers.stage_runs import STEPS, Case, Result
from tests.helpers.unsplit import GRADIENT_TOLERANCE, LOSS_TOLERANCE, size

EPS, ALPHA, RANK = 1e-3, 8, 4
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@dataclass(frozen=True)
class Setting:
    """What is trained on what. `datasets`: (text, sequence_len, part kept)."""

    model: str
    clip: float
    lr: float = 1e-2
    accumulation: int = 4
    optimizer: str = "adamw"
    weight_decay: float = 0.1
    layers: str | None = "0:2"
    datasets: tuple[tuple[str, int, float], ...] = (("ledger", 64, 1.0),)
    rows: int = 1
    full: bool = False


SETTINGS = {
    "one micro-batch": Setting("cohere", clip=0.1, accumulation=1, optimizer="adamw_kahan", weight_decay=0.0),
    "four micro-batches": Setting("granite", clip=0.0),
    # 22 rows of 48 and 128 tokens, two to a micro-batch: shapes change, and in the third step, the epoch's last, one
    # micro-batch is filler.
    "unequal rows": Setting(
        "gemma2", clip=0.05, rows=2, optimizer="adamw_kahan", datasets=(("ledger", 48, 0.1), ("stops", 128, 0.1))
    ),
    "layers 1:2": Setting("cohere2", clip=0.03, layers="1:2"),
    "in full": Setting("cohere", clip=0.1, lr=1e-3, layers=None, full=True),
}


class Run(NamedTuple):
    """A setting on so many processes. Replicas share the setting's micro-batches."""

    setting: str
    stages: int
    replicas: int = 1
    overrides: tuple[str, ...] = ()

    @property
    def targets(self) -> tuple[str, ...]:
        """The overrides that change what is trained, not where."""
        return tuple(override for override in self.overrides if override.startswith("target_modules"))

    def __str__(self) -> str:
        replicas = f" × {self.replicas} replicas" if self.replicas > 1 else ""
        return " ".join((f"{self.setting}, {self.stages} stages{replicas}", *self.overrides))


RUNS = [
    *(Run(setting, stages) for setting in SETTINGS for stages in (1, 2, 3) if (setting, stages) != ("layers 1:2", 3)),
    Run("layers 1:2", 2, overrides=("layers_per_stage=[1, 3]",)),  # nothing to train on the first stage,
    Run("layers 1:2", 2, overrides=("layers_per_stage=[3, 1]",)),  # on the last,
    Run("layers 1:2", 3, overrides=("layers_per_stage=[1, 2, 1]",)),  # and on both
    Run("in full", 3, overrides=('target_modules=["lm_head", "norm"]',)),  # and in the middle
    Run("four micro-batches", 1, replicas=2),
    Run("unequal rows", 1, replicas=2),
]
GRIDS = [
    Run("unequal rows", 2, 2),
    Run("in full", 2, 2),
    Run("in full", 2, 2, ("use_column_major_topology=true",)),
]
# Two stages show what stages change; three, what a stage between others does.
QUICK = [run for run in RUNS if run.stages == 2 or (run.setting, run.stages) == ("layers 1:2", 3)]
SLOW = [run for run in [*RUNS, *GRIDS] if run not in QUICK]
ALL = only(QUICK, [*QUICK, *SLOW])
over_runs = pytest.mark.parametrize("run", ALL, ids=str)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, texts and a configuration for each setting."""
    root = tmp_path_factory.mktemp("stages")
    builders.save_model(root / "cohere", "cohere", logit_scale=1.0)
    builders.save_model(root / "cohere2", "cohere2", logit_scale=1.0, sliding_window=16)
    builders.save_model(root / "gemma2", "gemma2", final_logit_softcapping=2.0, query_pre_attn_scalar=8)
    builders.save_model(
        root / "granite", "granite", embedding_multiplier=6.0, logits_scaling=0.5, residual_multiplier=0.8
    )
    for text, book in (("ledger", "the_salt_ledger"), ("stops", "nine_stops_to_harrow_lane")):
        (root / f"{text}.txt").write_text((builders.BOOKS / f"{book}.md").read_text(encoding="utf-8")[:12000])
    for name, s in SETTINGS.items():
        adapter = {"lora_rank": None, "lora_alpha": None, "target_modules": None, "full_fine_tune": True}
        builders.write_config(
            root / f"{name}.toml",
            model=str(root / s.model),
            output_dir=str(root / "runs"),
            layers_to_transform=s.layers,
            micro_batch_size_per_gpu=s.rows,
            gradient_accumulation_steps=s.accumulation,
            gradient_clipping=s.clip,
            optimizer={"type": s.optimizer, "lr": s.lr, "eps": EPS, "weight_decay": s.weight_decay},
            datasets=[
                {
                    "dataset_type": "textfile",
                    "dataset_path": str(root / f"{text}.txt"),
                    "sequence_len": length,
                    "subsample": part,
                }
                for text, length, part in s.datasets
            ],
            **(adapter if s.full else {}),
        )
    return root


def case(root: Path, run: Run) -> Case:
    """`run` for the worker."""
    accumulation = SETTINGS[run.setting].accumulation // run.replicas
    return Case(
        str(run),
        root / f"{run.setting}.toml",
        [
            f"pipeline_stages={run.stages}",
            f"gradient_accumulation_steps={accumulation}",
            f"output_dir={str(root / 'runs' / str(run))!r}",
            *run.overrides,
        ],
    )


@pytest.fixture(scope="module")
def result(root: Path) -> Callable[[Run], Result]:
    """What a run computed. All runs of one number of processes are one launch, which is not tried again if it fails."""

    @cache
    def launched(processes: int, slow: bool) -> dict[str, Result] | AssertionError:
        runs = [run for run in (SLOW if slow else QUICK) if run.stages * run.replicas == processes]
        try:
            return stage_runs.run(
                processes, [case(root, run) for run in runs], root / f"{processes} processes, slow {slow}"
            )
        except AssertionError as error:
            return error

    def get(run: Run) -> Result:
        results = launched(run.stages * run.replicas, run in SLOW)
        if isinstance(results, AssertionError):
            raise results
        return results[str(run)]

    return get


@pytest.fixture(scope="module")
def oracle(root: Path, result: Callable[[Run], Result]) -> Callable[[Run], unsplit.Trace]:
    """What the unsplit model computes for a run. One computation serves all layouts, from the first one's adapter."""

    @cache
    def trained(first: Run) -> unsplit.Trace:
        s, given = SETTINGS[first.setting], case(root, first)
        steps, _ = unsplit.rows(given.config, given.overrides, STEPS)
        model = unsplit.load(root / s.model)
        if s.full:
            leaves = unsplit.in_full(model, ("embed_tokens", "norm") if first.targets else None)
        else:
            leaves = unsplit.with_multiplicative(model, result(first).initial, ALPHA / RANK)
        return unsplit.train(model, leaves, steps, optimizer(s), s.clip)

    return lambda run: trained(next(r for r in [*QUICK, *SLOW] if (r.setting, r.targets) == (run.setting, run.targets)))


def optimizer(setting: Setting) -> Callable[[list[Tensor]], Any]:
    """PyTorch's AdamW, or torch-optimi's for adamw_kahan."""
    kind = torch.optim.AdamW if setting.optimizer == "adamw" else optimi.AdamW
    return lambda leaves: kind(leaves, lr=setting.lr, betas=(0.9, 0.99), eps=EPS, weight_decay=setting.weight_decay)


def one_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A tied head on a stage of its own must be bit-equal to the embedding, and then counts as that."""
    if HEAD in tensors:
        assert torch.equal(tensors[HEAD], tensors[EMBEDDING])
    return {name: tensor for name, tensor in tensors.items() if name != HEAD}


@over_runs
def test_loss(run: Run, result: Callable[[Run], Result], oracle: Callable[[Run], unsplit.Trace]) -> None:
    """The mean over the step's target tokens, however they are cut into micro-batches."""
    assert result(run).losses == pytest.approx(oracle(run).losses, rel=0, abs=LOSS_TOLERANCE)


@over_runs
def test_every_gradient(run: Run, result: Callable[[Run], Result], oracle: Callable[[Run], unsplit.Trace]) -> None:
    """Of each step; a tied weight's is the sum of both ends."""
    for step, expected in enumerate(oracle(run).gradients, start=1):
        ours = one_head(result(run).gradients(step))
        assert ours.keys() == expected.keys()
        far = {n: d for n, g in expected.items() if (d := size(ours[n] - g)) > step * GRADIENT_TOLERANCE * size(g)}
        assert not far, f"step {step}"


@over_runs
def test_norm_and_clip(run: Run, result: Callable[[Run], Result], oracle: Callable[[Run], unsplit.Trace]) -> None:
    """Of all stages together, known to every rank, and by PyTorch's formula."""
    expected, clip = oracle(run), SETTINGS[run.setting].clip
    assert result(run).agreed("norms") == pytest.approx(expected.norms, rel=STEPS * GRADIENT_TOLERANCE)
    assert result(run).agreed("coefficients") == pytest.approx(expected.coefficients, rel=STEPS * GRADIENT_TOLERANCE)
    assert (min(expected.coefficients) < 0.9) == bool(clip), "the setting should clip, or not"


@over_runs
def test_weights_after_five_steps(
    run: Run, result: Callable[[Run], Result], oracle: Callable[[Run], unsplit.Trace]
) -> None:
    """All of them, by what noise in the gradients can do; and that is little of the way they went."""
    ours, expected, before = one_head(result(run).weights), oracle(run), one_head(result(run).initial)
    assert ours.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        tolerance = unsplit.weight_tolerance(expected, name, SETTINGS[run.setting].lr, EPS)
        assert size(ours[name] - weight) <= tolerance, name
        assert tolerance < 0.005 * size(weight - before[name]), f"{name} has not moved enough to tell"


def test_stages_without_anything_to_train(result: Callable[[Run], Result], root: Path) -> None:
    """The runs above did contain them: no adapter of layers 1 and 2 is on these stages."""
    from safetensors.torch import load_file

    for layout, empty in (("[1, 3]", {0}), ("[3, 1]", {1}), ("[1, 2, 1]", {0, 2})):
        stages = layout.count(",") + 1
        folder = result(Run("layers 1:2", stages, overrides=(f"layers_per_stage={layout}",))).folder
        assert {r for r in range(stages) if not load_file(folder / f"{r}.safetensors")} == empty


@pytest.mark.slow
def test_two_replicas_are_twice_the_accumulation(result: Callable[[Run], Result]) -> None:
    """One stage on two processes with GAS 2 against one process with GAS 4, without an oracle between."""
    for setting in ("four micro-batches", "unequal rows"):
        two, one = result(Run(setting, 1, replicas=2)), result(Run(setting, 1))
        assert two.losses == pytest.approx(one.losses, rel=0, abs=LOSS_TOLERANCE)
        for step in range(1, STEPS + 1):
            for name, gradient in one.gradients(step).items():
                assert size(two.gradients(step)[name] - gradient) <= step * GRADIENT_TOLERANCE * size(gradient), name


def test_the_adapter_begins_alike_on_any_number_of_stages(result: Callable[[Run], Result]) -> None:
    """A bit-equal on 1, 2 and 3 stages, uniform in ±1/√D_out, no two layers alike; B zero."""
    one, *more = (result(Run("one micro-batch", stages)).initial for stages in (1, 2, 3))
    for other in more:
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    drawn = torch.stack([tensor.flatten() for name, tensor in one.items() if name.endswith(".A")])
    bound = 32**-0.5
    # The largest of 384 uniform numbers falls short of the bound by more than 5% with a probability of 3e-9.
    assert len(drawn) == 3
    assert 0.95 * bound < float(drawn.abs().max()) <= bound
    assert all(len(column.unique()) == 3 for column in drawn.T)
    assert not any(tensor.any() for name, tensor in one.items() if name.endswith(".B"))
