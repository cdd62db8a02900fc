"""Takes units as texts or messages; gives each answer's row of token ids, and where in it the answer begins.

Rows are encoded whole. The answer begins where the ids of a row part from those of the prompt alone: TRL's rule, with one
beginning for all rows of a unit. Where that is before the prompt's end (a token straddles the two, or the template writes a
prompt otherwise when an answer follows), the unit says so. Rows that are too long lose their end, as in TRL.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pipeline.console import UserError
from pipeline.data.chat.encode import Encoder
from pipeline.data.chat.lost import spelled_out
from pipeline.data.chat.template import NotRendered, Template
from pipeline.data.chat.turns import Refused, of_message, whole
from pipeline.data.units.formats import Unit

# What is counted of units, and how the report calls it after the number.
NOTES = {
    "straddling": "have a token that straddles prompt and answer: their answers begin before it",
    "fills": "have a prompt that alone fills sequence_len: left out",
    "too_long": "are longer than sequence_len: left out",
    "shortened": "have an answer that is longer than sequence_len and cut there, without its end",
    "empty": "have an empty answer: left out",
    "same": "have two answers that are the same: left out",
    "prefix": "have an answer that is the beginning of the other",
    "alone": "have no other prompt whose answer could stand beside them: left out",
}


class Rows(NamedTuple):
    """A unit's rows: ids of each, the place where all answers begin, which were cut, and which prompt it is of."""

    ids: list[list[int]]
    start: int
    cut: list[bool]
    desirable: bool
    prompt: str
    straddles: str = ""  # the row's text, where a token does


@dataclass(frozen=True)
class Texts:
    """Texts of a unit: the prompt, and each row, which in a chat template need not begin with it."""

    prompt: str
    rows: list[str]
    chat: bool


@dataclass(frozen=True)
class UnitEncoder:
    """`bos`: the id before plain texts, None for a tokenizer that puts none. `limit`: tokens a row. `keep_start`: rows that are
    longer are cut, else left out."""

    encoder: Encoder
    template: Template | None
    bos: int | None
    bos_text: str
    eos: str
    limit: int
    keep_start: bool
    allow_special_text: bool

    def __call__(self, units: Sequence[Unit]) -> list[tuple[Rows | None, Counter[str]] | Refused]:
        """For each unit its rows and what was met, None where it is left out; or why it is refused. Encoded together."""
        found = [self._texts(unit) for unit in units]
        flat = [text for one in found if isinstance(one, Texts) for text in (one.prompt, *one.rows)]
        encoded = iter(self.encoder(flat))
        results: list[tuple[Rows | None, Counter[str]] | Refused] = []
        for unit, one in zip(units, found, strict=True):
            if isinstance(one, Texts):
                ids = [next(encoded).ids for _ in range(1 + len(one.rows))]
                results.append(self._rows(unit, one, ids[0], ids[1:]))
            else:
                results.append(one)
        return results

    def _texts(self, unit: Unit) -> Texts | Refused | tuple[None, Counter[str]]:
        contents = [answer if isinstance(answer, str) else answer.get("content") for answer in unit.answers]
        if not all(
            content or (isinstance(answer, dict) and answer.get("tool_calls"))
            for content, answer in zip(contents, unit.answers, strict=True)
        ):
            return None, Counter(empty=1)
        try:
            return self._plain(unit) if isinstance(unit.prompt, str) else self._chat(unit)
        except Refused as refused:
            return refused

    def _plain(self, unit: Unit) -> Texts:
        prompt = str(unit.prompt).removeprefix(self.bos_text)
        answers = [str(answer).removesuffix(self.eos) for answer in unit.answers]
        for mark in (self.bos_text, self.eos) if not self.allow_special_text else ():
            if mark and any(mark in text for text in (prompt, *answers)):
                raise Refused(
                    f"its text holds {mark}, which marks a row's end", "allow_special_text = true lets it pass"
                )
        return Texts(prompt, [prompt + answer + self.eos for answer in answers], chat=False)

    def _chat(self, unit: Unit) -> Texts:
        template = self.template
        if template is None:
            raise UserError(
                "a row has messages, which go through a chat template, and there is none: the model's tokenizer has no template, "
                "or chat_template = 'none'; give one as chat_template"
            )
        prompts, rows = [], []
        for answer in unit.answers:
            messages: list[Any] = [*unit.prompt, answer]
            for message in messages if not self.allow_special_text else ():
                for token in spelled_out(message, template):
                    if token in template.control:
                        raise Refused(
                            f"its text holds {token}, which marks turns", "allow_special_text = true lets it pass"
                        )
            prompt, row = _rendered(messages, template)
            prompts.append(prompt)
            rows.append(row)
        return Texts(prompts[0], rows, chat=True)

    def _rows(
        self, unit: Unit, texts: Texts, prompt: list[int], rows: list[list[int]]
    ) -> tuple[Rows | None, Counter[str]] | Refused:
        head = [self.bos] if self.bos is not None and not texts.chat else []
        prompt, rows = head + prompt, [head + row for row in rows]
        bos = self.encoder.backend.token_to_id(self.bos_text) if self.bos_text else None
        if bos is not None and any(row[:2] == [bos, bos] for row in rows):
            return Refused("its row begins with two BOS", "give another chat_template: one that writes BOS once")
        start = min(_common(prompt, row) for row in rows)
        notes: Counter[str] = Counter(straddling=int(start < len(prompt)))
        start = max(start, 1)  # nothing predicts a row's first token
        if start >= self.limit:
            return None, Counter(fills=1)
        cut = [len(row) > self.limit for row in rows]
        if any(cut) and not self.keep_start:
            return None, Counter(too_long=1)
        notes["shortened"] += any(cut)
        rows = [row[: self.limit] for row in rows]
        if any(len(row) <= start for row in rows):
            return None, Counter(empty=1)
        if len({tuple(row) for row in rows}) < len(rows):
            return None, Counter(same=1)
        notes["prefix"] += len(rows) == 2 and _common(*(row[:-1] for row in rows)) == min(map(len, rows)) - 1
        straddles = texts.rows[0] if notes["straddling"] else ""
        key = texts.prompt if texts.chat else str(unit.prompt)
        return Rows(rows, start, cut, unit.desirable, key, straddles), +notes


def _rendered(messages: list[Any], template: Template) -> tuple[str, str]:
    """(prompt, row to the end of its last turn); where a template does not write the turn after its own prompt for it, both as
    it writes them, to be compared as ids."""
    try:
        turn = of_message(messages, None, len(messages) - 1, template)
        prompt, row, end = turn.prompt, turn.prompt + turn.reply, turn.end
    except Refused:
        try:
            prompt = template.render(messages[:-1], prompt=True)
        except NotRendered as error:
            raise Refused(f"the template raises: {error}") from None
        row, end = whole(messages, template)
    return prompt, row + ("" if end or template.end_of_turn else template.specials.eos)


def _common(first: list[int], second: list[int]) -> int:
    """How many ids two rows begin with alike."""
    for place, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return place
    return min(len(first), len(second))
