"""What is refused before weights are read or a process waits for another: one message each, exit code 2."""

import json
import os
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import processes
from pipeline.config.loading import load
from pipeline.console import UserError
from pipeline.model import weights
from pipeline.model.stage import Stage
from pipeline.training.run import folder as run_folder
from pipeline.training.stage import parts
from pipeline.training.start import launch, prepare, resolve
from pipeline.training.start.resolved import Resolved
from tests.helpers.builders import write_config


def plan(tmp_path: Path, base: Path, **changes: Any) -> Resolved:
    settings = {"model": str(base), "output_dir": str(tmp_path / "out"), **changes}
    config = load(str(write_config(tmp_path / "c.toml", **settings)))
    made = resolve.resolve(config)
    prepare.check_files(config.model, config.output_dir, made.meta_model)
    prepare.tokenizer_for(made, config.model)
    return made


def test_a_plan_says_what_is_trained_where(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = plan(tmp_path, base)
    assert made.trained.targets == [f"model.layers.{i}.mlp.down_proj" for i in range(3)]
    assert made.ranges[0][0] == 0
    said = capsys.readouterr().out
    assert "multiplicative_lora on the output of down_proj, layers 0 to 2 (3 of 4: all but the last)" in said


def test_one_resolved_run_gives_its_stages_as_often_as_asked(tmp_path: Path, base: Path) -> None:
    """A stage is cut from a model of its own: what the run looks at keeps every parameter, and no random number is drawn."""
    made = plan(tmp_path, base, pipeline_stages=2)
    whole = {name: parameter.shape for name, parameter in made.meta_model.shared.named_parameters()}

    owned = set()

    def stages() -> list[dict[str, torch.Tensor]]:
        torch.manual_seed(1)
        found = []
        for first, end in made.ranges:
            stage = Stage(made.meta_model.make(), first, end)
            owned.update(name for name, _ in stage.model.named_parameters())
            weights.load(stage, made.base.folder, made.base.dtype, torch.device("cpu"))
            parts.put_trained(stage, made.trained)
            found.append(dict(stage.named_parameters()))
        return found

    once, again = stages(), stages()
    for one, other in zip(once, again, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert owned == {*whole}
    assert {name: parameter.shape for name, parameter in made.meta_model.shared.named_parameters()} == whole
    state = torch.get_rng_state()
    made.meta_model.make()
    assert torch.equal(torch.get_rng_state(), state)


def copy_of(base: Path, tmp_path: Path, **config: Any) -> Path:
    """The base with changes to its config.json."""
    folder = tmp_path / "changed"
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **config}))
    return folder


def groups(*names: str) -> dict[str, Any]:
    """[optimizer] with a group for these names."""
    return {"type": "adamw_kahan", "lr": 1e-2, "groups": [{"names": list(names), "lr_ratio": 0.1}]}


def test_a_group_that_names_nothing_trained_is_refused_before_weights_are_read(tmp_path: Path, base: Path) -> None:
    """A tied head goes by its embedding's name, on any number of stages: a group for the other would have no effect."""
    plan(tmp_path, base, optimizer=groups("B", r"layers\.0\..*A"))
    with pytest.raises(UserError, match=r"optimizer\.groups: 'lora_Z' names no parameter that is trained"):
        plan(tmp_path, base, optimizer=groups("B", "lora_Z"))
    tied = copy_of(base, tmp_path, tie_word_embeddings=True)
    for stages in (1, 2):
        settings = {"trainable_modules": ["lm_head"], "pipeline_stages": stages}
        plan(tmp_path, tied, optimizer=groups("embed_tokens.weight"), **settings)
        with pytest.raises(
            UserError, match=r"'lm_head\.weight' names no parameter that is trained; there are model\.embed"
        ):
            plan(tmp_path, tied, optimizer=groups("lm_head.weight"), **settings)


def test_a_quantised_base_is_refused(tmp_path: Path, base: Path) -> None:
    """fp8 weights cast without their scales would train as garbage, without a word."""
    folder = copy_of(base, tmp_path, quantization_config={"quant_method": "fp8"})
    with pytest.raises(UserError, match=r"is quantised \(fp8\)"):
        plan(tmp_path, folder)


def test_a_model_that_is_not_there_or_has_no_tokenizer(tmp_path: Path, base: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        plan(tmp_path, tmp_path / "nowhere")
    folder = copy_of(base, tmp_path)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match="there is no tokenizer in it"):
        plan(tmp_path, folder)


