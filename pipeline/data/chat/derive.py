"""Takes conversations, the template and the tokenizer; gives finished rows, with all that is worth saying about them counted.

What puts the other files of this folder together: texts, what the template loses, token ids, rows that fit.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pipeline.data.chat import lost
from pipeline.data.chat.encode import Encoded, Encoder, Span, encode, joined
from pipeline.data.chat.fit import fit
from pipeline.data.chat.messages import as_system, with_strings
from pipeline.data.chat.template import NotRendered, Template
from pipeline.data.chat.turns import Conversation, Refused, RowText, remedy, rows

# What is counted, and how the report calls it after the number.
NOTES = {
    "split": "conversations became several rows, since the template rewrites history",
    "border": "rows were encoded in two pieces, since a token would straddle prompt and answer",
    "straddling": "rows leave a token untrained that straddles prompt and answer",
    "too_long": "rows were longer than sequence_len and left out",
    "shortened": "rows were longer than sequence_len and begin with a later turn",
    "special_text": "special tokens are spelled out in the messages' text",
    "trimmed": "conversations have blanks around an answer that the template takes off",
    "lost_reasoning": "conversations have reasoning that the template leaves out",
    "lost_tools": "conversations show tools that the template leaves out",
    "marks_blanks": "conversations where the template's own {% generation %} also marks blanks after a turn: left out",
    "marks_differ": "conversations where the template's own {% generation %} marks other text: not followed",
}


class Row(NamedTuple):
    """A finished row: ids, and runs of targets (start, end)."""

    ids: list[int]
    spans: list[Span]


@dataclass(frozen=True)
class Rules:
    """What becomes of a conversation: `limit` tokens a row, and the keys of a dataset by their names."""

    limit: int
    too_long: str = "drop"  # or truncate_left, error
    history: str = "split"  # or refuse
    train_on_eos: str = "turn"  # or last, none
    allow_special_text: bool = False


class Texts(NamedTuple):
    """A conversation as it was rendered, its rows as text, and what was counted."""

    conversation: Conversation
    rows: list[RowText]
    notes: Counter[str]


def texts(conversation: Conversation, template: Template, rules: Rules) -> Texts:
    """The rows' texts of one conversation. Refused if it cannot be trained on."""
    notes: Counter[str] = Counter()
    if not conversation.trained:
        raise Refused("no turn of it is trained")
    for message in conversation.messages:
        for token in lost.spelled_out(message, template):
            notes["special_text"] += 1
            if token in template.control and not rules.allow_special_text:
                raise Refused(f"its text holds {token}, which marks turns", "allow_special_text = true lets it pass")
    conversation = _taken(conversation, template)
    found = rows(conversation, template)
    if len(found) > 1:
        if rules.history == "refuse":
            raise Refused("the template rewrites its history", "history = 'split' makes a row of each turn")
        notes["split"] += 1
    for what in lost.check(conversation, template):
        notes["lost_reasoning" if what == lost.REASONING else "lost_tools"] += 1
    if lost.trims(conversation, [turn.reply for row in found for turn in row.turns]):
        notes["trimmed"] += 1
    notes.update(_compared(conversation, found, template))
    return Texts(conversation, found, notes)


class Result(NamedTuple):
    """A conversation's finished rows and all that was counted."""

    rows: list[Row]
    notes: Counter[str]


def encoded(batch: Sequence[Texts], template: Template, encoder: Encoder, rules: Rules) -> list[Result | Refused]:
    """For each conversation its rows and all that was counted, or why it is refused. Encoded together."""
    results: list[Result | Refused] = []
    for text, rows_of in zip(batch, encode([text.rows for text in batch], encoder), strict=True):
        if any(_opens_twice(row, template, encoder) for row in rows_of):
            results.append(
                Refused("its row begins with two BOS", "give another chat_template: one that writes BOS once")
            )
            continue
        notes = Counter(text.notes)
        notes["border" if encoder.in_pieces else "straddling"] += sum(row.border for row in rows_of)
        fitted = fit(rows_of, text.conversation, template, encoder, rules.limit, rules.too_long)
        notes["too_long"] += fitted.dropped
        notes["shortened"] += fitted.shortened
        results.append(Result([finished(row, rules.train_on_eos) for row in fitted.rows], +notes))
    return results


def _taken(conversation: Conversation, template: Template) -> Conversation:
    """The conversation in the form that the template takes: arguments as text, a developer's turn as the system's."""
    candidates = [conversation]
    if any("tool_calls" in message for message in conversation.messages):
        candidates.append(with_strings(conversation))
    if any(message["role"] == "developer" for message in conversation.messages):
        candidates += [as_system(candidate) for candidate in candidates]
    words = ""
    for candidate in candidates:
        try:
            template.render(candidate.messages, candidate.tools)
            return candidate
        except NotRendered as error:
            words = words or str(error)
    index = conversation.trained[-1]
    raise Refused(f"the template raises: {words}", remedy(conversation.messages, conversation.tools, index, template))


def _compared(conversation: Conversation, found: list[RowText], template: Template) -> Counter[str]:
    """What the template's own {% generation %} blocks say otherwise; nothing where it has none."""
    notes: Counter[str] = Counter()
    last = found[-1].turns[-1]
    try:
        blocks = template.generation_blocks(conversation.messages[: last.index + 1], conversation.tools)
    except NotRendered:
        blocks = None
    if blocks is None or len(found) > 1:
        return notes
    text = template.render(conversation.messages[: last.index + 1], conversation.tools)
    by_start = dict(blocks)
    for turn in found[0].turns:
        begin, end = len(turn.prompt), len(turn.prompt) + len(turn.reply)
        marked = by_start.get(begin)
        if marked is None or marked < end or text[end:marked].strip():
            return Counter({"marks_differ": 1})
        if marked > end:
            notes["marks_blanks"] = 1
    return notes


def _opens_twice(row: Encoded, template: Template, encoder: Encoder) -> bool:
    bos = template.variables.get("bos_token")
    return bool(bos) and len(row.ids) > 1 and row.ids[0] == row.ids[1] == encoder.backend.token_to_id(str(bos))


def finished(row: Encoded, train_on_eos: str) -> Row:
    """The row's ids and runs of targets, without the ends of turns that are not trained."""
    spans = [
        (start, end)
        if train_on_eos == "turn" or (train_on_eos == "last" and place == len(row.spans) - 1)
        else (start, stop)
        for place, ((start, end), stop) in enumerate(zip(row.spans, row.ends, strict=True))
    ]
    return Row(row.ids, joined([(max(start, 1), end) for start, end in spans]))
