"""Questions with options, listed under letters and asked in several orders: which letter does the model give?

Takes rows of files (a question, its options, the right one); gives units (units.py), one for each order. Options stand in
an order drawn from a hash of the row, and then in rotations of it, so that what always says the same letter is right as often
as chance, wherever the file has its right answers.
"""

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from pipeline.console import UserError
from pipeline.data.chat import encode
from pipeline.data.chat.template import NotRendered, Template
from pipeline.data.chat.turns import Refused, RowText, Turn
from pipeline.data.reading import records
from pipeline.data.reading.encodings import Findings
from pipeline.data.reading.json_rows import Broken
from pipeline.data.reading.sources import find
from pipeline.data.rows import tally
from pipeline.data.rows.tally import Tally
from pipeline.evaluation.units import Decode, Unit, digest, row_of

LETTERS = string.ascii_uppercase
PLAIN = "Answer:"
ASKED = "Answer with the letter of the right option alone."


class Question(NamedTuple):
    """Its text, its options and which of them is right."""

    text: str
    options: list[str]
    right: int


@dataclass(frozen=True)
class Asking:
    """How questions are read and put: the fields of a row, the orders, and how a text becomes ids.

    `template`: the question is a user's message, and the letter the answer; None: plain text, with `bos` before it if that is
    no None. `limit`: tokens of a row at most.
    """

    prompt: str
    choices: str
    answer: str
    permutations: int
    limit: int
    encoder: encode.Encoder
    decode: Decode
    bos: int | None
    template: Template | None

    def units(self, value: Any, place: str) -> list[Unit]:
        """The units of one row of a file. Refused where it is no question, or is longer than `limit`."""
        question = self.read(value)
        content = digest(question.text, *question.options)
        return [self._unit(question, order, content, place) for order in orders(content, question, self.permutations)]

    def read(self, value: Any) -> Question:
        """The question in a row: options as a list or as ARC's {"text": [...], "label": [...]}; the right one by its number
        from 0, its label, its letter or its text."""
        if not isinstance(value, dict):
            raise Refused("the row is no object")
        text, given, answer = (self._field(value, name) for name in (self.prompt, self.choices, self.answer))
        labels = list(LETTERS)
        if isinstance(given, dict) and isinstance(given.get("label"), list):
            labels, given = [str(label) for label in given["label"]], given.get("text")
        if not isinstance(text, str) or not text.strip():
            raise Refused(f"'{self.prompt}' is no text")
        if not isinstance(given, list) or not all(isinstance(option, str) and option.strip() for option in given):
            raise Refused(f"'{self.choices}' is no list of texts")
        options = [option.strip() for option in given]
        if not 2 <= len(options) <= len(LETTERS):
            raise Refused(f"it has {len(options)} options", f"2 to {len(LETTERS)} can be listed")
        if len(set(options)) < len(options):
            raise Refused("two of its options are the same")
        return Question(text.strip(), options, self._right(answer, options, labels))

    def _field(self, value: dict[str, Any], name: str) -> Any:
        if value.get(name) is None:
            raise Refused(f"there is no field '{name}'")
        return value[name]

    def _right(self, answer: Any, options: list[str], labels: list[str]) -> int:
        for known in (labels[: len(options)], options):
            if isinstance(answer, str) and answer.strip() in known:
                return known.index(answer.strip())
        if isinstance(answer, str) and answer.strip().isdigit():  # of a CSV, where everything is text
            answer = int(answer)
        if type(answer) is not int or not 0 <= answer < len(options):
            raise Refused(
                f"'{self.answer}' is none of its options", "give a number from 0, a letter or an option's text"
            )
        return answer

    def _unit(self, question: Question, order: tuple[int, ...], content: str, place: str) -> Unit:
        listed = "\n".join(
            f"{letter}. {question.options[option]}" for letter, option in zip(LETTERS, order, strict=False)
        )
        text = f"{question.text}\n{listed}\n"
        prompt, before = f"{text}{PLAIN}", " "
        if self.template is not None:
            try:
                prompt = self.template.render([{"role": "user", "content": f"{text}\n{ASKED}"}], prompt=True)
            except NotRendered as error:
                raise Refused(f"the template raises: {error}") from None
            before = ""
        texts = [[RowText((Turn(0, prompt, f"{before}{letter}"),))] for letter in LETTERS[: len(order)]]
        rows = []
        for (encoded,) in encode.encode(texts, self.encoder):
            head = [] if self.bos is None or self.template is not None else [self.bos]
            ids = [*head, *encoded.ids]
            if len(ids) > self.limit:
                raise Refused(f"longer than sequence_len = {self.limit:,}")
            spans = [(start + len(head), end + len(head)) for start, end in encoded.spans]
            if not any(start < end for start, end in spans):
                raise Refused("no token is the letter's alone", "give another chat_template")
            rows.append(row_of(ids, spans, self.decode))
        right = order.index(question.right)
        return Unit(digest(question.text), digest(content, order), place, tuple(rows), right, order=order)


def orders(content: str, question: Question, permutations: int) -> list[tuple[int, ...]]:
    """`permutations` orders of the options, or as many as there are options: in each the right one stands elsewhere."""
    n = len(question.options)
    drawn = np.random.default_rng(int(content, 16)).permutation(n).tolist()
    wanted = min(permutations, n)
    return [tuple(drawn[turn:] + drawn[:turn]) for turn in (place * n // wanted for place in range(wanted))]


def read(path: str, name: str, asking: Asking, most_bad: float) -> tuple[list[Unit], list[str]]:
    """The units of all rows in the files at `path`, and what became of these in words.

    `most_bad`: the part of the rows that may be no question. UserError where more are, or none is left.
    """
    met, findings, units = Tally(), Findings(), list[Unit]()
    for record in records.read(find("multiple_choice", path), findings):
        met.read += 1
        try:
            units += asking.units(_sound(record.value), record.where)
            met.kept += 1
        except Refused as refused:
            met.refuse(record.where, refused.reason, refused.detail)
    notes = met.lines(False)
    tally.check(name, met.read, met.bad, [line for line in notes if line.startswith("bad")], most_bad)
    if not units:
        raise UserError(f"dataset '{name}': none of its {met.read:,} rows is a question:\n  " + "\n  ".join(notes))
    return units, [f"{met.kept:,} of {met.read:,} questions", *notes]


def _sound(value: Any) -> Any:
    if isinstance(value, Broken):
        raise Refused(value.reason)
    return value


def chance(units: Sequence[Unit]) -> float:
    """The accuracy of whoever does not read the question."""
    return float(np.mean([1 / len(unit.rows) for unit in units]))


def bos_of(tokenizer: Any) -> int | None:
    """The id that this tokenizer puts before a text, if any."""
    begins: bool = tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
    return tokenizer.bos_token_id if begins else None
