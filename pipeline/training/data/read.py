"""The rows of a run: every dataset tokenised or found in the cache, cut, split, and checked against the model.

All processes call it with the same outcome; the first to come builds the data cache, the others find it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedModel

from pipeline.config.data_tables import BOOKS, UNITS, Dataset, EvalDataset
from pipeline.console import UserError, log, warn
from pipeline.data import chunks
from pipeline.data.rows import build
from pipeline.data.rows.apart import ApartChunks
from pipeline.data.rows.packing import PackedRows
from pipeline.data.rows.store import Report, UnequalRows
from pipeline.data.selection import Selection, Streams, repeated, split, whole
from pipeline.data.store import ChunkStore
from pipeline.data.streaming import kinds
from pipeline.data.streaming.windows import Windows
from pipeline.data.units import build as unit_build
from pipeline.data.units.generated import GeneratedPairs
from pipeline.data.units.store import UnitRows
from pipeline.data.units.streams import paired
from pipeline.formats.base_model import read_base
from pipeline.generation import positions
from pipeline.model.structure.parts import parts_of
from pipeline.training.data import fits as data_fits
from pipeline.training.data.questions import Questions, questions_of
from pipeline.training.data.specs import generates, row_spec, unit_spec
from pipeline.training.start.resolved import DataSpec, Resolved


@dataclass(frozen=True)
class Stream:
    """The dataset of a run that is read as it is trained on. `rows(number)`: those of a window that are trained on, packed where
    that is asked for, which may be none. `one_length`: whether all of all windows have one."""

    windows: Windows[Any]
    rows: Callable[[int], Selection]
    one_length: bool


class Spoken(NamedTuple):
    """What answers that are trained on need: the ids at which they end, and how ids are spelled."""

    stops: frozenset[int]
    text: Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Data:
    """Rows for training, by dataset, and for evaluation, by name; what the model is asked while it is trained.

    `warnings`: said at the start and again at the end. `stops`: ids at which it learns to stop, beside those at which it does.
    `stream`: instead of `train`. `spoken`: where it gives answers itself that it is trained on.
    """

    train: list[Selection]
    evaluation: dict[str, Selection]
    warnings: list[str] = field(default_factory=list)
    questions: Questions | None = None
    stops: tuple[int, ...] = ()
    stream: Stream | None = None
    spoken: Spoken | None = None


class Places(NamedTuple):
    """What reading a dataset needs beside it: ids at which the model stops, the cache's folder, how many processes prepare, and
    tokens of an answer that the model gives at most."""

    stops: list[int]
    cache: Path
    processes: int | None = None
    max_new_tokens: int | None = None


def read_data(spec: DataSpec, tokenizer: Any, plan: Resolved | None = None) -> Data:
    """Tokenise (or find in the cache), cut and split every dataset; says what became of the text.

    With the model's plan, UserError for ids beyond its embedding and for rows and answers longer than it can read.
    """
    train, evaluation, warnings = list[Selection](), dict[str, Selection](), list[str]()
    stops: set[Any] = set()
    most = spec.generation.max_new_tokens if spec.generation else None
    places, shared = Places(spec.stops, spec.cache, spec.processes, most), plan and plan.meta_model.shared
    pack = partial(packed, switch=spec.rope_switch)
    stream = None
    for number, dataset in enumerate(spec.datasets):
        name = dataset.name or f"dataset{number}"
        if dataset.streaming:
            stream, of_window = read_stream(f"datasets.{number}", dataset, name, tokenizer, spec, plan)
            warnings, stops = of_window.warnings, stops | set(of_window.stops)
            continue
        held_out: dict[str, Any] = {"eval_size": dataset.eval_size, "eval_split": dataset.eval_split}
        streams = read_streams(f"datasets.{number}", dataset, name, tokenizer, places, shared, **held_out)
        rows = split(streams, dataset.eval_size, dataset.subsample, dataset.num_repeats, dataset.max_tokens)
        log(f"data:     {rows}")
        train.append(
            repeated(pack(rows.train, dataset), dataset.num_repeats) if dataset.packing != "none" else rows.train
        )
        if isinstance(streams.train, UnequalRows | UnitRows):
            learnt = learnt_from(streams.train.report, tokenizer, plan)
            warnings, stops = warnings + learnt.warnings, stops | set(learnt.stops)
        if rows.eval is not None:
            evaluation[name] = pack(rows.eval, dataset) if dataset.packing == "best_fit" else rows.eval
    for number, held in enumerate(spec.eval_datasets):
        name = held.name or f"eval{number}"
        streams = read_streams(f"eval_datasets.{number}", held, name, tokenizer, places, shared)
        evaluation[name] = pack(whole(streams, held.subsample), held)
    for line in warnings:
        warn(line)
    questions = questions_of(spec.samples, tokenizer, shared) if spec.samples is not None else None
    if spec.in_streams:
        train, evaluation = streamed(spec, train, evaluation)
    learnt_stops = tuple(sorted(stops))
    spoken = None
    if spec.generation is not None:
        ends = frozenset({tokenizer.eos_token_id, *spec.stops, *learnt_stops})
        spoken = Spoken(ends, partial(tokenizer.decode, clean_up_tokenization_spaces=False))
    return Data(train, evaluation, warnings, questions, learnt_stops, stream, spoken)


class Learnt(NamedTuple):
    """What a dataset's report says of stopping: lines to warn with, and ids at which the model learns to stop."""

    warnings: list[str]
    stops: list[int]


