"""evaluate_lora.py behind its command line: one load of the base, every adapter on every dataset, what it says.

Takes the parsed arguments; gives a table on the console and a folder with records, figures and a plot. Raises UserError before
a weight is read where the configuration, the data, the model or an adapter is wrong.
"""

import argparse
import math
import os
import shutil
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import tomli_w
import torch
import torch.distributed as dist

from pipeline.artifacts.fold_history import adapter_digest
from pipeline.commands import loading
from pipeline.config import evaluation as schema
from pipeline.config.evaluation import BASE, Evaluation
from pipeline.console import UserError, duration, log, progress, rank
from pipeline.data import tokenizer as tokenizers
from pipeline.evaluation import cells, datasets, harness, plot, records, report
from pipeline.evaluation.harness import TaskResult
from pipeline.evaluation.records import Scored
from pipeline.evaluation.scoring import Links, Scorer
from pipeline.evaluation.units import UnitSet
from pipeline.files import atomic_folder, check_writable, write_json, write_text
from pipeline.formats.base_model import Base
from pipeline.formats.dtypes import DTYPES
from pipeline.generation import adapter as adapters
from pipeline.generation.adapter import Saved
from pipeline.model.quantized import Scheme
from pipeline.version import full as version


class Named(NamedTuple):
    """An adapter as the table calls it; None for the base."""

    name: str
    folder: Path | None
    saved: Saved | None


