"""Preference runs stopped and resumed, begun from an adapter, compared with one; and on one, two and three stages."""

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.artifacts.adapter.adapter import WEIGHTS_FILE
from pipeline.console import UserError
from pipeline.training.engine import reference
from tests.helpers import builders, stage_runs
from tests.helpers.paths import WORKERS
from tests.helpers.stage_runs import Case
from tests.training.checkpoint.test_resume import assert_equal, final_state, numbers, run_plan
from tests.training.run.test_preference_trained import config, write_rows

STEPS = 4
COMMAND_STEPS = 5


@pytest.fixture
def root(tmp_path: Path) -> Path:
    builders.save_model(tmp_path / "cohere", "cohere", logit_scale=1.0)
    write_rows(tmp_path)
    return tmp_path


def of_start(run: str) -> np.ndarray:
    """What the reference said of all units, NaN for those of no interest."""
    (file,) = Path(run).glob("reference-*.arrow")
    return reference._read(file)


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """The arguments of `train.py` and a folder, where the run of them is whole: a pair to a micro-batch, a checkpoint after every
    second step, and dropout, which the reference must not see."""
    root = tmp_path_factory.mktemp("commands")
    builders.save_model(root / "cohere", "cohere", logit_scale=1.0)
    write_rows(root)
    keys = [
        *("micro_batch_size_per_gpu=1", "gradient_accumulation_steps=2", "lora_dropout=0.2"),
        *(f"max_steps={COMMAND_STEPS}", "epochs=9", "save_steps=2", "checkpoint_on_save=true", "eval_steps=5"),
    ]
    arguments = ["--config", str(config(root, "sigmoid")), *(part for key in keys for part in ("--set", key))]
    builders.train(2, *arguments, "--set", f"output_dir={str(root / 'whole')!r}")
    return arguments, root


