"""Before a run starts: what of `after_training` could not be done at its end.

Takes what is asked for and what the run will save; raises UserError, or warns where it may yet turn out well. Of the base
only headers are read. Without 'push' no token is looked for, and nothing connects to anything before the end of a run.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

from pipeline.artifacts.adapter.peft import FAMILIES
from pipeline.artifacts.adapter.write import KINDS
from pipeline.artifacts.export.additive import ADDITIVE_KINDS
from pipeline.artifacts.fold.match import check_names
from pipeline.config.publishing import OF_ADAPTERS, Part
from pipeline.console import UserError, gib, warn
from pipeline.formats.base_model import Base, files_to_copy, read_base

FOLDED_KINDS: tuple[str, ...] = (*KINDS, *FAMILIES)
EXPORTED_KINDS: tuple[str, ...] = ADDITIVE_KINDS


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
) -> None:
    """Raise UserError where a part that is asked for cannot be done.

    `kind`: what pipeline/artifacts calls the adapter that will be saved, None for a model. `targets`: the full names of
    the modules it is on; `biased_targets`: whether any of them has a bias; `trained_in_full`: modules beside it; `full`: the
    names of the tensors that these are.
    """
    if kind is not None and any(part in asked for part in OF_ADAPTERS):
        _check_kind(asked, kind)
        model = read_base(base, "model")
        _check_names(asked, model, targets, full)
        if "export:gguf" in asked:
            if trained_in_full:
                raise UserError(
                    f"after_training: 'export:gguf' cannot be done: {', '.join(trained_in_full)} (trainable_modules) are "
                    "trained in full, which a GGUF adapter has no place for. Remove it; 'merge' and 'export:peft' take them."
                )
            _check_gguf(model, targets if biased_targets and kind == "multiplicative_lora" else (), targets)
        if "merge" in asked:
            _warn_of_space(model, output_dir)
    if "push" in asked:
        from pipeline.publishing.push import check_ready

        check_ready()


def _check_kind(asked: Sequence[Part], kind: str) -> None:
    for part in OF_ADAPTERS:
        kinds = FOLDED_KINDS if part == "merge" else EXPORTED_KINDS
        if part in asked and kind not in kinds:
            done = "folded" if part == "merge" else "exported"
            raise UserError(
                f"after_training: '{part}' cannot be done: an adapter of the kind '{kind}' is not {done} here, only "
                f"{', '.join(kinds)}. Remove it; PEFT loads the adapter."
            )


def _check_names(asked: Sequence[Part], model: Base, targets: Sequence[str], full: Sequence[str]) -> None:
    """What is trained has to be a tensor, or rows of one, in the model's folder."""
    first = next(part for part in OF_ADAPTERS if part in asked)
    try:
        check_names(model, targets, full)
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
