"""What follows a training, in a fixed order: the fold, the exports, the card, the upload.

Takes a run's folder whose last adapter (or model) is whole; each part gives a folder there that is whole or not at all. A
part that fails leaves the training as it is: the error says what is left to do, and the commands that do it.
"""

import gc
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.artifacts import saved_at
from pipeline.artifacts.adapter.adapter import CONFIG_FILE
from pipeline.artifacts.export.export import export
from pipeline.artifacts.fold.merge import merge
from pipeline.config.rules import PARTS, Part
from pipeline.console import UserError, log, warn

GGUF_FILE = "adapter.gguf"
FOLDERS: dict[Part, str] = {"merge": "merged", "export:peft": "peft", "export:gguf": "gguf"}  # in the run's folder


@dataclass(frozen=True)
class FinishedRun:
    """A run that reached its end. `resume_line`: the command that, of a run that is done, does this again.

    What is published is what was saved at the last step; a best_loss/ beside it is left as it is.
    """

    run_dir: Path
    step: int
    base: Path
    resume_line: str
    asked: Sequence[Part]
    repository: str | None
    private: bool

    @property
    def saved(self) -> Path:
        """The adapter, or the whole model."""
        return self.run_dir / f"step{self.step}"

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

    facts = read_facts(run.run_dir, run.step)
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
