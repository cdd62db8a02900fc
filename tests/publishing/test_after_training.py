"""What follows a training: the keys' rules, what is refused at the start, the order, failures, stops, and a whole run."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from huggingface_hub import ModelCard

import export_lora
import merge_lora
from pipeline.artifacts.export.export import export
from pipeline.artifacts.fold.merge import merge
from pipeline.config import loading
from pipeline.console import UserError
from pipeline.publishing import after_training as publishing
from pipeline.publishing.after_training import by_hand, follow
from pipeline.training.run import after_training
from pipeline.training.stage import families
from pipeline.training.start import resolve, to_train
from tests.artifacts.fold.test_merge_process import adapter_for, big_base
from tests.helpers.artifacts import files_of, hooked, load_model, logits, make_base, tensors_of
from tests.helpers.builders import environment, launch, metrics, only_run, save_model, train, write_config
from tests.helpers.configs import problems, small
from tests.helpers.paths import ROOT
from tests.helpers.publishing import make_run

TARGETS = [f"model.layers.{n}.mlp.down_proj" for n in range(3)]


# Keys


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"after_training": ["merge", "merge"]}, "after_training: 'merge' is named more than once"),
        ({"after_training": ["push"]}, "after_training: 'push' needs hub_model_id"),
        ({"after_training": ["merg"]}, "after_training.0 = \"merg\": input should be 'merge', 'export:peft'"),
        ({"after_training": "merge"}, 'after_training = "merge": input should be a valid list'),
        ({"hub_model_id": "no-owner"}, 'hub_model_id = "no-owner": not a repository\'s id on the Hub'),
        ({"hub_model_id": "/home/me/model"}, 'hub_model_id = "/home/me/model": not a repository\'s id'),
        ({"hub_base_model": "a/b--c"}, 'hub_base_model = "a/b--c": not a repository\'s id'),
    ],
)
def test_keys_that_mean_nothing(keys: dict[str, Any], said: str) -> None:
    (line,) = problems(small(**keys))
    assert line.startswith(said)


@pytest.mark.parametrize("part", ["merge", "export:peft", "export:gguf"])
def test_a_model_that_was_trained_in_full_is_a_model_already(part: str) -> None:
    full = {"full_fine_tune": True, "lora_rank": None, "lora_alpha": None}
    (line,) = problems(small(after_training=["card", part], **full))
    assert line == f"after_training: '{part}' with full_fine_tune = true: what is saved is a model already; remove it"
    assert loading.validate(small(after_training=["push", "card"], hub_model_id="a/b", **full), "x.toml")


def test_defaults_publish_nothing_and_privately() -> None:
    config = loading.validate(small(), "x.toml")
    assert config.after_training == []
    assert config.hub_private_repo is True


# Before a run starts


def check(asked: list[str], base: Path, **changes: Any) -> None:
    facts: dict[str, Any] = {"kind": "multiplicative_lora", "targets": TARGETS, "biased_targets": False}
    publishing.check(asked, base=base, output_dir=base, **{**facts, **changes})  # type: ignore[arg-type]


def test_what_can_be_done_passes_and_asks_for_no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pipeline.publishing.push", None)  # importing it would fail
    check(["merge", "export:peft", "export:gguf", "card"], make_base(tmp_path / "b"))
    check(["card"], tmp_path / "not read", kind="ia3")
    check(["merge", "export:peft"], tmp_path / "b", trained_in_full=["norm"])


@pytest.mark.parametrize(
    ("part", "changes", "said"),
    [
        (
            "export:peft",
            {"kind": "dora"},
            "'export:peft' cannot be done: an adapter of the kind 'dora' is not exported",
        ),
        ("export:gguf", {"kind": "ia3"}, "an adapter of the kind 'ia3' is not exported"),
        (
            "export:gguf",
            {"targets": ["model.layers.0.self_attn.q_proj"]},
            "'export:gguf' cannot be done: 1 of the adapter",
        ),
        (
            "export:gguf",
            {"biased_targets": True},
            "'export:gguf' cannot be done: 3 of the adapter's modules have a bias",
        ),
        ("export:gguf", {"trained_in_full": ["norm"]}, "norm \\(trainable_modules\\) are trained in full"),
        ("merge", {"kind": "unheard-of"}, "an adapter of the kind 'unheard-of' is not folded"),
    ],
)
def test_what_could_not_be_done_at_the_end_is_refused_at_the_start(
    tmp_path: Path, part: str, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        check([part], make_base(tmp_path / "b"), **changes)


FAMILIES: dict[str, dict[str, Any]] = {
    "control_adapter": {"lora_alpha": None},
    "lora": {},
    "moslora": {},
    "ia3": {"lora_rank": None, "lora_alpha": None},
    "oft": {"lora_rank": None, "lora_alpha": None, "oft_block_size": 8},
    "hra": {"lora_alpha": None},
}


def test_the_trainer_asks_before_it_begins(tmp_path: Path) -> None:
    """Of each family: what its configuration says here is what its adapter would meet at the end."""
    save_model(tmp_path / "base")

    def before(**keys: Any) -> None:
        raw = small(model=str(tmp_path / "base"), output_dir=str(tmp_path), target_modules=["down_proj"], **keys)
        config = loading.validate(raw, "x.toml")
        plan = resolve.resolve(config)
        after_training.check(config.after_training, config.model, config.output_dir, plan, config.trainable_modules)

    every = ["merge", "export:peft", "export:gguf", "card"]
    before(after_training=every)
    for family, keys in FAMILIES.items():
        additive = family in ("control_adapter", "lora", "moslora")
        for part in every:
            with nullcontext() if additive or not part.startswith("export") else pytest.raises(UserError, match=family):
                before(adapter_type=family, after_training=[part], **keys)
    with pytest.raises(UserError, match="'dora'"):
        before(adapter_type="lora", use_dora=True, after_training=["export:peft"])


def test_an_adapter_names_its_base_as_the_hub_does(tmp_path: Path) -> None:
    save_model(tmp_path / "base")
    keys: dict[str, Any] = {
        "model": str(tmp_path / "base"),
        "target_modules": ["down_proj"],
        "hub_base_model": "org/a-base",
    }
    config = loading.validate(small(**keys), "x.toml")
    write = families.writer(to_train.adapter_of(config, TARGETS[:1]), resolve.base_of(config))
    write(tmp_path, {f"{TARGETS[0]}.A": torch.ones(4, 32), f"{TARGETS[0]}.B": torch.ones(32, 4)})
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/a-base"


def test_a_base_that_cannot_be_folded_into(tmp_path: Path) -> None:
    base = make_base(tmp_path / "b")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(UserError, match="is quantised"):
        check(["merge"], base)
    (base / "config.json").write_text(json.dumps({**config, "model_type": "strange"}))
    with pytest.raises(
        UserError, match="'export:gguf' cannot be done: no GGUF adapter is written for model_type 'strange'"
    ):
        check(["export:gguf"], base)


def test_too_little_room_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Usage(NamedTuple):
        free: int

    base = make_base(tmp_path / "b")
    size = sum(len(content) for content in files_of(base).values()) - len(b"not to be copied")
    weights = sum(tensor.nbytes for tensor in tensors_of(base).values())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(weights))  # the other files want room too
    check(["merge"], base)
    assert "'merge' will need" in capsys.readouterr().err
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(size))
    check(["merge"], base)
    assert capsys.readouterr().err == ""


# The parts


def test_every_part_gives_what_its_command_gives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path, ["card", "export:gguf", "merge", "export:peft"])
    follow(run)
    said = capsys.readouterr().out
    order = [said.index(f"of 4: {part}") for part in ("merge", "export:peft", "export:gguf", "card")]
    assert order == sorted(order)
    merge(run.base, run.saved, tmp_path / "merged")
    export(run.base, run.saved, tmp_path / "peft", format="peft")
    export(run.base, run.saved, tmp_path / "adapter.gguf", format="gguf")
    added = {"README.md", "loss.svg", ".saved_at_step"}
    for name in ("merged", "peft"):
        found, expected = files_of(run.run_dir / name), files_of(tmp_path / name)
        assert added <= set(found)
        assert {k: v for k, v in found.items() if k not in added} == expected
    assert (run.run_dir / "gguf/adapter.gguf").read_bytes() == (tmp_path / "adapter.gguf").read_bytes()
    follow(run)  # once more, over what is there
    assert (
        files_of(run.run_dir / "peft")["adapter_model.safetensors"]
        == files_of(tmp_path / "peft")["adapter_model.safetensors"]
    )


def test_a_part_that_fails_says_what_is_left_and_how_to_do_it(tmp_path: Path) -> None:
    run = make_run(tmp_path, ["merge", "export:peft", "card", "push"])
    before = files_of(run.saved)
    (run.run_dir / "peft").write_text("in the way")
    with pytest.raises(UserError) as caught:
        follow(run)
    lines = str(caught.value).split("\n")
    assert lines[0].endswith("peft is a file; give the name of a folder.")
    assert lines[1] == f"The training is done, and safe in {run.saved}. Not done: export:peft, card, push. By hand:"
    assert lines[-1].strip() == run.resume_line
    assert caught.value.exit_code == 2
    assert files_of(run.saved) == before
    assert (run.run_dir / "merged/model.safetensors").exists()
    (run.run_dir / "peft").unlink()
    program, script, *arguments = shlex.split(lines[2])
    asked = export_lora.parser().parse_args(arguments)
    assert (program, script) == ("python", "export_lora.py")
    export(asked.input, asked.lora, asked.output, format=asked.format)
    assert (run.run_dir / "peft/adapter_model.safetensors").exists()


def test_the_commands_by_hand_are_the_programs_own(tmp_path: Path) -> None:
    run = make_run(tmp_path, ["merge", "export:gguf", "push"])
    folded = merge_lora.parser().parse_args(shlex.split(by_hand("merge", run) or "")[2:])
    assert (folded.input, folded.lora, folded.output) == (run.base, [run.saved], run.run_dir / "merged")
    exported = export_lora.parser().parse_args(shlex.split(by_hand("export:gguf", run) or "")[2:])
    assert (exported.lora, exported.output, exported.format) == (run.saved, run.run_dir / "gguf/adapter.gguf", "gguf")
    hub = shutil.which("hf", path=str(Path(sys.executable).parent))
    assert hub
    assert shlex.split(by_hand("push", run) or "") == [
        "hf",
        "upload",
        "somebody/a-style",
        str(run.run_dir / "merged"),
        "--private",
    ]


# Stops


def start_worker(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "tests/workers/after_training_worker.py", str(folder), "merge", "card"]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_until_folding(run_dir: Path, process: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and not list(run_dir.glob(".merged.partial-*/*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGINT, signal.SIGHUP))]
)
def test_a_stop_while_folding_leaves_nothing_half_made(tmp_path: Path, number: signal.Signals) -> None:
    big_base(tmp_path / "base", layers=16, rows=1024, columns=2048, files=2)
    (tmp_path / "run").mkdir()
    adapter_for(tmp_path / "run/step1", layers=16, rows=1024, columns=2048)
    before = files_of(tmp_path / "run/step1")
    worker = start_worker(tmp_path)
    wait_until_folding(tmp_path / "run", worker)
    os.kill(worker.pid, number)
    output, _ = worker.communicate(timeout=60)
    assert worker.returncode == 75, output
    assert "Not done: merge, card. By hand:" in output
    assert "the line that resumes" in output
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["step1"]
    assert files_of(tmp_path / "run/step1") == before


@pytest.mark.slow
def test_a_launcher_that_is_gone_is_a_stop(tmp_path: Path) -> None:
    """The `deepspeed` command dies of a signal without telling its processes."""
    big_base(tmp_path / "base", layers=24, rows=1024, columns=2048, files=2)
    (tmp_path / "run").mkdir()
    adapter_for(tmp_path / "run/step1", layers=24, rows=1024, columns=2048)
    log = tmp_path / "log"
    arguments = shlex.join([sys.executable, "tests/workers/after_training_worker.py", str(tmp_path), "merge"])
    launcher = subprocess.Popen(
        ["sh", "-c", f"{arguments} > {shlex.quote(str(log))} 2>&1; echo left"],
        cwd=ROOT,
        env=environment(LOCAL_RANK="0", WORLD_SIZE="1", RANK="0"),
    )
    wait_until_folding(tmp_path / "run", launcher)
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.wait()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and "Not done: merge" not in log.read_text():
        time.sleep(0.1)
    assert "Not done: merge" in log.read_text()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["step1"]


def test_a_stop_that_was_asked_for_before_is_kept(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.stop").touch()
    worker = start_worker(tmp_path)
    output, _ = worker.communicate(timeout=60)
    assert worker.returncode == 75
    assert "after training" not in output


# Whole runs


@pytest.mark.slow
def test_train_fold_and_describe_in_one_go(tmp_path: Path) -> None:
    """Two stages, stopped half way, resumed; then the run once more when it is done already."""
    save_model(tmp_path / "base")
    keys: dict[str, Any] = {
        "model": str(tmp_path / "base"),
        "output_dir": str(tmp_path / "runs"),
        "eval_steps": 2,
        "eval_after_last_step": True,
        "after_training": ["merge", "export:peft", "card"],
    }
    toml = str(write_config(tmp_path / "c.toml", **keys))
    short = train(2, "--config", toml, "--set", "max_steps=3")
    assert "after training, 3 of 3: card" in short
    run = only_run(tmp_path / "runs")
    shutil.rmtree(run / "merged")
    output = train(2, "--config", toml, "--resume_from_checkpoint")
    assert "after training, 3 of 3: card" in output
    merge(tmp_path / "base", run / "step5", tmp_path / "by_hand")
    assert tensors_of(run / "merged").keys() == tensors_of(tmp_path / "by_hand").keys()
    for name, tensor in tensors_of(tmp_path / "by_hand").items():
        assert torch.equal(tensor, tensors_of(run / "merged")[name])
    parts = json.loads((run / "run.json").read_text())["parts"]
    assert [(part["from_step"], part["to_step"]) for part in parts] == [(0, 3), (3, 5)]
    assert all(len(part["peak_bytes"]) == 2 and part["seconds"] > 0 for part in parts)
    for folder in ("merged", "peft"):
        card = ModelCard.load(run / folder / "README.md")
        last = [line for line in metrics(run) if "eval/book/loss" in line][-1]
        assert card.data.eval_results[0].metric_value == last["eval/book/loss"]
        assert last["step"] == 5
        assert str(tmp_path) not in str(card)

    shutil.rmtree(run / "merged")
    again = train(2, "--config", toml, "--resume_from_checkpoint")
    assert "step 5/5" not in again
    assert (run / "merged/README.md").exists()
    assert len(json.loads((run / "run.json").read_text())["parts"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("stages", [1, 2])
def test_what_follows_begins_without_the_stages_weights(tmp_path: Path, stages: int) -> None:
    """DeepSpeed's engine and autograd's hooks hold each other where no garbage collector looks."""
    save_model(tmp_path / "base", tie_word_embeddings=True)
    toml = write_config(
        tmp_path / "c.toml",
        model=str(tmp_path / "base"),
        output_dir=str(tmp_path / "runs"),
        max_steps=2,
        pipeline_stages=stages,
        trainable_modules=["embed_tokens"],
        eval_after_last_step=True,
        after_training=["card"],
    )
    output = launch(stages, ROOT / "tests/workers/freed_weights_worker.py", "--config", str(toml))
    (line,) = [line for line in output.splitlines() if line.startswith("alive: ")]
    assert json.loads(line.removeprefix("alive: ")) == []


@pytest.mark.slow
def test_a_run_that_is_stopped_is_followed_by_nothing(tmp_path: Path) -> None:
    save_model(tmp_path / "base")
    toml = write_config(
        tmp_path / "c.toml",
        model=str(tmp_path / "base"),
        output_dir=str(tmp_path / "runs"),
        max_steps=100000,
        epochs=1000,
        checkpoint_every_n_minutes=0.01,
        after_training=["merge"],
    )
    from tests.helpers.builders import finish, start

    launcher = start(2, "--config", str(toml))
    while launcher.poll() is None and not list((tmp_path / "runs").glob("2*/global_step*/manifest.json")):
        time.sleep(0.1)
    run = only_run(tmp_path / "runs")
    (run / "save_quit").touch()
    output = finish(launcher, 75, 100)
    assert "after training" not in output
    assert not (run / "merged").exists()
    (part,) = json.loads((run / "run.json").read_text())["parts"]
    assert part["to_step"] == max(line["step"] for line in metrics(run))


def test_the_merged_model_is_the_adapted_one(tmp_path: Path) -> None:
    """By forward hooks on transformers' own model, which know nothing of the fold."""
    run = make_run(tmp_path, ["merge", "card"])
    follow(run)
    stored = tensors_of(run.saved)
    tensors = {
        name.removeprefix("base_model.model.").replace(".peanut_", ".").removesuffix(".weight"): tensor
        for name, tensor in stored.items()
    }
    with hooked(base := load_model(run.base), tensors, 6.0 / 4, multiplicative=True):
        expected = logits(base)
    # fp32 sums of 48 and fewer terms through three layers.
    assert (logits(load_model(run.run_dir / "merged")) - expected).abs().max() <= 1e-4 * expected.abs().max()
