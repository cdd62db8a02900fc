"""`after_training` as the trainer sees it: foreseen before a run starts, done after it has ended.

Takes the config; gives plain values to pipeline/publishing, which knows nothing of it. It is done by the first process,
when the others have left.
"""

from pathlib import Path

from pipeline.config.schema import Config
from pipeline.publishing import foresight
from pipeline.training.run.stop import Watcher
from pipeline.training.stage import families
from pipeline.training.stage.spec import Trained


def check(config: Config, trained: Trained) -> None:
    """UserError where a part of after_training could not be done at the end of this run."""
    adapter = trained.adapter
    foresight.check(
        config.after_training,
        base=Path(config.model),
        output_dir=Path(config.output_dir),
        kind=families.saved_kind(adapter) if adapter else None,
        targets=trained.targets,
        biased_targets=bool(adapter and adapter.biased_targets),
        trained_in_full=config.trainable_modules,
        full=[name for name in trained.in_full if name not in trained.tied],
    )


def follow(config: Config, run_dir: Path, step: int, resume_line: str, watcher: Watcher) -> None:
    """Do what is asked for with what was saved at `step`. From here on a stop ends the process with exit code 75."""
    if not config.after_training:
        return
    from pipeline.publishing import after_training

    watcher.hand_over()
    after_training.follow(
        after_training.Finished(
            run_dir=run_dir,
            step=step,
            base=Path(config.model),
            resume_line=resume_line,
            asked=config.after_training,
            repository=config.hub_model_id,
            private=config.hub_private_repo,
        )
    )