def left_by(run: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """Its adapter, and what it logged but for times."""
    return load_file(run / f"step{COMMAND_STEPS}" / WEIGHTS_FILE), numbers(str(run))


def test_killed_in_a_step_and_resumed_is_bit_equal(commands: tuple[list[str], Path]) -> None:
    """One process gets SIGKILL in the step whose end would have been the next checkpoint, and the launcher ends the other."""
    arguments, root = commands
    arguments = [*arguments, "--set", f"output_dir={str(root / 'killed')!r}"]
    faulty = WORKERS / "faulty_train.py"
    builders.launch(2, faulty, *arguments, expect=-9 & 0xFF, FAULT=f"step-kill:{COMMAND_STEPS - 1}")
    run = builders.only_run(root / "killed")
    assert [path.name for path in run.glob("global_step*")] == ["global_step2"]
    said = builders.train(2, *arguments, "--resume_from_checkpoint", str(run))
    assert "what base says of 'pairs' is in" in said, "the reference is not asked again"
    (adapter, logged), (whole, before) = left_by(run), left_by(builders.only_run(root / "whole"))
    assert_equal(adapter, whole)
    assert [line for line in logged if line["step"] > 3] == [line for line in before if line["step"] > 3]


def test_a_live_reference_trains_what_a_cached_one_does(commands: tuple[list[str], Path]) -> None:
    """To the bit: with a pair to a micro-batch the reference's rows have the same shapes in both."""
    arguments, root = commands
    keys = [f"output_dir={str(root / 'live')!r}", "objective.reference.precompute_ref_log_probs=false"]
    said = builders.train(2, *arguments, *(part for key in keys for part in ("--set", key)))
    assert "what base says" not in said
    run, whole = (builders.only_run(root / name) for name in ("live", "whole"))
    assert_equal(left_by(run)[0], left_by(whole)[0])
    assert left_by(run)[1] == left_by(whole)[1]


@pytest.mark.slow
def test_stopped_and_resumed_is_bit_equal_whatever_the_reference(root: Path) -> None:
    """With dropout, which the reference must not see; 'start' is read from the run, as it cannot be made again."""
    toml = str(config(root, "sigmoid"))
    common = [f"max_steps={STEPS}", "epochs=9", "lora_dropout=0.2", "eval_steps=2"]
    first = run_plan(root, 2, [{"config": toml, "overrides": common}], name="first")["runs"][0]
    adapter = f"{first}/step{STEPS}"
    start = [*common, f"init_adapter={adapter!r}", 'objective.reference.model="start"']
    folder = [*common, f"objective.reference.model={adapter!r}"]
    plan = [
        {"config": toml, "overrides": start},
        {"config": toml, "overrides": start, "stop_after": 2},
        {"config": toml, "overrides": start, "resume": 1},
        {"config": toml, "overrides": common, "stop_after": 3},
        {"config": toml, "overrides": common, "resume": 3},
        {"config": toml, "overrides": folder},
        {"config": toml, "overrides": [*common, f"init_adapter={adapter!r}", 'objective.reference.model="base"']},
    ]
    result = run_plan(root, 2, plan, name="again")
    runs = result["runs"]
    assert result["codes"] == [0, 75, 0, 75, 0, 0, 0]
    for resumed, whole in ((runs[2], runs[0]), (runs[4], first)):
        assert_equal(final_state(resumed), final_state(whole))
        assert numbers(resumed) == numbers(whole)
    manifest = json.loads((Path(runs[0]) / f"global_step{STEPS}/manifest.json").read_text())
    assert len(manifest["reference"]) == 1
    kept = [reference._read(file) for file in (root / "runs/sigmoid/dataset_cache").glob("reference-*.arrow")]
    assert any(np.array_equal(one, of_start(runs[0]), equal_nan=True) for one in kept), (
        "the folder's numbers are the start's"
    )

    def first_loss(run: str) -> float:
        return next(line["train/loss"] for line in numbers(run) if "train/loss" in line)

    assert first_loss(runs[0]) == pytest.approx(np.log(2), abs=0.1), "but for dropout"
    assert first_loss(runs[5]) != pytest.approx(first_loss(runs[0]), abs=1e-6)
    assert first_loss(runs[6]) < first_loss(runs[0]), "the adapter had learnt to prefer the chosen"

    eager = [*start, "attn_implementation='eager'", f"max_steps={STEPS + 1}"]
    before = {file.name: file.read_bytes() for file in Path(runs[1]).glob("reference-*.arrow")}
    run_plan(root, 2, [{"config": toml, "overrides": eager, "resume": runs[1]}], name="eager")
    assert {file.name: file.read_bytes() for file in Path(runs[1]).glob("reference-*.arrow")} == before
    for file in Path(runs[1]).glob("reference-*.arrow"):
        file.unlink()
    with pytest.raises(UserError, match="it cannot be made again"):
        reference.check_kept(Path(runs[1]), manifest, "start")


@pytest.mark.slow
def test_killed_half_way_through_a_save_and_resumed_is_bit_equal(root: Path) -> None:
    """Whatever the reference; 'start' has been written before the first step."""
    toml = str(config(root, "sigmoid"))
    common = [f"max_steps={STEPS}", "epochs=9", "lora_dropout=0.2", "save_steps=1", "checkpoint_on_save=true"]
    first = run_plan(root, 2, [{"config": toml, "overrides": common}], name="first")["runs"][0]
    start = [f"init_adapter='{first}/step{STEPS}'", 'objective.reference.model="start"']
    for name, more in (("base", []), ("start", start)):
        case = {"config": toml, "overrides": [*common, *more, f"output_dir='{root / name}'"]}
        run_plan(root, 2, [{**case, "fault": "die_in_save:3"}], expect=-9 & 0xFF, name=f"{name}_killed")
        (killed,) = [p for p in (root / name).iterdir() if (p / "config.toml").exists()]
        assert sorted(p.name for p in killed.glob("global_step*")) == ["global_step1", "global_step2"]
        both = run_plan(root, 2, [{**case, "resume": str(killed)}, case], name=f"{name}_resumed")["runs"]
        assert_equal(final_state(both[0], STEPS), final_state(both[1], STEPS))
        assert numbers(both[0]) == numbers(both[1])


@pytest.mark.slow
def test_a_folder_beside_the_model_is_the_cached_one_and_resumed_bit_equal(root: Path) -> None:
    """The folder's adapter takes the trained one's place in every step, on both stages, and leaves it as it was."""
    toml = str(config(root, "sigmoid"))
    one_by_one = ["micro_batch_size_per_gpu=1", "gradient_accumulation_steps=8"]  # so that shapes are the same
    common = [*one_by_one, f"max_steps={STEPS}", "epochs=9", "eval_steps=2"]
    first = run_plan(root, 2, [{"config": toml, "overrides": common}], name="first")["runs"][0]
    cached = [*common, f"objective.reference.model='{first}/step{STEPS}'"]
    live = [*cached, "objective.reference.precompute_ref_log_probs=false"]
    plan = [
        {"config": toml, "overrides": cached},
        {"config": toml, "overrides": live},
        {"config": toml, "overrides": live, "stop_after": 2},
        {"config": toml, "overrides": live, "resume": 2},
    ]
    result = run_plan(root, 2, plan, name="beside")
    runs = result["runs"]
    assert result["codes"] == [0, 0, 75, 0]
    assert_equal(final_state(runs[3]), final_state(runs[1]))
    assert numbers(runs[3]) == numbers(runs[1])
    of_cached, of_live, of_base = (
        [{name: value for name, value in line.items() if name.endswith("/loss")} for line in numbers(run)]
        for run in (runs[0], runs[1], first)
    )
    assert of_live == of_cached
    assert len(of_live) > STEPS
    assert_equal(final_state(runs[1]), final_state(runs[0]))
    assert of_live[0] != pytest.approx(of_base[0], rel=1e-3), "it is not the base that is compared with"


def test_a_start_that_is_not_the_runs_is_refused(tmp_path: Path) -> None:
    values = np.array([[-1.5, -2.0], [np.nan, np.nan]], np.float32)
    reference._write(tmp_path / "reference-a.arrow", values)
    assert np.array_equal(reference._read(tmp_path / "reference-a.arrow"), values, equal_nan=True)
    manifest = {"reference": {"reference-a.arrow": reference._digest_of(values)}}
    reference.check_kept(tmp_path, manifest, "start")
    reference.check_kept(tmp_path / "nowhere", {}, "base")
    for other in ({"reference": {"reference-a.arrow": "0"}}, {"reference": {"reference-b.arrow": "0"}}, {}):
        with pytest.raises(UserError, match=r"objective.reference.model = 'start'.*it cannot be made again"):
            reference.check_kept(tmp_path, other, "start")


def test_a_start_is_never_made_of_the_adapter_that_was_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of data that a resumed run has and the first one had not, or of which it scored other rows."""
    monkeypatch.setattr(reference.dist, "broadcast_object_list", lambda told: None)
    monkeypatch.setattr(reference.dist, "barrier", lambda: None)
    monkeypatch.setattr(reference, "agreement", nullcontext)
    run: Any = SimpleNamespace(place=SimpleNamespace(rank=0), spec=SimpleNamespace(reference="start"))
    store: Any = SimpleNamespace(name="more")
    there = tmp_path / "reference-a.arrow"
    values = np.array([[-1.5, -2.0], [np.nan, np.nan]], np.float32)
    reference._write(there, values)
    found = reference._numbers(run, store, np.array([0]), there, there, too_late=True)
    assert np.array_equal(found, values, equal_nan=True)
    for source, rows in ((tmp_path / "reference-b.arrow", [0]), (there, [0, 1])):
        with pytest.raises(UserError, match=r"'more' before it was trained .* cannot be made again"):
            reference._numbers(run, store, np.array(rows), source, source, too_late=True)


def test_whatever_decides_a_rows_number_is_in_the_name_of_what_is_kept(tmp_path: Path) -> None:
    """The base's weights and config, the reference's, how the stages compute; the rows are there by their store's hash."""
    for name, changes in {"base": {}, "other": {"seed": 1}, "scaled": {"logit_scale": 0.5}, "edited": {}}.items():
        builders.save_model(tmp_path / name, "cohere", layers=4, **changes)
    weights = load_file(tmp_path / "edited" / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] += 1  # neither the first, the middle nor the last
    save_file(weights, tmp_path / "edited" / "model.safetensors", {"format": "pt"})
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / WEIGHTS_FILE).write_text(name)

    def name(reference: str = "base", kernels: str = "none", **changes: Any) -> str:
        as_base = {"folder": tmp_path / "base", "dtype": torch.float32, "attn_implementation": "sdpa", "scheme": None}
        plan = SimpleNamespace(base=SimpleNamespace(**as_base | changes), layout=SimpleNamespace(kernels=kernels))
        run: Any = SimpleNamespace(plan=plan, spec=SimpleNamespace(reference=reference))
        return reference_digest(run)

    names = [
        name(),
        *(name(folder=tmp_path / other) for other in ("other", "scaled", "edited")),
        name(dtype=torch.bfloat16),
        name(attn_implementation="eager"),
        name(scheme="nf4"),
        name(kernels="all"),
        name("start"),
        name(str(tmp_path / "one")),
        name(str(tmp_path / "two")),
    ]
    assert len(set(names)) == len(names)
    assert name("start", kernels="all", dtype=torch.bfloat16) == name("start"), "a run has one start"
    (tmp_path / "two" / WEIGHTS_FILE).write_text("one")
    assert name(str(tmp_path / "two")) == name(str(tmp_path / "one"))


def reference_digest(run: Any) -> str:
    return reference._digest(reference._about(run))


@pytest.mark.slow
def test_one_two_and_three_stages_are_equal(root: Path) -> None:
    """To the bit: a stage's arithmetic is that of its layers, whoever else there is."""
    toml, weights, losses = config(root, "mixture"), {}, {}
    for stages in (1, 2, 3):
        overrides = [f"pipeline_stages={stages}", f"output_dir={str(root / f'of{stages}')!r}"]
        case = Case("same", toml, overrides, steps=3, evaluate_at=[3])
        result = stage_runs.run(stages, [case], root / f"results{stages}")["same"]
        weights[stages], losses[stages] = result.weights, (result.losses, result.evaluation(3))
    for stages in (2, 3):
        assert losses[stages] == losses[1]
        assert weights[stages].keys() == weights[1].keys()
        for name, tensor in weights[1].items():
            assert torch.equal(weights[stages][name], tensor), name
