"""Takes encoded rows of a conversation and the longest row allowed; gives rows that fit. No answer is ever cut.

'drop' leaves a row that is too long out. 'truncate_left' ends it after the last turn that fits and begins again for the
next turn with the oldest turns left out of its history, the system text kept. 'error' refuses the dataset.
"""

from collections.abc import Sequence
from typing import NamedTuple

from pipeline.console import UserError
from pipeline.data.chat.encode import Encoded, Encoder, encode
from pipeline.data.chat.template import Template
from pipeline.data.chat.turns import Conversation, Refused, rows

POLICIES = ("drop", "truncate_left", "error")


def too_long(length: int, limit: int) -> UserError:
    """What too_long = 'error' says."""
    return UserError(
        f"a row has {length:,} tokens, more than sequence_len = {limit:,}: raise sequence_len, or set too_long = 'drop' "
        f"or 'truncate_left'"
    )


class Fitted(NamedTuple):
    """Rows of at most so many tokens; how many were too long and are left out, how many were shortened."""

    rows: list[Encoded]
    dropped: int = 0
    shortened: int = 0


def fit(
    encoded: Sequence[Encoded],
    conversation: Conversation,
    template: Template,
    encoder: Encoder,
    limit: int,
    policy: str,
) -> Fitted:
    """The rows that fit in `limit` tokens, by `policy`. UserError for a longer one with 'error'."""
    kept: list[Encoded] = []
    dropped = shortened = 0
    for row in encoded:
        if len(row.ids) <= limit:
            kept.append(row)
        elif policy == "error":
            raise too_long(len(row.ids), limit)
        elif policy == "truncate_left" and (parts := _shortened(row, conversation, template, encoder, limit)):
            kept += parts
            shortened += 1
        else:
            dropped += 1
    return Fitted(kept, dropped, shortened)


def _shortened(
    row: Encoded, conversation: Conversation, template: Template, encoder: Encoder, limit: int
) -> list[Encoded]:
    """The row's turns in rows that fit; turns that do not fit even with one question before them are left out."""
    fitting = sum(end <= limit for _, end in row.spans)
    parts = [_cut(row, fitting)] if fitting else []
    turns = [turn.index for turn in row.turns[fitting:]]
    while turns:
        found = _without_oldest(conversation._replace(trained=turns), template, encoder, limit)
        if found is not None:
            return parts + found
        turns = turns[1:]
    return parts


def _without_oldest(
    conversation: Conversation, template: Template, encoder: Encoder, limit: int
) -> list[Encoded] | None:
    """Rows of the trained turns, with as little left out before the first as makes it fit; None if nothing does."""
    messages, first = conversation.messages, conversation.trained[0]
    system = messages[:1] if messages[0]["role"] == "system" else []
    for begin in range(len(system) + 1, first):
        if messages[begin]["role"] != "user":
            continue
        left = [*system, *messages[begin:]]
        moved = begin - len(system)
        shorter = Conversation(left, conversation.tools, [index - moved for index in conversation.trained])
        try:
            encoded = encode([rows(shorter, template)], encoder)[0]
        except Refused:
            continue
        if encoded[0].spans[0][1] <= limit:
            return fit(encoded, shorter, template, encoder, limit, "truncate_left").rows
    return None


def _cut(row: Encoded, turns: int) -> Encoded:
    """The row, ending after its first `turns` turns."""
    end = row.spans[turns - 1][1]
    return Encoded(row.ids[:end], row.spans[:turns], row.ends[:turns], row.turns[:turns], row.border)
