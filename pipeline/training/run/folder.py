"""A run's folder: a new one, or the one a resumed run goes on in.

Takes where to look and what to go on from; gives the folder, locked for this run, and the checkpoint's manifest. The
first process decides; the others are told.
"""

import fcntl
import json
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch.distributed as dist

from pipeline.console import EXIT_STOPPED, UserError, log, log_if_slow
from pipeline.files import SEEN_S, appears, explain_out_of_space, is_on_own_disk, write_text
from pipeline.processes import host, is_first_here, launched_by, launcher
from pipeline.training.checkpoint import commit as checkpoint
from pipeline.training.checkpoint import retention
from pipeline.training.engine.engine import Place, agreement
from pipeline.training.nodes.carrying import Carrier
from pipeline.training.optim.parameter_groups import ParamGroupOverride, values_of
from pipeline.training.run.stop import STOP_FILE
from pipeline.training.start import launch

Resumed = tuple[Path, dict[str, Any]]  # a checkpoint's folder and its manifest
LOCK = ".lock"
OWN_DISK_S = 1.0  # two launchers of one machine may share a disk of its own, which hides nothing
LAUNCH = ".launch"  # the launchers, of all nodes, whose processes are at work in the folder: torchrun may restart them


class RunFolder(NamedTuple):
    """A run's folder, the name of this launch in it, and the open file that locks it (the first process's alone): closing it
    would free the lock."""

    path: Path
    launch: str
    lock: TextIO | None


# What the start of PiSSA and OLoRA depends on.
OF_A_START = (
    "lora_rank",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "lora_weight_dtype",
    "model_weight_dtype",
)
RESUME = "--resume_from_checkpoint"


def of_this_launch(output_dir: Path) -> list[Path]:
    """Runs in which processes of this launch were at work before torchrun restarted them (`--max-restarts`), the newest first."""
    if not launch.is_torchrun():
        return []
    own, found = launcher(), []
    for note in output_dir.glob(f"*/{LAUNCH}"):
        if own in note.read_text(encoding="utf-8").splitlines():
            found.append(note.parent)
    return sorted(found, reverse=True)


def was_stopped(runs: Sequence[Path]) -> bool:
    """Whether the newest was stopped on purpose: then a restart is not wanted."""
    stop = runs[0] / STOP_FILE if runs else None
    return stop is not None and stop.is_file() and stop.read_text() in ("", str(EXIT_STOPPED))


@log_if_slow("starting: verifying the checkpoint")
def find_checkpoint(output_dir: Path, resume: bool | str, restarted: Sequence[Path] = ()) -> Resumed | None:
    """What `resume_from_checkpoint` means: None, or a verified checkpoint and its manifest. CheckpointError if there is none.

    `restarted`: runs of this launch, whose newest checkpoint goes before it.
    """
    for run in restarted:
        with suppress(checkpoint.CheckpointError):
            return checkpoint.find(run, newest_run=False)
    if not resume:
        return None
    return checkpoint.find(output_dir if resume is True else Path(resume), newest_run=resume is True)


def agree_on(resumed: Resumed | None, place: Place) -> Resumed | None:
    """The first process's checkpoint, on all of them."""
    told: list[Any] = [resumed]
    dist.broadcast_object_list(told)
    return told[0]


def check_continues(
    manifest: dict[str, Any], config: dict[str, Any], trained: set[str], aliases: dict[str, str]
) -> None:
    """UserError if the checkpoint is not one of this run: another kind of training, other parameters, another optimizer.

    `trained`: the trained parameters' names over all stages. `aliases`: another name for some of them.
    """
    saved = manifest["config"]
    for key in ("adapter_type", "full_fine_tune", "use_dora", "init_lora_weights", "peft"):
        if key in saved and saved[key] != config.get(key):
            raise UserError(
                f"the checkpoint was made with {key} = {saved[key]}, this run has {config.get(key)}; nothing of it fits"
            )
    _check_same_start(saved, config)
    known = trained | {name for pair in aliases.items() if trained & set(pair) for name in pair}
    if lost := sorted(set(manifest["trained"]) - known):
        raise UserError(
            f"the checkpoint has trained {', '.join(lost[:3])}{' …' if len(lost) > 3 else ''}, which this run would drop; "
            "resume with its target_modules, layers_to_transform and trainable_modules"
        )
    if not config["load_optimizer_states"]:
        return
    for name in manifest["trained"]:
        before, now = (_type_of(aliases.get(name, name), each["optimizer"]) for each in (saved, config))
        if before != now:
            raise UserError(
                f"the checkpoint's optimizer is {_optimizer_types(saved['optimizer'])}, this run's "
                f"{_optimizer_types(config['optimizer'])}: of {name} their states do not fit; set "
                "load_optimizer_states = false to start the optimizer afresh"
            )


def _check_same_start(saved: dict[str, Any], config: dict[str, Any]) -> None:
    """UserError where the start that is subtracted from A and B (PiSSA, OLoRA), which no checkpoint holds, would be another."""
    start = config.get("init_lora_weights", True)
    if start is True:
        return
    for key in (*OF_A_START, *(("seed",) if "niter" in start else ())):
        if saved.get(key) != config.get(key):
            raise UserError(
                f"the checkpoint was made with {key} = {saved.get(key)}, this run has {config.get(key)}, with which "
                f"'{start}' would take another part out of the weights than was trained; resume with the former"
            )


def _type_of(name: str, optimizer: dict[str, Any]) -> str:
    """Of the optimizer that updates the parameter."""
    specials = [ParamGroupOverride(g["names"], {"type": g.get("type")}) for g in optimizer.get("groups", [])]
    return values_of(name, specials).get("type") or optimizer["type"]


