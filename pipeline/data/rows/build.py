"""Takes a dataset of rows (chat, completion, pretokenized) and the tokenizer; gives its store, from the cache if it is there.

The cache is keyed by the content of the files, the tokenizer, the template and all settings but the day: a template that
prints the date has that of the day on which the cache was built, so that a run is the same tomorrow.
"""

import datetime
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from pipeline.console import UserError, gib, progress
from pipeline.data.chat import encode, load
from pipeline.data.chat.derive import Rules
from pipeline.data.chat.messages import Fields
from pipeline.data.chat.template import Template
from pipeline.data.chunks import special_ids
from pipeline.data.preparing import cache, workers
from pipeline.data.preparing.journal import Journal
from pipeline.data.reading.packed import text_bytes
from pipeline.data.reading.sources import Source, find
from pipeline.data.rows import tally
from pipeline.data.rows.makers import Chat, Completion, Maker, Pretokenized
from pipeline.data.rows.prepared import Prepared, RowWork, prepared
from pipeline.data.rows.store import RowWriter, UnequalRows
from pipeline.data.rows.tally import Tally
from pipeline.data.tokenizer import fingerprint

FORMAT = 2  # goes into the key: raise it when the same input would give other rows
PLAIN = "none"  # a chat_template: text as it is

Row = TypeVar("Row")
Kind = Literal["chat", "completion", "pretokenized"]


@dataclass(frozen=True)
class RowSpec:
    """A dataset of rows: what it is called, where it is, and all that decides what becomes of it.

    `chat_template`, `template_kwargs`: load.py. `fields`: how chat calls what its rows hold; `prompt`, `completion`: of a
    completion. `most_bad`: the part of the rows that may be bad.
    """

    name: str
    kind: Kind
    path: str
    rules: Rules
    fields: Fields = field(default_factory=Fields)
    prompt: str = "prompt"
    completion: str = "completion"
    chat_template: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    deduplicate: bool = False
    most_bad: float = 0.01


@dataclass(frozen=True)
class Recipe:
    """How rows of a dataset are made of what stands in its files. `stops`: ids at which the model stops beside the
    tokenizer's EOS. `template`: where there is one."""

    spec: RowSpec
    tokenizer: Any
    stops: list[int]
    template: Template | None

    @property
    def content(self) -> list[Any]:
        """All that decides the rows beside the files (JSON): the tokenizer, the template and all settings but the day."""
        beside = ("name", "path", "most_bad", "chat_template")
        settings = {key: value for key, value in asdict(self.spec).items() if key not in beside}
        source = self.template.source if self.template else self.spec.chat_template
        return [FORMAT, fingerprint(self.tokenizer), settings, source, sorted(self.stops)]

    @property
    def maker(self) -> Maker:
        """What makes the rows."""
        return maker(self.spec, self.tokenizer, self.template)


def recipe(spec: RowSpec, tokenizer: Any, stops: list[int], day: str | None = None) -> Recipe:
    """What makes the dataset's rows, on a `day` in ISO form (today). UserError: a tokenizer without EOS, no template in
    `chat_template`."""
    special_ids(tokenizer, spec.name)
    try:
        template = _template(spec, tokenizer, stops, day or datetime.date.today().isoformat())
    except UserError as error:
        raise UserError(f"dataset '{spec.name}': {error}") from None
    return Recipe(spec, tokenizer, stops, template)


def build(
    spec: RowSpec, tokenizer: Any, stops: list[int], cache_dir: Path, processes: int | None = None
) -> UnequalRows:
    """The rows of a dataset, made now or found in `cache_dir`. One process at a time builds, the others wait.

    A preparation that was killed goes on where it was. `processes`: how many make rows; None is one a core for large files.
    `stops`: ids at which the model stops beside the tokenizer's EOS. UserError: no files, a file that cannot be read, a
    template that is none, too many bad rows, no row left.
    """
    how = recipe(spec, tokenizer, stops)
    sources = find(spec.kind, spec.path)
    path = cache.folder(cache_dir, spec.name, sources, how.content)
    with cache.alone(path):
        if not path.exists():
            total = text_bytes(sources)
            with cache.whole(path, f"about {gib(4 * total)}") as staging:
                _prepare(path, staging, how, sources, total, processes)
            Journal(path).clear()
    store = UnequalRows(path)
    tally.check_report(store.report, spec.most_bad)
    return store


def _template(spec: RowSpec, tokenizer: Any, stops: list[int], day: str) -> Template | None:
    """The chat template, where there has to be one; looked at before any row is read."""
    if spec.kind == "pretokenized" or spec.chat_template == PLAIN:
        return None
    if spec.kind == "completion" and spec.chat_template is None and not tokenizer.chat_template:
        return None  # only rows of instructions need one
    template = load.template(tokenizer, stops, spec.chat_template, spec.template_kwargs, day)
    _ = template.end_of_turn
    return template


