"""`after_training` as the trainer sees it: checked before a run starts; done by the first process when the others have left."""

from pathlib import Path

from pipeline.artifacts.saved_at import Saved
from pipeline.config.rules import Part
from pipeline.console import UserError
from pipeline.formats.experts import NO_EXPERTS
from pipeline.publishing import after_training
from pipeline.training.run.stop import Watcher
from pipeline.training.stage import families
from pipeline.training.start.resolved import Resolved


def check(asked: list[Part], model: str, output_dir: str, plan: Resolved, modules: list[str]) -> None:
    """UserError where a part of after_training could not be done at the end of this run. `modules`: trainable_modules."""
    trained = plan.trained
    adapter = trained.adapter
    if "merge" in asked and adapter and adapter.by_peft and (reason := adapter.by_peft.not_folded):
        raise UserError(f"after_training: 'merge' cannot be done: {reason}. Remove it; PEFT loads the adapter.")
    after_training.check(
        asked,
        base=Path(model),
        output_dir=Path(output_dir),
        kind=families.saved_kind(adapter) if adapter else None,
        targets=trained.targets,
        parameters=adapter.matrices if adapter else (),
        biased_targets=bool(adapter and adapter.biased_targets),
        trained_in_full=modules,
        full=[name for name in trained.in_full if name not in trained.tied],
        experts=adapter.experts if adapter else NO_EXPERTS,
        width=plan.meta_model.config.get_text_config().hidden_size,
    )


def follow(
    asked: list[Part],
    watcher: Watcher,
    *,
    run_dir: Path,
    saved: Saved,
    base: Path,
    resume_line: str,
    repository: str | None,
    private: bool,
) -> None:
    """Do what is asked for with `saved`. From here on a stop ends the process with exit code 75."""
    if not asked:
        return
    watcher.hand_over()
    after_training.follow(
        after_training.FinishedRun(
            run_dir=run_dir,
            saved=saved.folder,
            step=saved.step,
            base=base,
            resume_line=resume_line,
            asked=asked,
            repository=repository,
            private=private,
        )
    )
