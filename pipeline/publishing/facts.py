"""A run's folder, read for its card: what was trained, on what, with which losses, where and how long.

Takes the folder and what of it is published; gives `Facts`, in which what the folder does not tell is absent.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.artifacts.adapter.adapter import CONFIG_FILE, WEIGHTS_FILE
from pipeline.artifacts.saved_at import Saved
from pipeline.console import UserError
from pipeline.foreign import parse_json, parse_toml, read_object
from pipeline.formats.dtypes import ITEM_BITS
from pipeline.formats.safetensors import read_header
from pipeline.names import id_in_cache, public_name

PATH_KEYS = ("model", "output_dir", "init_adapter", "resume_from_checkpoint")


class Loss(NamedTuple):
    """A loss in nats a token, and exp of it where it is of an evaluation."""

    step: int
    loss: float
    perplexity: float | None = None


@dataclass(frozen=True)
class Facts:
    """What a run's folder tells. `config`: the resolved configuration, paths reduced to their last part.

    `base_folder`: where the base lies, not for the card; `base_id`: its OWNER/NAME on the Hub, if that is known.
    `adapter`: adapter_config.json of what was saved at `step`, empty for a whole model; `values`: how many numbers that
    adapter has, and their dtypes. `data`, `parts`: those of run.json. `samples`: the last of samples.jsonl.
    """

    step: int
    name: str
    base_folder: Path
    base_id: str | None
    config: dict[str, Any]
    adapter: dict[str, Any]
    values: tuple[int, tuple[str, ...]]
    training: list[Loss]
    evaluation: dict[str, list[Loss]]
    speeds: list[float]
    epochs: float | None
    data: list[dict[str, Any]]
    parts: list[dict[str, Any]]
    samples: list[dict[str, Any]]

    @property
    def base(self) -> str:
        """The base's name: its id, or its folder's name."""
        return self.base_id or str(self.config["model"])


def read_facts(run_dir: Path, published: Saved) -> Facts:
    """The facts of the run in `run_dir` up to what is `published`. It is one of ours, with config.toml and metrics.jsonl."""
    saved, step = published
    metrics = run_dir / "metrics.jsonl"
    lines = [line for line in whole_lines(metrics) if line["step"] <= step]
    is_adapter = (saved / CONFIG_FILE).is_file()
    record = _json(run_dir / "run.json")
    epochs = [line["train/epoch"] for line in lines if line.get("train/epoch") is not None]
    config = parse_toml((run_dir / "config.toml").read_text(encoding="utf-8"), str(run_dir / "config.toml"))
    base = Path(config["model"])
    return Facts(
        step=step,
        name=run_dir.name,
        base_folder=base,
        base_id=config.get("hub_base_model") or id_in_cache(base),
        config=without_paths(config),
        adapter=_json(saved / CONFIG_FILE) if is_adapter else {},
        values=_values(saved / WEIGHTS_FILE) if is_adapter else (0, ()),
        training=_losses(lines, "train/loss"),
        evaluation=_evaluations(lines),
        speeds=[line["train/tokens_per_s"] for line in lines if line.get("train/tokens_per_s") is not None],
        epochs=epochs[-1] if epochs else None,
        data=record.get("data", []),
        parts=record.get("parts", []),
        samples=_samples(run_dir / "samples.jsonl", step),
    )


def whole_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, without one that a running process is still writing; none where there is no file."""
    if not file.is_file():
        return []
    *whole, _ = file.read_text(encoding="utf-8").split("\n")
    return [parse_json(line, str(file)) for line in whole]


def without_paths(config: dict[str, Any]) -> dict[str, Any]:
    """`config` with the last part of each path: what is shared tells no private folders."""
    public = {
        key: public_name(value) if key in PATH_KEYS and isinstance(value, str) else value
        for key, value in config.items()
    }
    if "prompts_file" in config.get("samples", {}):
        public["samples"] = {**config["samples"], "prompts_file": Path(config["samples"]["prompts_file"]).name}
    for table in ("datasets", "eval_datasets"):
        if table in config:
            public[table] = [{**entry, "dataset_path": Path(entry["dataset_path"]).name} for entry in config[table]]
    return public


def unrecorded(parts: list[dict[str, Any]], step: int) -> list[tuple[int, int]]:
    """(first, last) of the steps up to `step` that no part of the run has recorded: those of a part that was killed."""
    missing, reached = [], 0
    for part in sorted(parts, key=lambda part: part["from_step"]):
        if part["from_step"] > reached:
            missing.append((reached + 1, part["from_step"]))
        reached = max(reached, part["to_step"])
    return missing + ([(reached + 1, step)] if reached < step else [])


def _json(file: Path) -> dict[str, Any]:
    try:
        return read_object(file, "a part of the run")
    except UserError:
        return {}


def _values(file: Path) -> tuple[int, tuple[str, ...]]:
    """How many numbers a safetensors file holds, and their dtypes."""
    tensors = read_header(file).tensors
    return sum(8 * t.n_bytes // ITEM_BITS[t.dtype] for t in tensors), tuple(sorted({t.dtype for t in tensors}))


def _samples(file: Path, step: int) -> list[dict[str, Any]]:
    """What the model said last, up to `step`; nothing where it was not asked."""
    lines = whole_lines(file)
    last = max((line["step"] for line in lines if line["step"] <= step), default=None)
    return [line for line in lines if line["step"] == last]


def _losses(lines: list[dict[str, Any]], tag: str) -> list[Loss]:
    return [Loss(line["step"], line[tag]) for line in lines if line.get(tag) is not None]


def _evaluations(lines: list[dict[str, Any]]) -> dict[str, list[Loss]]:
    """The evaluations by set; of a step that was evaluated twice, the later one."""
    found: dict[str, dict[int, Loss]] = {}
    for line in lines:
        for tag, loss in line.items():
            name = tag.removeprefix("eval/").removesuffix("/loss")
            if tag == f"eval/{name}/loss" and loss is not None:
                perplexity = line.get(f"eval/{name}/perplexity")
                found.setdefault(name, {})[line["step"]] = Loss(line["step"], loss, perplexity)
    return {name: list(by_step.values()) for name, by_step in found.items()}
