"""Embeddings, norms and the head trained beside the adapter in whole runs: 1, 2 and 3 stages, replicas, kernels, resuming.

Oracles: the unsplit Hugging Face model in a plain PyTorch loop (helpers/unsplit.py), stock PEFT with what the run saved, and,
over 4 bits, the same stages with bitsandbytes' dequantised weights.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import optimi
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.model.adapters import full as trained_modules
from pipeline.model.adapters.base import trainable
from pipeline.model.stage import empty_model, read_model_config
from tests.helpers import builders, quantization, stage_runs, unsplit
from tests.helpers.stage_runs import STEPS, Case, Result
from tests.helpers.unsplit import GRADIENT_TOLERANCE, LOSS_TOLERANCE, size
from tests.training.checkpoint.test_resume import assert_equal, final_state, numbers, run_plan
from tests.training.run.test_quantized_training import dequantised, gradients

LR, EPS, RANK, ALPHA, CLIP, DECAY = 2e-3, 1e-3, 4, 8, 0.1, 0.1
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
NAMES = {
    "tied": ["embed_tokens", "input_layernorm", "norm"],
    "untied": ["embed_tokens", "input_layernorm", "post_attention_layernorm", "norm"],
    "head": ["lm_head", "layers.3.input_layernorm"],
}
MODELS = {"tied": "cohere", "untied": "llama", "head": "llama"}
IN_FULL = {"tied": 1 + 4 + 1, "untied": 1 + 8 + 1, "head": 2}


class Run(NamedTuple):
    """A setting on so many stages and replicas."""

    setting: str
    stages: int
    replicas: int = 1
    overrides: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join((f"{self.setting}, {self.stages} × {self.replicas}", *self.overrides))


FAST = [Run("tied", 2)]
SLOW = [
    Run("untied", 2),
    Run("tied", 2, overrides=('kernels="all"',)),
    *(Run(setting, stages) for setting in NAMES for stages in (1, 3)),
    Run("head", 2),
    Run("tied", 2, 2),
    Run("untied", 1, 2),
    Run("untied", 3, overrides=('kernels="all"', "activation_checkpointing=true")),
    Run("untied", 2, overrides=('activation_checkpointing="auto"',)),
    Run("tied", 2, overrides=("layers_to_transform='3:3'", 'activation_checkpointing="unsloth"')),
]
over_runs = pytest.mark.parametrize(
    "run", [pytest.param(run, marks=pytest.mark.slow) for run in (*FAST, *SLOW)], ids=str
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("in_full")
    builders.save_model(root / "cohere", "cohere", logit_scale=1.0)
    builders.save_model(root / "llama", "llama")
    (root / "text.txt").write_text((builders.BOOKS / "the_salt_ledger.md").read_text(encoding="utf-8")[:12000])
    for name, model in MODELS.items():
        builders.write_config(
            root / f"{name}.toml",
            model=str(root / model),
            output_dir=str(root / "runs"),
            gradient_clipping=CLIP,
            trainable_modules=NAMES[name],
            gradient_accumulation_steps=2,
            optimizer={"type": "adamw_kahan", "lr": LR, "eps": EPS, "weight_decay": DECAY},
            datasets=[{"dataset_type": "textfile", "dataset_path": str(root / "text.txt"), "sequence_len": 64}],
        )
    return root


def case(root: Path, run: Run) -> Case:
    overrides = [
        f"pipeline_stages={run.stages}",
        f"gradient_accumulation_steps={2 // run.replicas}",
        f"output_dir={str(root / 'runs' / str(run).replace('/', ''))!r}",
        *run.overrides,
    ]
    return Case(str(run), root / f"{run.setting}.toml", overrides)


@pytest.fixture(scope="module")
def result(root: Path) -> Callable[[Run], Result]:
    """What a run computed; all fast or all slow runs of one number of processes are one launch."""

    @cache
    def launched(processes: int, slow: bool) -> dict[str, Result]:
        runs = [run for run in (SLOW if slow else FAST) if run.stages * run.replicas == processes]
        return stage_runs.run(processes, [case(root, run) for run in runs], root / f"{processes} {slow}")

    return lambda run: launched(run.stages * run.replicas, run in SLOW)[str(run)]


def oracle(root: Path, run: Run, initial: dict[str, Tensor]) -> unsplit.Trace:
    """The plain loop over the adapter, from `initial`, and over the model's own weights of the other names in it."""
    given = case(root, run)
    steps, _ = unsplit.rows(given.config, given.overrides, STEPS, replicas=run.replicas)
    model = unsplit.load(root / MODELS[run.setting])
    leaves = unsplit.with_multiplicative(model, {n: t for n, t in initial.items() if is_adapter(n)}, ALPHA / RANK)
    own = dict(model.named_parameters())
    for name in (name for name in initial if not is_adapter(name)):
        assert torch.equal(own[name], initial[name])
        leaves[name] = own[name].requires_grad_(True)
    return unsplit.train(model, leaves, steps, adamw, CLIP)