def maker(spec: RowSpec, tokenizer: Any, template: Template | None) -> Maker:
    """What makes rows of this dataset's."""
    if spec.kind == "pretokenized":
        return Pretokenized(spec.rules)
    encoder = encode.encoder(tokenizer)
    chat = Chat(spec.fields, template, encoder, spec.rules) if template else None
    if spec.kind == "chat" and chat is not None:
        return chat
    begins = tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
    return Completion(
        spec.prompt,
        spec.completion,
        spec.fields.allow_empty_answers,
        tokenizer.bos_token_id if begins else None,
        encoder,
        tokenizer.eos_token,
        (tokenizer.bos_token or "", tokenizer.eos_token),
        spec.rules,
        chat,
        plain=spec.chat_template == PLAIN,
    )


def _prepare(path: Path, staging: Path, how: Recipe, sources: list[Source], total: int, processes: int | None) -> None:
    """Make all rows, or take them from the journal of `path`, and write them into `staging`."""
    journal = Journal(path)
    with ExitStack() as clearing:
        clearing.callback(journal.let_go)
        advance = clearing.enter_context(progress(f"preparing {how.spec.name}", total))
        made = prepared(RowWork(how.maker), Prepared, sources, journal, workers.processes_for(total, processes))
        write(staging, how, counted(made, total, advance, lambda one: one.size))


def write(staging: Path, how: Recipe, made: Iterator[Prepared]) -> None:
    """Write the store of these rows into `staging`, with the report of what was met in them."""
    met, spec, tokenizer, template = Tally(), how.spec, how.tokenizer, how.template
    with ExitStack() as clearing:
        writer = RowWriter(staging, frozenset({tokenizer.eos_token_id, *how.stops}))
        clearing.callback(writer.let_go)
        seen: set[str] = set()
        for one in made:
            if is_new(one.digest, met, seen, spec.deduplicate):
                _add(writer, met, one)
        notes = met.lines(spec.deduplicate)
        if template and template.prints_the_date:
            notes.insert(0, f"the template prints the date: {template.day} in every row, the day of this preparation")
        ends = ends_beyond_stops(template) if writer.rows and spec.rules.train_on_eos != "none" else None
        warnings = list(_will_not_stop(spec.name, writer, ends))
        writer.close(
            name=spec.name,
            kind=spec.kind,
            bos=tokenizer.bos_token_id,
            eos=tokenizer.eos_token_id,
            **met.counts,
            notes=notes,
            ends=None if ends is None else int(tokenizer.convert_tokens_to_ids(ends)),
            specials=[
                id for id in sorted({*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}) if writer.holds(id)
            ],
            warnings=warnings,
        )


def is_new(digest: str | None, met: Tally, seen: set[str], deduplicate: bool) -> bool:
    """Whether a row of the files with this digest (None: it cannot be read) is taken, unless it was there before."""
    met.read += 1
    if digest is None or digest not in seen:
        seen.update([digest] if digest else [])
        return True
    met.duplicates += 1
    return not deduplicate


def _add(writer: RowWriter, met: Tally, one: Prepared) -> None:
    if one.refused is not None:
        met.refuse(one.where, *one.refused)
        return
    for ids, runs in one.rows:
        if runs:
            writer.add(ids, runs, met.kept, one.where)
        else:
            met.without_targets += 1
    met.kept += 1
    met.note(one.where, one.notes)


def ends_beyond_stops(template: Template | None) -> str | None:
    """The token with which the template ends a turn, where the model does not stop at it."""
    if template is None or not template.end_of_turn:
        return None
    last = [token[0] for token in template.specials.pattern.finditer(template.end_of_turn)][-1]
    return None if last in template.specials.stops else last


def _will_not_stop(name: str, writer: RowWriter, ends: str | None) -> Iterator[str]:
    """Why a model that is trained on these rows would go on for ever. `ends`: of turns, at which it does not stop."""
    if ends is not None:
        yield (
            f"dataset '{name}': the chat template ends a turn with '{ends}', at which the model does not stop: the fold adds its "
            f"id to eos_token_id in generation_config.json; whoever serves base and adapter apart has to give it as a stop token"
        )
        return
    if writer.rows and not writer.stops:
        yield (
            f"dataset '{name}': no token at which the model stops is trained: it will not learn to stop. Train the ends of turns "
            f"(train_on_eos), or end the answers with EOS"
        )


def counted(found: Iterator[Row], total: int, advance: Any, size: Callable[[Row], int]) -> Iterator[Row]:
    """The same rows; moves the bar by the `size` of each in characters, up to `total`, and to its end after the last."""
    done = 0
    for one in found:
        step = min(size(one), total - done)
        done += step
        advance(step)
        yield one
    advance(total - done)
