"""Tables of an evaluation's [[datasets]] as units to score (units.py).

Takes the tables, the tokenizer and the model without weights; gives a `UnitSet` a table, or a UserError for rows that cannot be
read, are too many bad, or hold what the model does not know.
"""

import datetime
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from pipeline.config.evaluation import MULTIPLE_CHOICE, EvaluatedDataset
from pipeline.console import log, warn
from pipeline.data.chat import encode, load
from pipeline.data.chat.template import Template
from pipeline.data.rows.build import PLAIN
from pipeline.data.units.store import UnitRows
from pipeline.evaluation import multiple_choice
from pipeline.evaluation.units import Decode, UnitSet, subsampled, units_of_answers, units_of_rows
from pipeline.formats import base_model
from pipeline.generation import positions
from pipeline.training.data import fits as data_fits
from pipeline.training.data.read import Places, read_streams
from pipeline.training.data.specs import MOST_BAD


def read(
    tables: list[EvaluatedDataset], tokenizer: Any, folder: str, model: PreTrainedModel, cache: Path
) -> list[UnitSet]:
    """The units of every table, in order; says what became of the rows. `folder`: the model's."""
    rows = data_fits.embedding_rows(model)
    data_fits.check_tokenizer(tokenizer, folder, rows)
    stops = base_model.stop_ids(Path(folder))
    found = []
    for number, table in enumerate(tables):
        name = table.name or f"dataset{number}"
        if table.dataset_type == MULTIPLE_CHOICE:
            made = _questions(table, name, tokenizer, stops)
            data_fits.check_ids(name, max(max(row.ids) for row in made.rows), tokenizer, rows)
            what = f"dataset '{name}': its longest row's number of tokens, {made.longest:,},"
            positions.check(what, made.longest, model, lower=f"datasets.{number}.sequence_len")
        else:
            made = _rows(number, table, name, tokenizer, Places(stops, cache), model)
        log(
            f"data:     {name} ({table.role}): {len(made.units):,} units, {len({u.prompt for u in made.units}):,} prompts"
        )
        found.append(made)
    return found


def _rows(
    number: int,
    table: EvaluatedDataset,
    name: str,
    tokenizer: Any,
    places: Places,
    model: PreTrainedModel,
) -> UnitSet:
    store = read_streams(f"datasets.{number}", table, name, tokenizer, places, model).train
    if isinstance(store, UnitRows):
        kind: Any = store.kind
        return UnitSet(name, kind, table.role, subsampled(units_of_answers(store, _decode(tokenizer)), table.subsample))
    return UnitSet(name, "rows", table.role, subsampled(units_of_rows(store, _decode(tokenizer)), table.subsample))


def _questions(table: EvaluatedDataset, name: str, tokenizer: Any, stops: list[int]) -> UnitSet:
    template = _template(table, tokenizer, stops)
    asking = multiple_choice.Asking(
        table.field_prompt,
        table.field_choices,
        table.field_answer,
        table.permutations,
        table.sequence_len,
        encode.encoder(tokenizer),
        _decode(tokenizer),
        multiple_choice.bos_of(tokenizer),
        template,
    )
    most_bad = MOST_BAD if table.max_bad_rows is None else table.max_bad_rows
    units, notes = multiple_choice.read(table.dataset_path, name, asking, most_bad)
    put = "in the chat template" if template else "as plain text"
    log(f"data:     {name}: {notes[0]}, {put}; a guess is right {multiple_choice.chance(units):.1%} of the time")
    for note in notes[1:]:
        warn(f"dataset '{name}': {note}")
    return UnitSet(name, "multiple_choice", table.role, subsampled(units, table.subsample))


def _template(table: EvaluatedDataset, tokenizer: Any, stops: list[int]) -> Template | None:
    if table.chat_template == PLAIN or (table.chat_template is None and not tokenizer.chat_template):
        return None
    day = datetime.date.today().isoformat()  # for templates that print it
    return load.template(tokenizer, stops, table.chat_template, dict(table.chat_template_kwargs), day)


def _decode(tokenizer: Any) -> Decode:
    return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