def learnt_from(report: Report, tokenizer: Any, plan: Resolved | None) -> Learnt:
    """Of rows. With the model's plan, warns of special tokens that the base has not learnt."""
    if plan is not None:
        check_specials(report, tokenizer, plan)
    return Learnt(report.warnings, [] if report.ends is None else [report.ends])


def read_stream(
    table: str, dataset: Dataset, name: str, tokenizer: Any, spec: DataSpec, plan: Resolved | None
) -> tuple[Stream, Learnt]:
    """A dataset that is read as it is trained on; a window of it is made now, and what became of it is said.

    UserError, with the model's plan as for `read_data`: how long rows may be is asked of `sequence_len`, ids in each window.
    """
    model, key = plan and plan.meta_model.shared, f"{table}.sequence_len"
    if model is not None:
        positions.check(f"{key} = {dataset.sequence_len:,}", dataset.sequence_len, model, lower=key)
    in_chunks = dataset.dataset_type in BOOKS
    if in_chunks:
        kind = ApartChunks if dataset.keeps_apart else ChunkStore
        text = kinds.TextSpec(
            name,
            dataset.dataset_type,
            dataset.dataset_path,
            dataset.sequence_len,
            dataset.join_lines,
            dataset.field_text,
            kind,
        )
        windows: Windows[Any] = kinds.of_text(text, tokenizer, spec.cache, dataset.window_rows)
    else:
        rows = row_spec(dataset, name)
        windows = kinds.of_rows(rows, tokenizer, spec.stops, spec.cache, dataset.window_rows)

    @lru_cache(maxsize=2)
    def rows_of(number: int) -> Selection:
        store: Any = windows.store(number)
        if model is not None:
            data_fits.check_ids(name, store.report.largest_id, tokenizer, data_fits.embedding_rows(model))
        trained = Selection(store, np.flatnonzero(store.targets))
        return packed(trained, dataset, spec.rope_switch) if len(trained) else trained

    number = windows.at_hand()
    log(
        f"data:     {name}: streamed, {dataset.window_rows:,} rows or documents at a time; window {number:,} is at hand"
    )
    first: Any = windows.store(number)
    if not len(rows_of(number)):
        raise UserError(
            f"dataset '{name}': nothing of window {number:,} is left to train on. Give a larger window_rows, or another "
            f"sequence_len:\n  {first.report}"
        )
    learnt = Learnt([], []) if in_chunks else learnt_from(first.report, tokenizer, plan)
    return Stream(windows, rows_of, in_chunks or dataset.packing != "none"), learnt


