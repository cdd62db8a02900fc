"""Takes a dataset of units (preference, unpaired, ranked) and the tokenizer; gives its store, from the cache if it is there."""

import datetime
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.console import UserError, gib, progress
from pipeline.data.chat import encode as chat_encode
from pipeline.data.chat import load
from pipeline.data.chat.template import Template
from pipeline.data.chunks import special_ids
from pipeline.data.preparing import cache, workers
from pipeline.data.preparing.journal import Journal
from pipeline.data.reading import records
from pipeline.data.reading.encodings import Findings
from pipeline.data.reading.packed import text_bytes
from pipeline.data.reading.sources import Source, find
from pipeline.data.rows import tally
from pipeline.data.rows.build import PLAIN, counted, ends_beyond_stops, is_new
from pipeline.data.rows.prepared import of_records, prepared
from pipeline.data.rows.tally import Tally
from pipeline.data.tokenizer import fingerprint
from pipeline.data.units.encode import NOTES, Rows, UnitEncoder
from pipeline.data.units.formats import Kind, Names
from pipeline.data.units.prepared import PreparedUnits, UnitWork
from pipeline.data.units.scored import Grouped, by_prompt
from pipeline.data.units.store import UnitRows, UnitWriter
from pipeline.foreign import printable

FORMAT = 2  # goes into the key: raise it when the same input would give other units
MANY_STRADDLE = 0.2  # of the units: then it is a warning


@dataclass(frozen=True)
class UnitSpec:
    """A dataset of units: what it is called, where it is, and all that decides what becomes of it.

    `limit`: tokens a row; longer ones are cut (`keep_start`) or left out. `ranks`: answers of a ranked unit. `score_weights`: a
    field → its weight in the score by which answers of a prompt become units.
    """

    name: str
    kind: Kind
    path: str
    limit: int
    keep_start: bool = True
    names: Names = field(default_factory=Names)
    ranks: int = 2
    score_weights: Mapping[str, float] = field(default_factory=dict)
    chat_template: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    allow_special_text: bool = False
    deduplicate: bool = False
    most_bad: float = 0.01


def build(spec: UnitSpec, tokenizer: Any, stops: list[int], cache_dir: Path, processes: int | None = None) -> UnitRows:
    """The units of a dataset, made now or found in `cache_dir`. One process at a time builds, the others wait.

    A preparation that was killed goes on where it was, but for scored answers, which are read to the end before any is made into
    a unit. `processes`: how many make units; None is one a core for large files.
    `stops`: ids at which the model stops beside the tokenizer's EOS. UserError: no files, a file that cannot be read, a
    template that is none, too many bad rows, no unit left.
    """
    special_ids(tokenizer, spec.name)
    sources = find(spec.kind, spec.path)
    try:
        template = _template(spec, tokenizer, stops)
    except UserError as error:
        raise UserError(f"dataset '{spec.name}': {error}") from None
    settings = {
        key: value for key, value in asdict(spec).items() if key not in ("name", "path", "most_bad", "chat_template")
    }
    source = template.source if template else spec.chat_template
    path = cache.folder(
        cache_dir, spec.name, sources, [FORMAT, fingerprint(tokenizer), settings, source, sorted(stops)]
    )
    with cache.alone(path):
        if not path.exists():
            total = text_bytes(sources)
            with cache.whole(path, f"about {gib(3 * total)}") as staging:
                _prepare(path, staging, spec, sources, tokenizer, template, stops, total, processes)
            Journal(path).clear()
    store = UnitRows(path)
    tally.check_report(store.report, spec.most_bad)
    return store


def _template(spec: UnitSpec, tokenizer: Any, stops: list[int]) -> Template | None:
    """The chat template; None where there is none, which only rows of messages need."""
    if spec.chat_template == PLAIN or (spec.chat_template is None and not tokenizer.chat_template):
        return None
    day = datetime.date.today().isoformat()
    template = load.template(tokenizer, stops, spec.chat_template, spec.template_kwargs, day)
    _ = template.end_of_turn
    return template


def unit_encoder(spec: UnitSpec, tokenizer: Any, template: Template | None) -> UnitEncoder:
    """What makes rows of this dataset's units."""
    begins = tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
    return UnitEncoder(
        chat_encode.encoder(tokenizer),
        template,
        tokenizer.bos_token_id if begins else None,
        tokenizer.bos_token or "",
        tokenizer.eos_token,
        spec.limit,
        spec.keep_start,
        spec.allow_special_text,
    )