def _optimizer_types(optimizer: dict[str, Any]) -> str:
    """The type, and those of [[optimizer.groups]] that have another: 'adamw_kahan, adamw for B'."""
    own = [
        f"{group['type']} for {' and '.join(group['names'])}"
        for group in optimizer.get("groups", [])
        if group.get("type") not in (None, optimizer["type"])
    ]
    return ", ".join([optimizer["type"], *own])


@log_if_slow("starting: looking whether all nodes have one output_dir")
def find_carrier(output_dir: Path, place: Place) -> Carrier | None:
    """What carries between disks, where a node does not see what the first process writes to `output_dir`: it has another there.

    Where it may be on a disk that is shared, a node looks for SEEN_S; where it is on one of its own, for a second. All
    processes call.
    """
    if not place.over_nodes:
        return None
    probe, first = f".probe-{launched_by()}", host()
    with agreement(place), explain_out_of_space(output_dir / probe):
        if place.rank == 0:
            write_text(output_dir / probe, first)
    told: list[Any] = [(probe, first)]
    dist.broadcast_object_list(told)
    name, says = told[0]
    apart = False
    if is_first_here() and place.rank != 0:
        apart = not appears(output_dir / name, OWN_DISK_S if is_on_own_disk(output_dir) else SEEN_S)
    found: list[Any] = [None] * place.world
    dist.all_gather_object(found, (apart, place.node, host()))
    if place.rank == 0:
        (output_dir / probe).unlink()
    if hosts := sorted({where for is_apart, _, where in found if is_apart}):
        log(
            f"output_dir: {', '.join(hosts)} has another disk there than {says}, where checkpoints and adapters are brought "
            "together; their settings and data have to be the same on all"
        )
    nodes_apart = frozenset(node for is_apart, node, _ in found if is_apart)
    return Carrier(output_dir, place, nodes_apart) if nodes_apart else None


def open_run(
    output_dir: Path, resumed: Resumed | None, place: Place, config_toml: str, carrier: Carrier | None = None
) -> RunFolder:
    """The run's folder, locked, the same on all processes. Call when nothing can be wrong with the checkpoint any more:
    later saves than its step are put aside. Raises UserError, everywhere, if another run is at work in the folder.
    """
    told: list[Any] = [None, None]
    launchers = [""] * place.world
    dist.all_gather_object(launchers, launcher())
    taken = None
    if place.rank == 0:
        try:
            with explain_out_of_space(output_dir / "a run's folder"):
                taken = _take_folder(output_dir, resumed, config_toml)
                if launch.is_torchrun():
                    write_text(taken.path / LAUNCH, "\n".join(sorted({*launchers})) + "\n")
            told = [(str(taken.path), taken.launch), None]
        except UserError as error:
            told = [None, (str(error), error.exit_code)]
    dist.broadcast_object_list(told)
    if told[1] is not None:
        raise UserError(*told[1])
    path, name = told[0]
    log(f"run:      {path}")
    if carrier:
        with agreement(place), explain_out_of_space(Path(path)):
            if carrier.is_apart and is_first_here():
                _prepare_apart(Path(path))
        carrier.begin(Path(path))
    return taken or RunFolder(Path(path), name, None)


def _prepare_apart(run_dir: Path) -> None:
    """On a node with a disk of its own: what a restart by torchrun asks there, and nothing that an earlier start left."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / STOP_FILE).unlink(missing_ok=True)
    for left in (*run_dir.glob(".staging-*"), *run_dir.glob(".*.partial-*")):
        retention.delete(left)
    if launch.is_torchrun():
        write_text(run_dir / LAUNCH, f"{launcher()}\n")


def _take_folder(output_dir: Path, resumed: Resumed | None, config_toml: str) -> RunFolder:
    folder = resumed[0] if resumed else None
    # A checkpoint that was copied somewhere alone starts a new run: what lies beside it is not ours.
    is_run = folder is not None and (folder.parent / "metrics.jsonl").exists()
    run_dir = folder.parent if folder is not None and is_run else _new_folder(output_dir)
    lock = _lock(run_dir)
    (run_dir / STOP_FILE).unlink(missing_ok=True)
    retention.clear_rubbish(run_dir)
    if resumed and (abandoned := retention.abandon_after(run_dir, resumed[1]["step"])):
        log(f"later than the checkpoint, renamed to abandoned-…: {', '.join(abandoned)}")
    write_text(run_dir / "config.toml", config_toml)
    return RunFolder(run_dir, launched_by(), lock)


def _new_folder(output_dir: Path) -> Path:
    """A folder named by the UTC time; runs that start within one second wait for their own."""
    while True:
        run_dir = output_dir / datetime.now(UTC).strftime("%Y%m%d_%H-%M-%S")
        try:
            run_dir.mkdir(parents=True)
            return run_dir
        except FileExistsError:
            time.sleep(0.2)


def _lock(run_dir: Path) -> TextIO:
    """An open file that holds the folder's lock; the system frees it however the process ends."""
    file = (run_dir / LOCK).open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another run is at work in {run_dir}; stop it before resuming it") from None
    return file


def differences(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """A line for each key whose value is another than in the checkpoint's configuration."""
    lines = []
    for key in sorted(saved.keys() | current.keys()):
        old, new = (json.dumps(c.get(key), default=str) for c in (saved, current))
        if old != new and key != "resume_from_checkpoint":
            lines.append(f"  {key}: {old} → {new}")
    return lines


def resume_line(command: list[str], run_dir: Path) -> str:
    """The command that goes on with this run: the one it was started with (program and arguments), and where to resume."""
    program, *arguments = command
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip and not argument.startswith("--"):
            skip = False
            continue
        skip = argument == RESUME
        if not skip and not argument.startswith(f"{RESUME}="):
            kept.append(argument)
    return launch.command_again([program, *kept, RESUME, str(run_dir)])