def test_an_output_dir_that_cannot_be_written(tmp_path: Path, base: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write there"):
        plan(tmp_path, base, output_dir=str(tmp_path / "file" / "runs"))


def test_full_fine_tuning_of_modules_that_are_not_there(tmp_path: Path, base: Path) -> None:
    changes = {"full_fine_tune": True, "lora_rank": None, "lora_alpha": None, "layers_to_transform": None}
    with pytest.raises(UserError, match="no parameter has nope in its name"):
        plan(tmp_path, base, target_modules=["nope"], **changes)
    assert plan(tmp_path, base, target_modules=["norm"], **changes).trained.targets == []


def test_the_number_of_processes_is_checked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_SIZE", "3")
    launch.check_processes(3)
    with pytest.raises(UserError, match="pipeline_stages = 2 does not divide the 3 process"):
        launch.check_processes(2)


# Resuming

SAVED = {
    "config": {"adapter_type": "lora", "full_fine_tune": False, "optimizer": {"type": "adamw_kahan"}, "x": 1},
    "trained": ["m.0.A", "m.0.B"],
}


@pytest.mark.parametrize(
    ("changes", "trained", "message"),
    [
        ({}, {"m.0.A", "m.0.B", "m.1.A"}, None),
        ({"adapter_type": "multiplicative_lora"}, {"m.0.A", "m.0.B"}, "adapter_type"),
        ({"full_fine_tune": True}, {"m.0.A", "m.0.B"}, "full_fine_tune"),
        ({}, {"m.0.A"}, "m.0.B, which this run would drop"),
        ({"optimizer": {"type": "adamw"}}, {"m.0.A", "m.0.B"}, "load_optimizer_states = false"),
        ({"optimizer": {"type": "adamw"}, "load_optimizer_states": False}, {"m.0.A", "m.0.B"}, None),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(
    changes: dict[str, Any], trained: set[str], message: str | None
) -> None:
    now = {**SAVED["config"], "load_optimizer_states": True, **changes}  # type: ignore[dict-item]
    if message is None:
        run_folder.check_continues(SAVED, now, trained, {})
        return
    with pytest.raises(UserError, match=message):
        run_folder.check_continues(SAVED, now, trained, {})


def test_what_differs_from_the_checkpoint_is_shown() -> None:
    saved = {"lr": 1e-5, "resume_from_checkpoint": False, "same": [1]}
    current = {"lr": 2e-5, "resume_from_checkpoint": True, "same": [1], "new": None}
    assert run_folder.differences(saved, current) == ["  lr: 1e-05 → 2e-05"]


def test_the_resume_line_is_the_command_that_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_program", lambda name: name)  # on PATH
    command = [
        "/a b/train.py",
        "--local_rank=1",
        "--config",
        "x.toml",
        "--resume_from_checkpoint",
        "old",
        "--set",
        "a='b c'",
    ]
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = run_folder.resume_line(command, tmp_path)
    quoted = shlex.quote("a='b c'")
    expected = (
        f"deepspeed --quiet --num_gpus 2 '/a b/train.py' --config x.toml --set {quoted} {run_folder.RESUME} {tmp_path}"
    )
    assert line == expected
    flag = run_folder.resume_line(["train.py", "--resume_from_checkpoint", "--set", "x=1"], tmp_path)
    assert flag == f"deepspeed --quiet --num_gpus 2 train.py --set x=1 --resume_from_checkpoint {tmp_path}"


def test_later_saves_are_put_aside_and_kept(tmp_path: Path) -> None:
    from pipeline.training.checkpoint import retention

    for name in ("global_step2", "global_step4", "step2", "step4", "steps"):
        (tmp_path / name).mkdir()
    assert sorted(retention.abandon_after(tmp_path, 2)) == ["global_step4", "step4"]
    names = {path.name.split("-")[0] for path in tmp_path.iterdir()}
    assert names == {"global_step2", "step2", "steps", "abandoned"}
    assert [n for n, _ in retention.numbered(tmp_path, "global_step")] == [2]


def test_a_run_folder_belongs_to_one_run(tmp_path: Path) -> None:
    with run_folder._lock(tmp_path), pytest.raises(UserError, match="another run is at work"):
        run_folder._lock(tmp_path)
    run_folder._lock(tmp_path).close()


def test_without_a_launcher_the_whole_command_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_program", lambda name: name)  # on PATH
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr("sys.argv", ["train.py", "--config", "my run.toml"])
    with pytest.raises(UserError) as caught:
        launch.check_processes(2)
    assert str(caught.value).endswith("\n  deepspeed --quiet --num_gpus 2 train.py --config 'my run.toml'")


def test_srun_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of its tasks would be a run of its own; under torchrun, which sets WORLD_SIZE, it is none of our business."""
    monkeypatch.setattr("sys.argv", ["train.py", "--config", "my run.toml"])
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UserError, match="SLURM_NTASKS = 2: srun alone would make 2 runs") as caught:
        launch.check_processes(1)
    assert str(caught.value).endswith("train.py --config 'my run.toml'")
    monkeypatch.setenv("WORLD_SIZE", "2")
    launch.check_processes(1)


LAUNCHED = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "7"}
RENDEZVOUS = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "box-1:29500"]


@pytest.mark.parametrize(
    ("above", "environment", "line"),
    [
        (
            [
                "python",
                "/x/bin/torchrun",
                "--nnodes",
                "2",
                "--nproc-per-node",
                "2",
                *RENDEZVOUS,
                "train.py",
                "--config",
                "c",
            ],
            LAUNCHED,
            "torchrun --nnodes 2 --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint box-1:29500 train.py --config x  "
            "# on each of the 2 nodes",
        ),
        (
            ["python", "-m", "torch.distributed.run", "--nnodes=2", "--node-rank=1", "train.py"],
            LAUNCHED,
            "torchrun --nnodes=2 --node-rank=1 train.py --config x  # on each of the 2 nodes, each with its own --node-rank",
        ),
        (
            ["python", "/x/bin/torchrun", "--nproc-per-node", "2", *RENDEZVOUS, "train.py"],
            {**LAUNCHED, "SLURM_STEP_ID": "0"},
            "srun --nodes 2 --ntasks-per-node 1 torchrun --nproc-per-node 2 --rdzv-backend c10d "
            "--rdzv-endpoint box-1:29500 train.py --config x",
        ),
        (
            ["bash"],
            {**LAUNCHED, "LOCAL_WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "1"},
            "torchrun --standalone --nproc-per-node 4 train.py --config x",
        ),
        (
            ["python", "/x/bin/deepspeed", "--hostfile", "my hosts", "--no_ssh", "--node_rank=0", "train.py"],
            {"WORLD_SIZE": "4", "LOCAL_SIZE": "2", "CROSS_SIZE": "2"},
            "deepspeed --hostfile 'my hosts' --no_ssh --node_rank=0 train.py --config x  # on each of the 2 nodes, each with "
            "its own --node_rank",
        ),
        (
            ["sshd"],
            {"WORLD_SIZE": "4", "LOCAL_SIZE": "2", "CROSS_SIZE": "2"},
            "deepspeed --hostfile HOSTFILE train.py --config x  # HOSTFILE: the one of this launch",
        ),
    ],
    ids=["torchrun", "module", "srun", "unseen", "no_ssh", "ssh"],
)
def test_what_goes_on_with_a_run_is_said_for_its_launcher(
    monkeypatch: pytest.MonkeyPatch, above: list[str], environment: dict[str, str], line: str
) -> None:
    class Process:
        """Of the process above."""

        def parents(self) -> list["Process"]:
            return [self]

        def cmdline(self) -> list[str]:
            return above

    monkeypatch.setattr(launch, "_program", lambda name: name)
    monkeypatch.setattr(launch.psutil, "Process", Process)
    for name in (*LAUNCHED, "LOCAL_SIZE", "CROSS_SIZE", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launch.command_again(["train.py", "--local_rank=1", "--config", "x"]) == line


def test_files_of_another_host_are_never_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process id says nothing about another host's process."""
    monkeypatch.setattr(processes, "host", lambda: "box-1")
    dead, alive = 2**22 + 1, os.getpid()  # beyond Linux's largest
    for name in (
        f"box-1-{dead}-5.0",
        f"box-1-{alive}-5.0",
        f"box-1-2-{dead}-5.0",
        f"box-2-{dead}-5.0",
        f"box-1-{dead}-5.0-peers",
    ):
        (tmp_path / f".rendezvous-{name}").touch()
    processes.remove_of_dead_launches(tmp_path, ".rendezvous-")
    left = {path.name.removeprefix(".rendezvous-") for path in tmp_path.iterdir()}
    assert left == {f"box-1-{alive}-5.0", f"box-1-2-{dead}-5.0", f"box-2-{dead}-5.0"}
