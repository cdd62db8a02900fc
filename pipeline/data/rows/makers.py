"""Takes rows as they stand in their files; gives rows of token ids with runs of targets, or why a row cannot be trained on.

A maker takes several rows together, as a tokenizer is faster so, and gives for each a `Result` or a `Refused`.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.console import UserError
from pipeline.data.chat import derive
from pipeline.data.chat.derive import Result, Row, Rules
from pipeline.data.chat.encode import Encoded, Encoder, encode, joined
from pipeline.data.chat.fit import too_long
from pipeline.data.chat.messages import Fields, conversation
from pipeline.data.chat.template import Template
from pipeline.data.chat.turns import Refused, RowText, Turn
from pipeline.data.row_store import IGNORED

Maker = Callable[[Sequence[Any]], list[Result | Refused]]


@dataclass(frozen=True)
class Chat:
    """Conversations, through a chat template."""

    fields: Fields
    template: Template
    encoder: Encoder
    rules: Rules

    def __call__(self, values: Sequence[Any]) -> list[Result | Refused]:
        rendered = [self._text(value) for value in values]
        sound = [text for text in rendered if not isinstance(text, Refused)]
        results = iter(derive.encoded(sound, self.template, self.encoder, self.rules))
        return [text if isinstance(text, Refused) else next(results) for text in rendered]

    def _text(self, value: Any) -> derive.Texts | Refused:
        try:
            return derive.texts(conversation(value, self.fields), self.template, self.rules)
        except Refused as refused:
            return refused


@dataclass(frozen=True)
class Completion:
    """A prompt and its completion, which is trained with EOS behind it; rows of instructions go through `chat`.

    `bos`: the id before each row, None for tokenizers that put none before a text. `plain`: instructions are a prompt and a
    completion as well.
    """

    prompt: str
    completion: str
    allow_empty: bool
    bos: int | None
    encoder: Encoder
    eos: str
    marks: tuple[str, ...]  # BOS and EOS as text, which would mark the row's ends
    rules: Rules
    chat: Chat | None
    plain: bool

    def __call__(self, values: Sequence[Any]) -> list[Result | Refused]:
        results: list[Result | Refused | None] = [None] * len(values)
        plain: list[tuple[int, RowText]] = []
        instructions: list[tuple[int, Any]] = []
        for place, value in enumerate(values):
            try:
                parts = self._parts(value)
            except Refused as refused:
                results[place] = refused
                continue
            if "messages" in parts:
                instructions.append((place, parts))
            else:
                turn = Turn(0, parts["prompt"], parts["completion"] + self.eos, len(self.eos))
                plain.append((place, RowText((turn,))))
        for (place, _), made in zip(plain, encode([[text] for _, text in plain], self.encoder), strict=True):
            results[place] = self._result(made)
        if instructions and self.chat is None:
            raise UserError(
                "a row has an instruction or messages, which go through a chat template, and the model's tokenizer has none: "
                "give one as chat_template, or 'none' for plain text"
            )
        if self.chat is not None:
            for (place, _), result in zip(instructions, self.chat([v for _, v in instructions]), strict=True):
                results[place] = result
        return [result for result in results if result is not None]

    def _parts(self, value: Any) -> dict[str, Any]:
        """The row's prompt and completion, or for `chat` its messages. Refused if there are none."""
        if not isinstance(value, dict):
            raise Refused("the row is no object")
        if self.prompt not in value and "instruction" in value:
            question = _text(value, "instruction")
            if value.get("input"):
                question = f"{question}\n\n{_text(value, 'input')}"
            answer = self._answer(value, "output")
            if self.plain:
                return {"prompt": f"{question}\n\n", "completion": answer}
            system = [{"role": "system", "content": value["system"]}] if value.get("system") else []
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            return {"messages": [*system, *turns]}
        if isinstance(value.get(self.prompt), list) or isinstance(value.get(self.completion), list):
            return self._turns(value)
        prompt, completion = _text(value, self.prompt), self._answer(value, self.completion)
        prompt, completion = prompt.removeprefix(self.marks[0]), completion.removesuffix(self.eos)
        for mark in self.marks if not self.rules.allow_special_text else ():
            if mark and mark in prompt + completion:
                raise Refused(
                    f"its text holds {mark}, which marks a row's end", "allow_special_text = true lets it pass"
                )
        return {"prompt": prompt, "completion": completion}

    def _turns(self, value: dict[str, Any]) -> dict[str, Any]:
        """A prompt and a completion that are messages, as TRL has them: of the prompt's nothing is trained."""
        if self.plain:
            raise Refused("its prompt or completion is a list of messages", "leave out chat_template = 'none'")
        parts = []
        for field, role in ((self.prompt, "user"), (self.completion, "assistant")):
            is_list = isinstance(value.get(field), list)
            parts.append(value[field] if is_list else [{"role": role, "content": _text(value, field)}])
        prompt, completion = parts
        untrained = [{**message, "weight": 0} if isinstance(message, dict) else message for message in prompt]
        if not untrained or not completion:
            raise Refused("its prompt or completion is an empty list")
        return {"messages": [*untrained, *completion], "tools": value.get("tools")}

    def _answer(self, value: dict[str, Any], field: str) -> str:
        text = _text(value, field)
        if not text and not self.allow_empty:
            raise Refused("empty answer", "allow_empty_answers = true lets it pass")
        return text

    def _result(self, encoded: list[Encoded]) -> Result:
        notes: Counter[str] = Counter()
        rows: list[Row] = []
        for row in encoded:
            whole = row if self.bos is None else _after(self.bos, row)
            notes["border" if self.encoder.in_pieces else "straddling"] += row.border
            rows += self._fitted(derive.finished(whole, self.rules.train_on_eos), notes)
        return Result(rows, +notes)

    def _fitted(self, row: Row, notes: Counter[str]) -> list[Row]:
        """The row if it is short enough, without the beginning of its prompt if that may be; nothing otherwise."""
        limit, head = self.rules.limit, [] if self.bos is None else [self.bos]
        over = len(row.ids) - limit
        if over <= 0:
            return [row]
        if self.rules.too_long == "error":
            raise too_long(len(row.ids), limit)
        if self.rules.too_long == "truncate_left" and row.spans and row.spans[0][0] - over > len(head):
            notes["shortened"] += 1
            ids = head + row.ids[len(head) + over :]
            return [Row(ids, [(start - over, end - over) for start, end in row.spans])]
        notes["too_long"] += 1
        return []