def evaluate(asked: argparse.Namespace) -> None:
    """Check all there is, load, score, show and write."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    began = datetime.now(UTC)
    given = {key: value for key in ("adapters", "tasks") if (value := getattr(asked, key))}
    config = schema.load(asked.config, asked.set, **given)
    device = loading.meet(asked.device)
    n_stages = _stages(config)
    check_writable(Path(config.output_dir), "output_dir")
    found = loading.look(
        Path(config.model),
        "model",
        n_stages,
        dtype=DTYPES[config.model_weight_dtype],
        attention=config.attn_implementation,
        layers_per_stage=config.layers_per_stage,
        scheme=_scheme(config),
    )
    named = _adapters(config.adapters, found.base, asked.kind)
    _check_beside_packed(found, named)
    tokenizer = tokenizers.load(found.folder)
    data = datasets.read(
        config.datasets, tokenizer, found.folder, found.whole, Path(config.output_dir) / "dataset_cache"
    )
    _check_batches(config, data)
    with loading.said_here():
        tasks = _tasks(config) if rank() == 0 else {}
        stage = loading.read_stage(found, rank() % n_stages, device)
    scorer = Scorer(
        [stage],
        device,
        found.dtype,
        tokenizer.eos_token_id or 0,
        micro_batch_size=config.micro_batch_size_per_gpu,
        batch_size_tokens=config.batch_size_tokens,
        links=_links(n_stages),
    )
    scored, results = list[Scored](), list[TaskResult]()
    for one in named:
        with adapters.worn(stage, one.saved):
            scored += _scored(scorer, one, data)
            if config.tasks:
                log(f"tasks:    {one.name}")
                results += harness.run(one.name, scorer, tokenizer, found.whole, tasks, config.num_fewshot)
    if rank() == 0:
        _written(config, scored, results, began)
    loading.part()


def _scheme(config: Evaluation) -> Scheme | None:
    """How the base is quantised, as it was in the training."""
    if config.quantization is None:
        return None
    return Scheme.from_bnb(config.quantization.bnb.model_dump(), DTYPES[config.model_weight_dtype])


def _check_beside_packed(found: loading.Found, named: list[Named]) -> None:
    """UserError for an adapter that would have to be put into weights of 4 or 8 bits."""
    if found.scheme is None:
        return
    for one in named:
        if one.saved is not None and (inside := adapters.not_beside(one.saved)):
            raise UserError(
                f"quantization: adapter '{one.name}' changes the weight of {inside} itself, and there is none in "
                f"{found.scheme.bits} bits; measure it over the base in 16 bits"
            )


def _tasks(config: Evaluation) -> dict[str, Any]:
    folder = Path(config.tasks_folder).expanduser() if config.tasks_folder else None
    return harness.load(config.tasks, folder) if config.tasks else {}


def _stages(config: Evaluation) -> int:
    """How many the model is cut into. UserError unless processes are whole replicas of them."""
    processes = loading.processes()
    stages = config.pipeline_stages or (len(config.layers_per_stage) if config.layers_per_stage else processes)
    if processes % stages:
        raise UserError(
            f"pipeline_stages = {stages} does not divide the number of processes, {processes}: start a multiple of it "
            f"(deepspeed --num_gpus {stages} evaluate_lora.py …), or leave it out"
        )
    return stages


def _links(n_stages: int) -> Links | None:
    """Neighbouring stages on neighbouring ranks; what is left are replicas."""
    if not dist.is_initialized():
        return None
    replica = rank() // n_stages
    ranks = list(range(replica * n_stages, (replica + 1) * n_stages))
    return Links(ranks, replica, dist.get_world_size() // n_stages, dist.new_group(backend="gloo"))


def _adapters(folders: list[str], base: Base, kind: Any) -> list[Named]:
    """The base, and each adapter under the shortest end of its path that no other has."""
    paths = [Path(folder) for folder in folders if folder != BASE]
    named = [Named(BASE, None, None)]
    for path, name in zip(paths, names(paths), strict=True):
        saved = adapters.read(path, base, kind)
        loading.warn_of_another_base(base, saved)
        named.append(Named(name, path, saved))
    return named


def names(paths: list[Path]) -> list[str]:
    """The shortest end of each path that tells it from the others and from the base. UserError where two are one folder."""
    parts = [path.resolve().parts for path in paths]
    for place, one in enumerate(parts):
        if one in parts[:place]:
            raise UserError(f"adapters: {paths[place]} is named twice")
    found = []
    for one in parts:
        length = 1
        while any(other[-length:] == one[-length:] for other in [*parts, (BASE,)] if other != one):
            length += 1
        found.append("/".join(one[-length:]))
    return found


def _check_batches(config: Evaluation, data: list[UnitSet]) -> None:
    longest = max((one.longest for one in data), default=0)
    if config.batch_size_tokens is not None and longest > config.batch_size_tokens:
        raise UserError(
            f"batch_size_tokens = {config.batch_size_tokens:,} does not hold the longest row, which has {longest:,} tokens: "
            f"raise it to {longest:,}"
        )


def _scored(scorer: Scorer, one: Named, data: list[UnitSet]) -> list[Scored]:
    """The adapter that the stage has, on every dataset. UserError, on every process, where a log-probability is no number."""
    began, found = time.monotonic(), []
    digest = adapter_digest(one.folder) if one.folder else None
    with progress(one.name, sum(len(units.rows) for units in data)) as advance:
        for units in data:
            scores = scorer.score(units.rows, advance=advance)
            if (bad := next((p for p, s in enumerate(scores) if not math.isfinite(s.logprob)), None)) is not None:
                raise UserError(
                    f"adapter '{one.name}': the log-probability of row {bad} of dataset '{units.name}' is not finite; the "
                    f"weights of the adapter or of the model are damaged"
                )
            found.append(Scored(one.name, digest, units, records.records(units, scores)))
    log(f"scored:   {one.name}, {duration(time.monotonic() - began)}")
    return found


def _written(config: Evaluation, scored: list[Scored], results: list[TaskResult], began: datetime) -> None:
    """Figures and lights, shown and written into a new folder."""
    rules = cells.Rules(config.bootstrap_resamples, config.confidence_level, config.seed, config.beta)
    found = [*cells.cells(scored, rules), *cells.task_cells(results, config.tasks_role, rules)]
    lights = cells.lights(scored, found, results)
    width = shutil.get_terminal_size((report.WIDEST, 24)).columns
    log("\n" + report.terminal(found, lights, config.confidence_level, width))
    folder = Path(config.output_dir) / began.strftime("%Y%m%d_%H-%M-%S")
    while folder.exists():  # another evaluation began within the same second
        folder = folder.with_name(f"{folder.name}+")
    folders = {one.adapter: one.sha256 for one in scored}
    with atomic_folder(folder) as temporary:
        records.write(temporary / "records.parquet", scored)
        if results:
            records.write_tasks(temporary / "tasks.parquet", results)
        write_text(temporary / "table.csv", report.comma_separated(found))
        title = f"Evaluation of {began:%Y-%m-%d %H:%M:%S} UTC"
        write_text(temporary / "table.md", report.markdown(found, lights, config.confidence_level, title))
        (temporary / "plot.png").write_bytes(plot.picture(found))
        write_text(temporary / "config.toml", tomli_w.dumps(config.model_dump(exclude_none=True)))
        facts = {
            "version": version(),
            "torch": torch.__version__,
            "adapters": folders,
            "lights": [light._asdict() for light in lights],
            "tasks": [{"adapter": one.adapter, "task": one.task, **one.summary} for one in results],
        }
        write_json(temporary / "evaluation.json", facts)
    log(f"\nwritten:  {folder}: table.md, table.csv, plot.png, records.parquet, evaluation.json")