def adamw(leaves: list[Tensor]) -> Any:
    return optimi.AdamW(leaves, lr=LR, betas=(0.9, 0.99), eps=EPS, weight_decay=DECAY)


def is_adapter(name: str) -> bool:
    return name.endswith((".A", ".B"))


def one_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A tied head on a stage of its own must be bit-equal to the embedding, and then counts as that."""
    if HEAD in tensors and EMBEDDING in tensors:
        assert torch.equal(tensors[HEAD], tensors[EMBEDDING])
        return {name: tensor for name, tensor in tensors.items() if name != HEAD}
    return tensors


@over_runs
def test_a_run_is_the_plain_loop(root: Path, run: Run, result: Callable[[Run], Result]) -> None:
    """Loss, every gradient, norm, clipping and the weights after five steps, of the adapter and of what is trained in full."""
    found = result(run)
    initial = one_head(found.initial)
    expected = oracle(root, run, initial)
    adapted = 1 if any("3:3" in override for override in run.overrides) else 3
    assert len(initial) == IN_FULL[run.setting] + 2 * adapted
    assert found.losses == pytest.approx(expected.losses, rel=0, abs=LOSS_TOLERANCE)
    assert found.agreed("norms") == pytest.approx(expected.norms, rel=STEPS * GRADIENT_TOLERANCE)
    assert found.agreed("coefficients") == pytest.approx(expected.coefficients, rel=STEPS * GRADIENT_TOLERANCE)
    assert min(expected.coefficients) < 0.9, "it should clip"
    for step, gradients_of_step in enumerate(expected.gradients, start=1):
        ours = one_head(found.gradients(step))
        assert ours.keys() == gradients_of_step.keys()
        far = {
            n: size(ours[n] - g) / size(g)
            for n, g in gradients_of_step.items()
            if size(ours[n] - g) > step * GRADIENT_TOLERANCE * size(g)
        }
        assert not far, f"step {step}"
    ours = one_head(found.weights)
    for name, weight in expected.weights.items():
        tolerance = unsplit.weight_tolerance(expected, name, LR, EPS)
        assert size(ours[name] - weight) <= tolerance, name
        assert tolerance < 0.005 * size(weight - initial[name]), f"{name} has not moved enough to tell"


# Over 4 bits


@pytest.mark.parametrize("tied", [False, True])
def test_beside_an_adapter_over_4_bits(tmp_path: Path, tied: bool) -> None:
    """What is trained in full is in no fewer bits than before, and its gradients are those of the dequantised model; what
    is frozen has none.
    """
    folder = quantization.save_model(tmp_path / "llama", "llama", tie_word_embeddings=tied)
    meta_model = empty_model(read_model_config(str(folder)), torch.float32, None)
    in_full = trained_modules.resolve(meta_model, NAMES["untied"], [])

    def trained(cuts: list[int], plain: bool) -> tuple[list[Any], dict[str, Any]]:
        stages = quantization.chain(folder, quantization.NF4, cuts)
        for stage in stages if plain else ():
            dequantised(stage)
        quantization.adapt(stages, "multiplicative_lora", ["down_proj"], [1, 2], folder)
        for stage in stages:
            trained_modules.unfreeze(stage, in_full)
        return stages, {name: p for stage in stages for name, p in trainable(stage).items()}

    expected = gradients(*trained([0, 4], plain=True))
    assert len(expected) == 1 + 4 + 10
    for cuts in ([0, 4], [0, 1, 3, 4]):
        stages, parameters = trained(cuts, plain=False)
        assert {p.dtype for p in parameters.values()} == {torch.float32}
        packed = {p.dtype for s in stages for n, p in s.model.named_parameters() if n not in parameters}
        assert torch.uint8 in packed
        found = gradients(stages, parameters)
        for name, tensor in expected.items():
            assert size(found[name] - tensor) <= 2e-5 * size(tensor), name


# Whole runs


@pytest.mark.slow
def test_stopped_and_resumed_is_bit_equal_and_what_it_saves_is_what_it_trained(tmp_path: Path) -> None:
    """bf16 weights, two stages, a tied head; resumed on one stage too; the save through stock PEFT is the run's own loss."""
    base = tmp_path / "cohere"
    builders.save_model(base, "cohere", logit_scale=1.0)
    toml = str(
        builders.write_config(
            tmp_path / "c.toml",
            model=str(base),
            output_dir=str(tmp_path / "runs"),
            trainable_modules=NAMES["tied"],
            model_weight_dtype="bfloat16",
            eval_steps=2,
            optimizer={"type": "adamw_kahan", "lr": 1e-3, "weight_decay": 0.01},
            max_steps=6,
            save_steps=6,
            checkpoint_on_save=True,
        )
    )
    runs = run_plan(
        tmp_path,
        2,
        [
            {"config": toml},
            {"config": toml, "stop_after": 3},
            {"config": toml, "resume": 1},
        ],
    )
    assert runs["codes"] == [0, 75, 0]
    whole, state = runs["runs"][0], final_state(runs["runs"][0])
    assert_equal(final_state(runs["runs"][2]), state)
    assert numbers(runs["runs"][2]) == numbers(whole)
    assert state[f"weights/{EMBEDDING}"].dtype == torch.bfloat16
    assert torch.equal(state[f"weights/{EMBEDDING}"], state[f"weights/{HEAD}"])
    assert state[f"optimizer/{EMBEDDING}/kahan"].abs().max() > 0
    saved = load_file(Path(whole) / "step6" / "adapter_model.safetensors")
    stored = load_file(base / "model.safetensors")
    for name in (EMBEDDING, "model.norm.weight", "model.layers.3.input_layernorm.weight"):
        assert torch.equal(saved[f"base_model.model.{name}"], state[f"weights/{name}"])
        assert not torch.equal(saved[f"base_model.model.{name}"], stored[name].bfloat16())
    one = run_plan(
        tmp_path,
        1,
        [
            {"config": toml, "overrides": ["pipeline_stages=1"], "resume": f"{runs['runs'][2]}/global_step3"},
        ],
        name="one",
    )
    again = final_state(one["runs"][0])
    assert f"weights/{HEAD}" not in again
    for key in (key for key in again if key.startswith("weights/")):
        # As in test_resume.py: three steps of Adam from gradients rounded to bf16, and one rounding of the weight.
        tolerance = 3 * 1e-3 * 2**-7 + float(state[key].abs().max()) * 2**-8
        assert (state[key].float() - again[key].float()).abs().max() <= tolerance, key
    from_peft(base, Path(whole), numbers(whole)[-1]["eval/book/loss"], toml)


def from_peft(base: Path, run: Path, loss: float, toml: str) -> None:
    """The adapter in stock PEFT over the bf16 base scores the held-out rows as the run did."""
    from peft import PeftModel

    loaded = PeftModel.from_pretrained(unsplit.load(base, torch.bfloat16), run / "step6").eval()
    _, held_out = unsplit.rows(Path(toml), [], 1)
    # Hidden states rounded to bf16 (2⁻⁹) at every operation on both sides, in another order.
    assert unsplit.evaluate(loaded, held_out["book"]) == pytest.approx(loss, abs=0.02)
