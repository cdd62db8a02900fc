"""What follows a training, in a fixed order: the fold, the exports, the card, the upload.

`check` looks, before a run starts, for what could not be done at its end: it raises UserError, or warns where it may yet turn
out well. Of the base only headers are read; without 'push' no token is looked for, and nothing connects to anything.

`follow` takes a run's folder whose last adapter (or model) is whole; each part gives a folder there that is whole or not at
all. A part that fails leaves the training as it is: the error says what is left to do, and the commands that do it.
"""

import gc
import shlex
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.artifacts import saved_at
from pipeline.artifacts.adapter.adapter import CONFIG_FILE
from pipeline.artifacts.export.export import export
from pipeline.artifacts.fold.match import check_names
from pipeline.artifacts.fold.merge import merge
from pipeline.artifacts.saved_at import Saved
from pipeline.config.rules import PARTS, PARTS_OF_ADAPTERS, Part
from pipeline.console import UserError, gib, log, warn
from pipeline.families import MULTIPLICATIVE, SAVED
from pipeline.formats.base_model import Base, files_to_copy, read_base
from pipeline.formats.experts import NO_EXPERTS, ExpertWeights

GGUF_FILE = "adapter.gguf"
FOLDERS: dict[Part, str] = {"merge": "merged", "export:peft": "peft", "export:gguf": "gguf"}  # in the run's folder
FOLDED_KINDS: tuple[str, ...] = tuple(SAVED)
EXPORTED_KINDS: tuple[str, ...] = tuple(name for name, row in SAVED.items() if row.additive)


def check(
    asked: Sequence[Part],
    *,
    base: Path,
    output_dir: Path,
    kind: str | None,
    targets: Sequence[str],
    biased_targets: bool,
    trained_in_full: Sequence[str] = (),
    full: Sequence[str] = (),
    experts: Mapping[str, ExpertWeights] = NO_EXPERTS,
    width: int = 0,
    parameters: Collection[str] = (),
) -> None:
    """Raise UserError where a part that is asked for cannot be done.

    `kind`: what pipeline/artifacts calls the adapter that will be saved, None for a model. `targets`: the full names of
    the modules it is on; `biased_targets`: whether any of them has a bias; `trained_in_full`: modules beside it; `full`: the
    names of the tensors that these are. `experts`: those of `targets` that are a layer's experts, which write `width` numbers;
    `parameters`: those that are parameters.
    """
    if kind is not None and any(part in asked for part in PARTS_OF_ADAPTERS):
        _check_kind(asked, kind)
        model = read_base(base, "model")
        _check_names(asked, model, targets, full, experts, width, parameters)
        exports = [part for part in asked if part in ("export:peft", "export:gguf")]
        if exports and (of_experts := [*experts, *parameters]):
            raise UserError(
                f"after_training: '{exports[0]}' cannot be done: {of_experts[0]} is a layer's experts, of which no file of "
                "adapters that servers read has a form. Remove it; 'merge' writes them."
            )
        if "export:gguf" in asked:
            if trained_in_full:
                raise UserError(
                    f"after_training: 'export:gguf' cannot be done: {', '.join(trained_in_full)} (trainable_modules) are "
                    "trained in full, which a GGUF adapter has no place for. Remove it; 'merge' and 'export:peft' take them."
                )
            _check_gguf(model, targets if biased_targets and kind == MULTIPLICATIVE else (), targets)
        if "merge" in asked:
            _warn_of_space(model, output_dir)
    if "push" in asked:
        from pipeline.publishing.push import check_ready

        check_ready()


def _check_kind(asked: Sequence[Part], kind: str) -> None:
    for part in PARTS_OF_ADAPTERS:
        kinds = FOLDED_KINDS if part == "merge" else EXPORTED_KINDS
        if part in asked and kind not in kinds:
            done = "folded" if part == "merge" else "exported"
            raise UserError(
                f"after_training: '{part}' cannot be done: an adapter of the kind '{kind}' is not {done} here, only "
                f"{', '.join(kinds)}. Remove it; PEFT loads the adapter."
            )


def _check_names(
    asked: Sequence[Part],
    model: Base,
    targets: Sequence[str],
    full: Sequence[str],
    experts: Mapping[str, ExpertWeights],
    width: int,
    parameters: Collection[str],
) -> None:
    """What is trained has to be a tensor, or rows of one, in the model's folder."""
    first = next(part for part in PARTS_OF_ADAPTERS if part in asked)
    try:
        check_names(model, targets, full, experts, width, parameters)
    except UserError as error:
        raise UserError(
            f"after_training: '{first}' cannot be done: {error} Remove it; PEFT loads the adapter.", error.exit_code
        ) from None


def _check_gguf(model: Base, biased: Sequence[str], targets: Sequence[str]) -> None:
    from pipeline.artifacts.export.gguf import architecture, gguf_names

    try:
        gguf_names(targets, biased, architecture(model.config))
    except UserError as error:
        raise UserError(f"after_training: 'export:gguf' cannot be done: {error}", error.exit_code) from None


