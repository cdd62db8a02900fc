"""A run's files and data, which need no weights, no other process and no GPU: with resolve.py, all of `--check`.

Takes what the config resolves to; gives tokenised rows, micro-batches, or one UserError. All processes call it with the
same outcome; the first to come builds the data cache, the others find it.
"""

import math
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
from pipeline.data import tokenizer as tokenizers
from pipeline.data.batches import EvaluationBatches, MicroBatches
from pipeline.data.chat.derive import Rules
from pipeline.data.chat.messages import Fields
from pipeline.data.mixing import Mixture, mix, pairs
from pipeline.data.rows import build
from pipeline.data.rows.apart import ApartChunks
from pipeline.data.rows.packing import PackedRows
from pipeline.data.rows.store import Report, UnequalRows
from pipeline.data.selection import Selection, Streams, repeated, split, whole
from pipeline.data.store import ChunkStore
from pipeline.data.streaming import kinds
from pipeline.data.streaming.batches import StreamedBatches
from pipeline.data.streaming.windows import Windows
from pipeline.data.units import build as unit_build
from pipeline.data.units.formats import Names
from pipeline.data.units.generated import GeneratedPairs
from pipeline.data.units.store import UnitRows
from pipeline.data.units.streams import paired
from pipeline.files import check_writable
from pipeline.formats.base_model import config_ties, read_base, warn_of_remarks
from pipeline.generation import positions
from pipeline.model import unsupported, weights
from pipeline.model.stage import tied_head
from pipeline.model.structure.parts import parts_of
from pipeline.names import HEAD
from pipeline.training.optim.lr_schedule import warmup_steps
from pipeline.training.stage.meta_model import MetaModel
from pipeline.training.stage.spec import AdapterSpec
from pipeline.training.start import data_fits
from pipeline.training.start.questions import Questions, questions_of
from pipeline.training.start.resolved import DataSpec, Resolved, Updates

MOST_BAD = 0.01  # part of a dataset's rows, where max_bad_rows is not given


TrainBatches = MicroBatches | StreamedBatches


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


def check_files(model: str, output_dir: str, meta_model: MetaModel) -> None:
    """UserError if a weight of the model is not there, or nothing can be written to output_dir. No weight is read."""
    check_writable(Path(output_dir), "output_dir")
    base = read_base(Path(model), "model")
    with unsupported.named(meta_model.config.model_type, "finding its weights in the folder's files"):
        weights.check_complete(meta_model.shared, base)
    warn_of_remarks(base)
    if config_ties(base.config) and not tied_head(meta_model.shared) and base.find(HEAD):
        warn(
            f"{model}: config.json ties the head to the embedding, but {base.taken} holds two different tensors. Both "
            "are kept, as in transformers; tie_word_embeddings = false would say so."
        )


def tokenizer_for(plan: Resolved, folder: str) -> Any:
    """The tokenizer in `folder`; UserError if its BOS or EOS has no trained row in the model's embedding."""
    tokenizer = tokenizers.load(folder)
    data_fits.check_tokenizer(tokenizer, folder, data_fits.embedding_rows(plan.meta_model.shared))
    return tokenizer


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


def generates(dataset: Dataset | EvalDataset) -> bool:
    """Whether the model gives the rejected answers itself."""
    return isinstance(dataset, Dataset) and dataset.generates


def unit_spec(dataset: Dataset | EvalDataset, name: str) -> unit_build.UnitSpec:
    """What is made of a dataset of units, as its table says."""
    kind: Any = dataset.dataset_type
    return unit_build.UnitSpec(
        name,
        kind,
        dataset.dataset_path,
        dataset.sequence_len,
        keep_start=dataset.truncation_mode == "keep_start",
        names=Names(
            dataset.field_prompt,
            dataset.field_chosen,
            None if generates(dataset) else dataset.field_rejected,
            dataset.field_completion,
            dataset.field_label,
            dataset.field_answers,
            chat=dataset.conversational,
            messages=Fields(
                properties={str(key): name for key, name in dataset.message_property_mappings.items()},
                roles={str(role): names for role, names in dataset.roles.items()},
                system=dataset.field_system,
                merge_system=dataset.merge_system,
            ),
        ),
        ranks=dataset.ranks,
        score_weights=dict(dataset.score_weights),
        chat_template=dataset.chat_template,
        template_kwargs=dict(dataset.chat_template_kwargs),
        allow_special_text=dataset.allow_special_text,
        deduplicate=dataset.deduplicate,
        most_bad=MOST_BAD if dataset.max_bad_rows is None else dataset.max_bad_rows,
    )


