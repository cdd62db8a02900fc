"""What training computes beyond the plain case: LoRA against PEFT, evaluation, recomputation, the logit scale, refusals.

Two processes, most of it over two stages, in one launch of `stage_worker.py`; a run that diverges is `train.py` itself.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers import builders, stage_runs, unsplit
from tests.helpers.stage_runs import STEPS, Case, Result
from tests.helpers.unsplit import GRADIENT_TOLERANCE, LOSS_TOLERANCE, size

LR, EPS, RANK, ALPHA = 1e-2, 1e-3, 4, 8
MODES = {"keep": "false", "recompute": "true", "offload": '"unsloth"'}
DROPOUTS = (0.0, 0.2)
ACCUMULATION = 3
FAULTS = {
    "none": None,
    "gradients are halved": "stage 1's gradient is 0.5 times the mean over micro-batches",
    "gradients are summed over accumulation steps": "stage 1's gradient is 3 times the mean over micro-batches",
    "forward runs twice": "stage 1 ran forward 6 times for 3 micro-batches",
    "each stage has a norm of its own": "over all stages it should be",
    "a gradient is asked for below all that trains": "stage 1 was asked for a gradient of its input 3 of 3 times",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, texts, and the configurations 'plain' and 'ragged'; both hold out rows that no batch size divides."""
    root = tmp_path_factory.mktemp("numbers")
    builders.save_model(root / "cohere", "cohere", logit_scale=1.0)
    builders.save_model(root / "qwen2", "qwen2")
    (root / "texts").mkdir()
    book = (builders.BOOKS / "the_salt_ledger.md").read_text(encoding="utf-8")
    for part in range(4):
        (root / "texts" / f"part{part}.txt").write_text(book[part * 2500 : (part + 1) * 2500])
    (root / "held_out.md").write_text((builders.BOOKS / "nine_stops_to_harrow_lane.md").read_text()[:1000])
    (root / "broken").mkdir()
    for file in (root / "cohere").iterdir():
        (root / "broken" / file.name).write_bytes(file.read_bytes())
    weights = load_file(root / "cohere" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3] = 3e38  # finite, and its products are not
    save_file(weights, root / "broken" / "model.safetensors", metadata={"format": "pt"})

    texts = {"dataset_type": "textfile", "dataset_path": str(root / "texts" / "*.txt")}
    other = {"dataset_type": "textfile", "dataset_path": str(root / "held_out.md"), "name": "other", "sequence_len": 40}
    adam = {"type": "adamw", "lr": LR, "eps": EPS, "weight_decay": 0.1}
    common = {
        "model": str(root / "cohere"),
        "output_dir": str(root / "runs"),
        "optimizer": adam,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": 0.1,
        "micro_batch_size_per_gpu": 2,
    }
    builders.write_config(
        root / "plain.toml",
        **common,
        datasets=[{"name": "book", **texts, "sequence_len": 64, "eval_size": 7}],
        eval_datasets=[other],
    )
    builders.write_config(
        root / "ragged.toml",
        **common,
        datasets=[
            {"name": "short", **texts, "sequence_len": 48, "eval_size": 7},
            {"name": "long", **texts, "sequence_len": 128, "eval_size": 5},
        ],
    )
    return root


def cases(root: Path) -> dict[str, Case]:
    """All of the launch."""

    def case(name: str, config: str, *overrides: str, **given: object) -> Case:
        output = f"output_dir={str(root / 'runs' / name)!r}"
        return Case(name, root / f"{config}.toml", [output, *overrides], **given)  # type: ignore[arg-type]

    lora = ['adapter_type="lora"', 'target_modules="all-linear"', f"model={str(root / 'qwen2')!r}"]
    everything = [
        case("plain", "plain", evaluate_at=[0, 2, STEPS]),
        case("ragged", "ragged", evaluate_at=[0, 2, STEPS]),
        case("replicas", "plain", "pipeline_stages=1", evaluate_at=[0, STEPS]),
        case("lora", "plain", *lora),
        case("logit scale", "plain", "train_logit_scale=1.1", evaluate_at=[0, STEPS]),
        case("broken", "plain", f"model={str(root / 'broken')!r}"),
        *(
            case(f"{mode} {dropout}", "plain", f"activation_checkpointing={value}", f"lora_dropout={dropout}", steps=3)
            for mode, value in MODES.items()
            for dropout in DROPOUTS
        ),
        *(case(fault, "plain", sabotage=fault) for fault in FAULTS),
    ]
    return {case.name: case for case in everything}


@pytest.fixture(scope="module")
def results(root: Path) -> dict[str, Result]:
    """What each case computed."""
    return stage_runs.run(2, list(cases(root).values()), root / "results")