def _warn_of_space(model: Base, output_dir: Path) -> None:
    """The fold writes a whole model. There may be room at the end of the run, so this is not an error."""
    needed = sum(tensor.n_bytes for tensor in model.tensors.values())
    needed += sum((model.folder / file).stat().st_size for file in files_to_copy(model.folder))
    free = shutil.disk_usage(output_dir).free
    if free < needed:
        warn(
            f"after_training: 'merge' will need {gib(needed)} at {output_dir}, where {gib(free)} are free now. "
            "The run goes on; the fold will be refused unless there is room by then."
        )


@dataclass(frozen=True)
class FinishedRun:
    """A run that reached its end. `resume_line`: the command that, of a run that is done, does this again.

    `saved`: the adapter, or the whole model, of `step`, that is published; another save beside it is left as it is.
    """

    run_dir: Path
    saved: Path
    step: int
    base: Path
    resume_line: str
    asked: Sequence[Part]
    repository: str | None
    private: bool

    @property
    def made(self) -> list[Path]:
        """The folders that this makes, the one to publish first; what was saved itself, where it makes none."""
        return [self.run_dir / name for part, name in FOLDERS.items() if part in self.asked] or [self.saved]


def follow(run: FinishedRun) -> None:
    """Do all that is asked for. Raises UserError, with what is left to do, where a part fails."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    parts = [part for part in PARTS if part in run.asked]
    for number, part in enumerate(parts):
        log(f"\nafter training, {number + 1} of {len(parts)}: {part}")
        try:
            _do(part, run)
            if part in FOLDERS:
                saved_at.mark(run.run_dir / FOLDERS[part], run.step)
        except UserError as error:
            raise UserError(f"{error}\n{left_to_do(run, parts[number:])}", error.exit_code) from error
        except BaseException:
            warn(left_to_do(run, parts[number:]))
            raise


def left_to_do(run: FinishedRun, parts: Sequence[Part]) -> str:
    """What a user can do about `parts`, which are not done."""
    lines = [f"The training is done, and safe in {run.saved}. Not done: {', '.join(parts)}. By hand:"]
    lines += [f"  {line}" for part in parts if (line := by_hand(part, run))]
    return "\n".join([*lines, "or all that follows the training once more:", f"  {run.resume_line}"])


def by_hand(part: Part, run: FinishedRun) -> str | None:
    """The command line of a part, which replaces what an earlier attempt left; the card has none."""
    read = ["--input", str(run.base), "--lora", str(run.saved), "--output"]
    match part:
        case "merge":
            return shlex.join(["python", "merge_lora.py", *read, str(run.run_dir / "merged"), "--force"])
        case "export:peft":
            return shlex.join(
                ["python", "export_lora.py", *read, str(run.run_dir / "peft"), "--format", "peft", "--force"]
            )
        case "export:gguf":
            file = run.run_dir / "gguf" / GGUF_FILE
            return shlex.join(["python", "export_lora.py", *read, str(file), "--format", "gguf", "--force"])
        case "push":
            private = ["--private"] if run.private else []
            line = shlex.join(["hf", "upload", run.repository or "OWNER/NAME", str(run.made[0]), *private])
            hint = f"   # first take the base's folder out of {CONFIG_FILE}"
            return line + (hint if (run.made[0] / CONFIG_FILE).is_file() else "")
    return None


def _do(part: Part, run: FinishedRun) -> None:
    match part:
        case "merge":
            merge(run.base, run.saved, run.run_dir / "merged", force=True)
        case "export:peft":
            export(run.base, run.saved, run.run_dir / "peft", format="peft", force=True)
        case "export:gguf":
            export(run.base, run.saved, run.run_dir / "gguf" / GGUF_FILE, format="gguf", force=True)
        case "card":
            _write_cards(run)
        case "push":
            _push(run)


def _write_cards(run: FinishedRun) -> None:
    from pipeline.publishing.card import CARD, write_card
    from pipeline.publishing.facts import read_facts

    facts = read_facts(run.run_dir, Saved(run.saved, run.step))
    for folder in run.made:
        write_card(folder, facts, repository=run.repository)
        log(f"written: {folder / CARD}")


def _push(run: FinishedRun) -> None:
    from pipeline.publishing.card import FILES
    from pipeline.publishing.push import files_of, upload

    folder = run.made[0]
    # Without a card of this run the README.md of a merged model is the base's.
    files = [file for file in files_of(folder) if "card" in run.asked or file not in FILES]
    every = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    if kept := [file for file in every if file not in files and file != saved_at.FILE]:
        log(f"not uploaded: {', '.join(kept)}")
    log(f"uploading {len(files)} files of {folder} to {run.repository}")
    message = f"{run.run_dir.name}, step {run.step}"
    address = upload(folder, files, repository=run.repository or "", private=run.private, message=message)
    log(f"uploaded: {address}")