def row_spec(dataset: Dataset | EvalDataset, name: str) -> build.RowSpec:
    """What is made of a dataset of rows, as its table says."""
    kind: Any = dataset.dataset_type
    most_bad = dataset.max_bad_rows
    if most_bad is None:
        most_bad = 0.0 if kind == "pretokenized" else MOST_BAD
    return build.RowSpec(
        name,
        kind,
        dataset.dataset_path,
        Rules(
            dataset.sequence_len,
            too_long=dataset.too_long,
            history=dataset.history,
            train_on_eos=dataset.train_on_eos,
            allow_special_text=dataset.allow_special_text,
        ),
        Fields(
            messages=dataset.field_messages,
            properties={str(key): name for key, name in dataset.message_property_mappings.items()},
            roles={str(role): names for role, names in dataset.roles.items()},
            system=dataset.field_system,
            tools=dataset.field_tools,
            train_on=dataset.train_on,
            merge_system=dataset.merge_system,
            allow_empty_answers=dataset.allow_empty_answers,
        ),
        prompt=dataset.field_prompt,
        completion=dataset.field_completion,
        chat_template=dataset.chat_template,
        template_kwargs=dict(dataset.chat_template_kwargs),
        deduplicate=dataset.deduplicate,
        most_bad=most_bad,
    )


def micro_batches(spec: DataSpec, data: Data, replica: int = 0, replicas: int = 1) -> TrainBatches:
    """The training micro-batches of one data-parallel replica."""
    if (stream := data.stream) is not None:

        def window(number: int) -> MicroBatches | None:
            rows = stream.rows(number)
            everything = pairs(0, rows.rows)
            return _batches(spec, [rows], Mixture(lambda epoch: everything), replica, replicas) if len(rows) else None

        return StreamedBatches(window, stream.windows.at_hand(), stream.one_length)
    epoch_rows = mix(
        data.train,
        seed=spec.seed,
        mode=spec.combination,
        weights=[1.0] if spec.in_streams else [d.sample_weight for d in spec.datasets],
        stopping_strategy=spec.stopping,
        by=spec.mix_by or "rows",
        weigh_tokens=spec.mix_by is None and spec.batch_size_tokens is not None,
    )
    return _batches(spec, data.train, epoch_rows, replica, replicas)


def _batches(spec: DataSpec, train: list[Selection], epoch_rows: Mixture, replica: int, replicas: int) -> MicroBatches:
    return MicroBatches(
        [rows.store for rows in train],
        epoch_rows,
        seed=spec.seed,
        micro_batch_size=spec.micro_batch_size,
        batch_size_tokens=spec.batch_size_tokens,
        gradient_accumulation_steps=spec.accumulation,
        dp_rank=replica,
        dp_world=replicas,
        group_by_length=spec.group_by_length,
        switch=spec.rope_switch,
    )


def evaluation_batches(spec: DataSpec, data: Data, replica: int = 0, replicas: int = 1) -> dict[str, EvaluationBatches]:
    """The evaluation micro-batches of one data-parallel replica, by dataset."""
    return {
        name: EvaluationBatches(
            rows,
            micro_batch_size=spec.micro_batch_size,
            batch_size_tokens=spec.batch_size_tokens,
            dp_rank=replica,
            dp_world=replicas,
            switch=spec.rope_switch,
        )
        for name, rows in data.evaluation.items()
    }


def describe_steps(
    spec: DataSpec, updates: Updates, batches: TrainBatches, replicas: int, adapter: AdapterSpec | None = None
) -> None:
    """Say the size of a step and of the run as equations; warn of what is planned beyond the run's end."""
    info = batches.info(batches.at_hand)
    per_step = batches.micro_batches_per_step
    steps = batches.steps_per_epoch(batches.at_hand.epoch)
    log(
        f"a step:   {per_step} micro-batches ({spec.accumulation} accumulated × {replicas} replica(s)) "
        f"= {len(info.rows)} rows = {info.tokens:,} tokens"
    )
    limit = f", at most {spec.max_steps} steps" if spec.max_steps else ""
    length = f"{spec.epochs} epoch(s) of {steps} steps{limit}" if spec.epochs else f"{spec.max_steps} steps (max_steps)"
    total = min(spec.max_steps or math.inf, (spec.epochs or math.inf) * steps)
    if (warmup := warmup_steps(updates.warmup, steps)) >= total:
        warn(
            f"warmup_steps: {warmup} steps of warmup in a run of {total:.0f}: the learning rate never reaches "
            f"optimizer.lr = {updates.optimizer.lr:g}; give fewer"
        )
    planned = adapter.by_peft.settings.get("total_step") if adapter and adapter.by_peft else None
    if planned is not None and planned > total:
        warn(
            f"peft.total_step = {planned} in a run of {total:.0f} steps: the budget of ranks is not what target_r says when it "
            f"ends; set peft.total_step = {total:.0f}"
        )
    log(f"the run:  {length}; warmup {updates.warmup:g}, then {updates.lr_shape} at lr {updates.optimizer.lr:g}")