@dataclass(frozen=True)
class Pretokenized:
    """Rows of ids as they are, trained where `labels` are not −100; without labels from the second token on."""

    rules: Rules

    def __call__(self, values: Sequence[Any]) -> list[Result | Refused]:
        results: list[Result | Refused] = []
        for value in values:
            try:
                results.append(self._result(value))
            except Refused as refused:
                results.append(refused)
        return results

    def _result(self, value: Any) -> Result:
        if not isinstance(value, dict):
            raise Refused("the row is no object")
        ids = _integers(value, "input_ids")
        if not ids or min(ids) < 0:
            raise Refused("input_ids is empty" if not ids else "input_ids has a number below 0")
        if value.get("attention_mask") is not None and any(one != 1 for one in _integers(value, "attention_mask")):
            raise Refused("attention_mask is not all ones", "leave padding out of input_ids")
        labels = _integers(value, "labels") if value.get("labels") is not None else ids
        if len(labels) != len(ids):
            raise Refused("labels has another length than input_ids")
        if any(label not in (IGNORED, id) for label, id in zip(labels, ids, strict=True)):
            raise Refused(
                "labels has a token that is not input_ids' at its place",
                "labels are not shifted: −100 or the id itself",
            )
        if len(ids) > self.rules.limit:
            if self.rules.too_long == "error":
                raise too_long(len(ids), self.rules.limit)
            return Result([], Counter(too_long=1))
        return Result([Row(ids, joined([(i, i + 1) for i in range(1, len(ids)) if labels[i] != IGNORED]))], Counter())


def _after(first: int, row: Encoded) -> Encoded:
    """The row with the id `first` before it."""
    spans = [(start + 1, end + 1) for start, end in row.spans]
    return row._replace(ids=[first, *row.ids], spans=spans, ends=[end + 1 for end in row.ends])


def _text(value: dict[str, Any], field: str) -> str:
    if field not in value:
        raise Refused(f"there is no field '{field}'")
    if not isinstance(value[field], str):
        raise Refused(f"'{field}' is null" if value[field] is None else f"'{field}' is no text")
    return str(value[field])


def _integers(value: dict[str, Any], field: str) -> list[int]:
    found = value.get(field)
    if not isinstance(found, list) or not all(type(id) is int for id in found):
        raise Refused(f"{field} is no list of whole numbers")
    if any(id >= 2**31 for id in found):
        raise Refused(f"{field} has a number that is no token's")
    return found