def _prepare(
    path: Path,
    staging: Path,
    spec: UnitSpec,
    sources: list[Source],
    tokenizer: Any,
    template: Template | None,
    stops: list[int],
    total: int,
    processes: int | None,
) -> None:
    """Make all units, or take them from the journal of `path`, and write them into `staging`."""
    work = UnitWork(spec.kind, spec.names, spec.ranks, unit_encoder(spec, tokenizer, template))
    count, journal, grouped = workers.processes_for(total, processes), Journal(path), Grouped()
    with ExitStack() as clearing:
        clearing.callback(journal.let_go)
        advance = clearing.enter_context(progress(f"preparing {spec.name}", total))
        if spec.score_weights:
            read = counted(records.read(sources, Findings()), total, advance, lambda one: len(str(one.value)))
            found = by_prompt(read, spec.kind, spec.names, spec.score_weights, spec.ranks, grouped)
            made = of_records(work, found, count)
        else:
            made = prepared(work, PreparedUnits, sources, journal, count)
            made = counted(made, total, advance, lambda one: one.size)
        _write(staging, spec, made, grouped, tokenizer, template, stops)


def _write(
    staging: Path,
    spec: UnitSpec,
    made: Iterator[PreparedUnits],
    grouped: Grouped,
    tokenizer: Any,
    template: Template | None,
    stops: list[int],
) -> None:
    """Write the units into `staging`, with the report of what was met. `grouped`: of scored answers, once they are read."""
    met, straddling = Tally(words=NOTES), list[str]()
    with ExitStack() as clearing:
        writer = UnitWriter(staging, frozenset({tokenizer.eos_token_id, *stops}))
        clearing.callback(writer.let_go)
        rows = _rows(made, met, spec.deduplicate)
        for place, unit in _with_mismatched(rows, spec.limit, met) if spec.kind == "unpaired" else rows:
            writer.add(unit, place)
            if unit.straddles:
                straddling = straddling or [place, unit.straddles]
        notes = ([str(grouped)] if spec.score_weights else []) + met.lines(spec.deduplicate)
        notes.insert(0, f"{writer.units:,} units ({spec.kind}) of {writer.prompts:,} prompts")
        if template and template.prints_the_date:
            notes.insert(0, f"the template prints the date: {template.day} in every row, the day of this preparation")
        end = ends_beyond_stops(template)
        end_id = None if end is None else int(tokenizer.convert_tokens_to_ids(end))
        writer.close(
            name=spec.name,
            kind=spec.kind,
            bos=tokenizer.bos_token_id,
            eos=tokenizer.eos_token_id,
            **met.counts,
            notes=notes,
            ends=end_id if end_id is not None and writer.rows.holds(end_id) else None,
            warnings=_warnings(spec.name, writer.units, met, straddling),
        )


def _warnings(name: str, units: int, met: Tally, straddling: list[str]) -> list[str]:
    count = met.notes.get("straddling", (0, ""))[0]
    if not straddling or count <= MANY_STRADDLE * units:
        return []
    return [
        f"dataset '{name}': in {count:,} of {units:,} units a token straddles prompt and answer, so that what is trained begins "
        f"before the answer, with another token than a server would have: let the answer begin with the space, not the prompt "
        f"end with it. {straddling[0]}: {printable(repr(straddling[1]), 120)}"
    ]


def _rows(made: Iterator[PreparedUnits], met: Tally, deduplicate: bool) -> Iterator[tuple[str, Rows]]:
    """(place in the files, unit) of all; counts what is wrong with the others."""
    seen: set[str] = set()
    for one in made:
        if not is_new(one.digest, met, seen, deduplicate):
            continue
        for reason, remedy in one.refused:
            met.refuse(one.where, reason, remedy)
        met.note(one.where, dict(one.notes))
        yield from ((one.where, unit) for unit in one.units)


def _with_mismatched(rows: Iterator[tuple[str, Rows]], limit: int, met: Tally) -> Iterator[tuple[str, Rows]]:
    """Each answer's unit with a second row: its prompt and the answer to another one, the last that came before it (after it,
    of the first prompt). KTO's z is taken of these."""
    waiting: list[tuple[str, Rows]] = []
    last: Rows | None = None
    other: Rows | None = None  # the last whose prompt is not `last`'s
    for place, unit in rows:
        if last is not None and last.prompt != unit.prompt:
            other = last
        last = unit
        if other is None:
            waiting.append((place, unit))
            continue
        yield from ((at, _beside(one, unit, limit)) for at, one in waiting)
        waiting = []
        yield place, _beside(unit, other, limit)
    for place, _ in waiting:
        met.note(place, Counter(alone=1))


def _beside(unit: Rows, other: Rows, limit: int) -> Rows:
    mismatched = [*unit.ids[0][: unit.start], *other.ids[0][other.start :]]
    return unit._replace(ids=[unit.ids[0], mismatched[:limit]], cut=[unit.cut[0], len(mismatched) > limit])
