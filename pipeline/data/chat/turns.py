"""Takes a conversation and its template; gives the texts of rows, and where in each the trained turns are.

A token is trained exactly if a server that holds the messages before a turn, rendered with a generation prompt, would
have to sample it: from the end of that prompt to the end of the turn. So for a turn at message i

    prompt = render(messages[:i], prompt)       reply = what render(messages[: i + 1]) writes after it, to the end of turn

Turns share a row while the next prompt begins with the prompt and the reply before it. Where a template rewrites history
(leaves out earlier thinking, say), a new row begins, with the history a server would show.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pipeline.data.chat.template import Message, NotRendered, Template


class Refused(Exception):
    """A conversation that cannot be trained on as it is: the reason, as it is counted, and what would mend it."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class Conversation(NamedTuple):
    """Messages in order, the tools shown with them, and which messages are trained (assistants' only)."""

    messages: list[Message]
    tools: list[Any] | None
    trained: list[int]


@dataclass(frozen=True)
class Turn:
    """A trained turn at message `index`; `end` of `reply`'s characters are the end of turn."""

    index: int
    prompt: str
    reply: str
    end: int = 0


@dataclass(frozen=True)
class RowText:
    """A row: what is encoded is the last turn's prompt and reply, in which the others' are."""

    turns: tuple[Turn, ...]

    @property
    def text(self) -> str:
        """The row's characters, cut after the last target."""
        return self.turns[-1].prompt + self.turns[-1].reply


def rows(conversation: Conversation, template: Template) -> list[RowText]:
    """The conversation's rows, in order; every trained turn is in one. Refused where the template cannot say a turn."""
    rows: list[list[Turn]] = []
    for turn in turns(conversation, template):
        before = rows[-1][-1] if rows else None
        if before is None or not turn.prompt.startswith(before.prompt + before.reply):
            rows.append([])
        rows[-1].append(turn)
    return [RowText(tuple(row)) for row in rows]


def turns(conversation: Conversation, template: Template) -> Iterator[Turn]:
    """Each trained turn, in order."""
    for index in conversation.trained:
        turn = of_message(conversation.messages, conversation.tools, index, template)
        if not template.end_of_turn:
            turn = _closed(turn, conversation, template)
        yield turn


def of_message(messages: Sequence[Message], tools: Any, index: int, template: Template) -> Turn:
    """The turn at message `index`, which is an assistant's. Refused if the template cannot say it."""
    try:
        prompt = template.render(messages[:index], tools, prompt=True)
        full = template.render(messages[: index + 1], tools)
    except NotRendered as error:
        raise Refused(f"the template raises: {error}", remedy(messages, tools, index, template)) from None
    if not full.startswith(prompt):
        detail = remedy(messages, tools, index, template)
        raise Refused("the template does not write this turn after its own prompt for it", detail)
    text = full[len(prompt) :]
    reply = text[: _end_of_reply(text, bool(messages[index].get("tool_calls")), template)]
    if not reply and template.end_of_turn:
        raise Refused(
            "the template writes nothing for a turn of the assistant", "leave the turn out; its text is blank"
        )
    return Turn(index, prompt, reply, _end_length(reply, template))


def whole(messages: Sequence[Message], template: Template) -> tuple[str, int]:
    """The messages to the end of the last one's turn, whatever their prompt is written like; how many of the last characters are
    that end. Refused if the template cannot say it."""
    try:
        full = template.render(messages)
    except NotRendered as error:
        raise Refused(f"the template raises: {error}") from None
    text = full[: _end_of_reply(full, bool(messages[-1].get("tool_calls")), template)]
    return text, _end_length(text, template)


def _end_of_reply(text: str, calls_tools: bool, template: Template) -> int:
    """Where the end of turn ends in what follows a prompt; a turn that calls tools may have an end of its own."""
    tail, end = template.tail, template.end_of_turn
    if text.endswith(tail):
        return len(text) - len(tail) + len(end)
    found = list(template.specials.pattern.finditer(text))
    if found and (calls_tools or end):
        return found[-1].end()
    return len(text)


def _end_length(reply: str, template: Template) -> int:
    """How many of the reply's last characters are its end of turn."""
    if template.end_of_turn and reply.endswith(template.end_of_turn):
        return len(template.end_of_turn)
    found = [token for token in template.specials.pattern.finditer(reply) if token.end() == len(reply)]
    return len(found[-1][0]) if found else 0


def _closed(turn: Turn, conversation: Conversation, template: Template) -> Turn:
    """A turn of a template without an end of turn: what stops it is the header that follows, else EOS."""
    if turn.end and turn.reply[-turn.end :] in template.specials.stops:
        return turn
    end = _next_header(turn, conversation, template) or template.specials.eos
    return Turn(turn.index, turn.prompt, turn.reply + end, len(end))


def _next_header(turn: Turn, conversation: Conversation, template: Template) -> str:
    """The stop with which the next message begins, if it follows the turn as it stands; '' otherwise."""
    messages, after = conversation.messages, turn.index + 1
    if after == len(messages):
        return ""
    try:
        text = template.render(messages[: after + 1], conversation.tools)
    except NotRendered:
        return ""
    held = turn.prompt + turn.reply
    stop = template.specials.stop.match(text, len(held)) if text.startswith(held) else None
    return stop[0] if stop else ""


def remedy(messages: Sequence[Message], tools: Any, index: int, template: Template) -> str:
    """What would make the template say the turn, tried out where it can be; ends a message."""
    if messages[0]["role"] == "system" and _works(merged_system(messages), tools, index - 1, template):
        return "merge_system = true puts the system text before the first question"
    off = {"enable_thinking": False}
    if "enable_thinking" in template.source and template.kwargs.get("enable_thinking") is not False:
        other = Template(
            template.source, template.specials, template.variables, {**template.kwargs, **off}, template.day
        )
        if _works(messages, tools, index, other):
            return "chat_template_kwargs = { enable_thinking = false } makes it do so"
    if messages[index - 1]["role"] == "assistant" or (
        messages[index].get("content") and messages[index].get("tool_calls")
    ):
        return "join turns of the assistant that follow each other, or set train_on = 'last'"
    return "give another chat_template, one that renders the same history with and without the answer behind it"


def _works(messages: Sequence[Message], tools: Any, index: int, template: Template) -> bool:
    try:
        full = template.render(messages[: index + 1], tools)
        return full.startswith(template.render(messages[:index], tools, prompt=True))
    except NotRendered:
        return False


def merged_system(messages: Sequence[Message]) -> list[Message]:
    """The system text, a blank line and the first question as one message of the user's; other messages as they are."""
    if len(messages) < 2 or messages[0]["role"] != "system" or messages[1]["role"] != "user":
        return list(messages)
    text = f"{messages[0]['content']}\n\n{messages[1]['content']}"
    return [{**messages[1], "content": text}, *messages[2:]]
