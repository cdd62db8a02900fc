"""Trackers of experiments (wandb, trackio, mlflow, …) that follow a run, through accelerate's classes for them.

Takes names, options and the run's configuration; gives them what metrics.jsonl gets, which stays the truth: a tracker that
fails during a run is said once and left out from there on. Only the first process has any.
"""

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.console import UserError, log, rank, warn
from pipeline.generation.shown import Sample

Options = Mapping[str, Mapping[str, Any]]  # by tracker
OF_SAMPLES = ("step", "prompt", "text", "stopped", "tokens")


def check(names: Sequence[str]) -> None:
    """UserError where the package of a tracker is not there, or does not start."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(
                f"trackers: '{name}' needs the package {name}, which does not import: {error}. Install it, or remove it there"
            ) from error


class Trackers:
    """Those of one run, on its first process. UserError where one does not begin: without a login, say."""

    def __init__(
        self, names: Sequence[str], options: Options, project: str, run_dir: Path, config: Mapping[str, Any]
    ) -> None:
        self._running: dict[str, Any] = {}
        if not names or rank() != 0:
            return
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        _make_accelerate_s_state()
        for name in names:
            kind = LOGGER_TYPE_TO_CLASS[name]
            given = {**_of_run(name, run_dir), **options.get(name, {})}
            if kind.requires_logging_directory:
                given = {"logging_dir": str(run_dir), **given}
            try:
                tracker = kind(project, **given)
                tracker.start()
                tracker.store_init_configuration(flat(config))
            except Exception as error:  # each tracker raises classes of its own
                raise UserError(
                    f"trackers: '{name}' does not begin: {error}. Mend that (tracker_options.{name} goes to its constructor), "
                    "or remove it from trackers"
                ) from error
            self._running[name] = tracker
        log(f"trackers: {', '.join(names)}, in the project {project}")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """The numbers of `step`, by tag."""
        self._each(lambda tracker: tracker.log(dict(values), step=step))

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """What was said at `step`, where a tracker takes tables."""
        rows = [[step, one["prompt"], one["text"], one["stopped"], one["tokens"]] for one in samples]

        def table(tracker: Any) -> None:
            if hasattr(tracker, "log_table"):
                tracker.log_table("samples", columns=list(OF_SAMPLES), data=rows, step=step)

        self._each(table)

    def close(self) -> None:
        """The run is over."""
        self._each(lambda tracker: tracker.finish())
        self._running = {}

    def _each(self, do: Callable[[Any], object]) -> None:
        for name, tracker in list(self._running.items()):
            try:
                do(tracker)
            except Exception as error:  # each tracker raises classes of its own, and none is worth the run
                warn(f"the tracker '{name}' gets nothing more: {error}. All there is stands in metrics.jsonl")
                del self._running[name]


def _make_accelerate_s_state() -> None:
    """accelerate's trackers log through loggers that raise RuntimeError until its PartialState is there.

    Its device is to be the CPU: otherwise it would set the process's CUDA device, and refuse some GPUs. Nothing here uses it.
    """
    from accelerate import PartialState
    from accelerate.utils import patch_environment

    with patch_environment(ACCELERATE_TORCH_DEVICE="cpu"):
        PartialState()


def flat(config: Mapping[str, Any], within: str = "") -> dict[str, Any]:
    """`config` without levels: `optimizer.lr`; lists as JSON, and nothing that has no value."""
    values: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{within}{key}"
        if isinstance(value, Mapping):
            values |= flat(value, f"{name}.")
        elif isinstance(value, str | int | float | bool):
            values[name] = value
        elif value is not None:
            values[name] = json.dumps(value, ensure_ascii=False)
    return values


def _of_run(name: str, run_dir: Path) -> dict[str, Any]:
    """How the tracker names the run; where it can, a resumed run goes on there under its name."""
    match name:
        case "wandb":
            return {"name": run_dir.name, "id": run_dir.name, "resume": "allow", "dir": str(run_dir)}
        case "trackio":
            return {"name": run_dir.name, "resume": "allow"}
        case "mlflow":
            return {"run_name": run_dir.name}
        case "swanlab":
            return {"experiment_name": run_dir.name, "id": run_dir.name, "resume": "allow"}
    return {}