def streamed(
    spec: DataSpec, train: list[Selection], evaluation: dict[str, Selection]
) -> tuple[list[Selection], dict[str, Selection]]:
    """The datasets' rows as units of two streams, and what is held out of both."""
    rows: dict[str, list[Selection]] = {}
    held_out: dict[str, list[Selection]] = {}
    for number, (dataset, chosen) in enumerate(zip(spec.datasets, train, strict=True)):
        stream = str(dataset.stream)
        rows.setdefault(stream, []).append(chosen)
        if (held := evaluation.get(dataset.name or f"dataset{number}")) is not None:
            held_out.setdefault(stream, []).append(held)
    units = paired(rows)
    log(f"data:     {len(units):,} units of a row to break and a row to retain")
    return [units], {units.store.name: paired(held_out)} if held_out else {}


def check_specials(report: Report, tokenizer: Any, plan: Resolved) -> None:
    """Warn of special tokens in the rows that the base has not learnt, where this run does not train its embedding."""
    model, base = plan.meta_model.shared, read_base(Path(plan.base.folder), "model")
    if f"{parts_of(model).embedding}.weight" not in plan.trained.in_full and plan.trained.adapter is not None:
        data_fits.check_trained(report.name, report.specials, tokenizer, model, base)


def packed(chosen: Selection, dataset: Dataset | EvalDataset, switch: int | None) -> Selection:
    """Chosen rows, packed as the dataset's table says; says how full they are. Packed rows without a target are left out."""
    if dataset.packing == "none":
        return chosen
    rows = PackedRows(chosen, dataset.sequence_len, dataset.packing, dataset.keeps_apart, switch)
    log(f"data:     {rows}")
    return Selection(rows, np.flatnonzero(rows.targets))


def read_streams(
    table: str,
    dataset: Dataset | EvalDataset,
    name: str,
    tokenizer: Any,
    places: Places,
    model: PreTrainedModel | None,
    **held_out: Any,
) -> Streams[Any]:
    """A dataset's rows, whose ids the `model` has, if one is given; says what became of the text.

    `held_out`: as for `chunks.build`.
    """
    streams: Streams[Any]
    key = f"{table}.sequence_len"
    if dataset.dataset_type in BOOKS:
        if model is not None:
            positions.check(f"{key} = {dataset.sequence_len:,}", dataset.sequence_len, model, lower=key)
        streams = chunks.build(
            name=name,
            dataset_type=dataset.dataset_type,
            dataset_path=dataset.dataset_path,
            sequence_len=dataset.sequence_len,
            tokenizer=tokenizer,
            cache_dir=places.cache,
            join_lines=dataset.join_lines,
            field_text=dataset.field_text,
            processes=places.processes,
            kind=ApartChunks if dataset.keeps_apart else ChunkStore,
            **held_out,
        )
    else:
        made = _rows_of(dataset, name, tokenizer, places)
        if model is not None:
            longest = int(made.lengths.max())
            what = f"dataset '{name}': its longest row's number of tokens, {longest:,},"
            positions.check(what, longest, model, lower=key)
        streams = Streams(made)
    for store in streams.stores:
        log(f"data:     {store.report}")
        if model is not None:
            data_fits.check_ids(store.name, store.report.largest_id, tokenizer, data_fits.embedding_rows(model))
    return streams


def _rows_of(dataset: Dataset | EvalDataset, name: str, tokenizer: Any, places: Places) -> UnequalRows | UnitRows:
    """A dataset of rows, or of units."""
    if dataset.dataset_type in UNITS:
        made = unit_build.build(unit_spec(dataset, name), tokenizer, places.stops, places.cache, places.processes)
        if generates(dataset):
            return GeneratedPairs(made.folder, dataset.sequence_len, places.max_new_tokens)
        return made
    return build.build(row_spec(dataset, name), tokenizer, places.stops, places.cache, places.processes)