@pytest.fixture(scope="module")
def rows(root: Path) -> Callable[[str], tuple[list[unsplit.Rows], dict[str, unsplit.Rows]]]:
    """The training rows of each step and the evaluation rows of a case."""

    @cache
    def read(name: str) -> tuple[list[unsplit.Rows], dict[str, unsplit.Rows]]:
        case = cases(root)[name]
        return unsplit.rows(case.config, case.overrides, STEPS, replicas=2 if name == "replicas" else 1)

    return read


def adamw(leaves: list[torch.Tensor]) -> torch.optim.Optimizer:
    """PyTorch's, with the configurations' values."""
    return torch.optim.AdamW(leaves, lr=LR, betas=(0.9, 0.99), eps=EPS, weight_decay=0.1)


def assert_equal(result: Result, trace: unsplit.Trace) -> None:
    """Loss, gradients, norm, coefficient and weights, as in test_stages.py."""
    assert result.losses == pytest.approx(trace.losses, rel=0, abs=LOSS_TOLERANCE)
    assert result.agreed("norms") == pytest.approx(trace.norms, rel=STEPS * GRADIENT_TOLERANCE)
    assert result.agreed("coefficients") == pytest.approx(trace.coefficients, rel=STEPS * GRADIENT_TOLERANCE)
    for step, gradients in enumerate(trace.gradients, start=1):
        ours = result.gradients(step)
        assert ours.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert size(ours[name] - gradient) <= step * GRADIENT_TOLERANCE * size(gradient), (step, name)
    for name, weight in trace.weights.items():
        tolerance = unsplit.weight_tolerance(trace, name, LR, EPS)
        assert size(result.weights[name] - weight) <= tolerance < 0.005 * size(weight - result.initial[name]), name


@pytest.mark.slow
def test_lora_is_pefts(
    root: Path, results: dict[str, Result], rows: Callable[[str], tuple[list[unsplit.Rows], dict[str, unsplit.Rows]]]
) -> None:
    """Two stages against `get_peft_model` over the unsplit model, on every linear module of layers 0 to 2."""
    result = results["lora"]
    assert len(result.initial) == 3 * 7 * 2
    assert all(bool(tensor.any()) == name.endswith(".A") for name, tensor in result.initial.items())
    model, leaves = unsplit.with_peft_lora(unsplit.load(root / "qwen2"), result.initial, RANK, ALPHA)
    assert_equal(result, unsplit.train(model, leaves, rows("lora")[0], adamw, clip=0.1))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "ragged", "replicas", "logit scale"])
def test_evaluation(
    name: str,
    root: Path,
    results: dict[str, Result],
    rows: Callable[[str], tuple[list[unsplit.Rows], dict[str, unsplit.Rows]]],
) -> None:
    """The mean over all target tokens of all rows, none twice, before and after training, without the logit scale."""
    result, held_out = results[name], rows(name)[1]
    assert all(len(set(map(tuple, map(torch.Tensor.tolist, rows)))) == len(rows) for rows in held_out.values())
    assert any(len(rows) % 2 and len(rows) % 3 for rows in held_out.values())
    for done, weights in ((0, result.initial), (STEPS, result.weights)):
        model = unsplit.load(root / "cohere")
        unsplit.with_multiplicative(model, weights, ALPHA / RANK)
        expected = {set_name: unsplit.evaluate(model, rows) for set_name, rows in held_out.items()}
        assert result.evaluation(done) == pytest.approx(expected, rel=0, abs=LOSS_TOLERANCE)


@pytest.mark.parametrize(("name", "scale"), [("plain", 1.0), ("ragged", 1.0), ("replicas", 1.0), ("logit scale", 1.1)])
def test_training_around_evaluation_and_with_a_logit_scale(
    name: str,
    scale: float,
    root: Path,
    results: dict[str, Result],
    rows: Callable[[str], tuple[list[unsplit.Rows], dict[str, unsplit.Rows]]],
) -> None:
    """An evaluation between two steps, with shapes of its own, changes nothing; the scale multiplies the logits."""
    model = unsplit.load(root / "cohere")
    leaves = unsplit.with_multiplicative(model, results[name].initial, ALPHA / RANK)
    trace = unsplit.train(model, leaves, rows(name)[0], adamw, clip=0.1, logit_scale=scale)
    assert_equal(results[name], trace)
    if scale != 1.0:
        assert abs(trace.losses[0] - results["plain"].losses[0]) > 100 * LOSS_TOLERANCE


@pytest.mark.parametrize("dropout", DROPOUTS)
@pytest.mark.parametrize("mode", ["recompute", "offload"])
def test_recomputation_changes_no_bit(mode: str, dropout: float, results: dict[str, Result]) -> None:
    """activation_checkpointing true and 'unsloth' against false; with dropout the same elements are dropped again."""
    kept, recomputed = results[f"keep {dropout}"], results[f"{mode} {dropout}"]
    assert kept.losses == recomputed.losses
    assert kept.tensors.keys() == recomputed.tensors.keys()
    assert all(torch.equal(tensor, recomputed.tensors[name]) for name, tensor in kept.tensors.items())
    for before, after in zip(kept.ranks, recomputed.ranks, strict=True):
        forward = before["layers"] * ACCUMULATION * 3
        assert (before["passes"], after["passes"]) == (forward, 2 * forward), "it should have run every layer again"
        assert (before["kept"], after["kept"]) == (0, forward if mode == "offload" else 0)


def test_dropout_drops(results: dict[str, Result]) -> None:
    """While B is 0 it cannot show; then it does."""
    without, with_dropout = results["keep 0.0"], results["keep 0.2"]
    assert without.losses[0] == with_dropout.losses[0]
    assert without.losses[1] != with_dropout.losses[1]
    gradients = without.gradients(1), with_dropout.gradients(1)
    assert all(size(gradients[1][n] - g) > 0.05 * size(g) for n, g in gradients[0].items() if n.endswith(".B"))


def test_a_base_that_overflows_is_refused_at_the_first_step(root: Path, results: dict[str, Result]) -> None:
    """On every rank, by name of the step and its documents, with the adapter as it was."""
    result = results["broken"]
    message = result.agreed("error")
    assert message.startswith("step 1: the gradient's norm is nan")
    assert "Nothing of it was saved" in message
    assert all(torch.equal(tensor, result.weights[name]) for name, tensor in result.initial.items())
    assert result.losses == []


def diverging(root: Path, name: str, **changes: Any) -> Path:
    """An absurd learning rate: after the first step nothing that is computed is a number."""
    texts = {"dataset_type": "textfile", "dataset_path": str(root / "texts" / "*.txt")}
    return builders.write_config(
        root / f"{name}.toml",
        model=str(root / "cohere"),
        output_dir=str(root / name),
        lora_alpha=4000.0,
        save_steps=1,
        checkpoint_on_save=True,
        gradient_accumulation_steps=1,
        optimizer={"type": "adamw", "lr": 1e36, "weight_decay": 0.0},
        datasets=[{"name": "book", **texts, "sequence_len": 32, "eval_size": 2}],
        **changes,
    )


@pytest.mark.slow
def test_divergence_ends_with_exit_code_4(root: Path) -> None:
    """The second step is not finite: it and its documents are named, the first step's saves stay."""
    config = diverging(root, "diverged")
    output = builders.train(2, "--config", str(config), expect=4)
    read = unsplit.rows(config, [], 2)[0][1]
    assert len(read) == 1
    assert "error: step 2: the " in output
    assert "Traceback" not in output
    named = {line.strip() for line in output.splitlines() if line.strip().startswith("book: ")}
    assert named == {f"book: {name}" for name in documents_of(read[0], root)}
    run = builders.only_run(root / "diverged")
    assert {path.name for path in run.iterdir() if path.is_dir()} == {"step1", "global_step1"}
    saved = load_file(run / "step1" / "adapter_model.safetensors")
    assert saved
    assert all(bool(tensor.isfinite().all()) for tensor in saved.values())
    assert [line["step"] for line in builders.metrics(run)] == [1]


@pytest.mark.slow
def test_an_evaluation_that_is_not_finite_ends_with_exit_code_4_too(root: Path) -> None:
    """Before anything of that step is saved, and so that no best loss can be a NaN."""
    output = builders.train(2, "--config", str(diverging(root, "judged", eval_steps=1)), expect=4)
    assert "error: step 1: the loss of book is " in output
    assert "Traceback" not in output
    run = builders.only_run(root / "judged")
    assert not [path.name for path in run.iterdir() if path.is_dir()]
    assert not any(key.startswith("eval/") for line in builders.metrics(run) for key in line)


def documents_of(row: torch.Tensor, root: Path) -> set[str]:
    """The files whose text a row's tokens are, found by reading them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(root / "cohere")
    pieces = tokenizer.decode(row[1:]).split(tokenizer.eos_token)
    return {path.name for path in (root / "texts").iterdir() for piece in pieces if piece and piece in path.read_text()}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_self_test_refuses(fault: str, results: dict[str, Result]) -> None:
    """On all ranks, naming what is off; and lets DeepSpeed as it is pass."""
    said = results[fault].agreed("error")
    if FAULTS[fault] is None:
        assert said is None
    else:
        assert "would train something else than asked" in said
        assert FAULTS[fault] in said
