"""Takes a conversation and its template; says what of it the template leaves out, by rendering it with and without.

Many templates write an assistant's tool calls, a tool's answer or a system text as nothing: a model trained on that would
learn to answer with silence. That is refused. Lost reasoning and lost tool definitions are counted.
"""

from collections.abc import Iterator
from typing import Any

from pipeline.data.chat.template import Message, NotRendered, Template
from pipeline.data.chat.turns import Conversation, Refused

REASONING, TOOLS = "reasoning", "definitions of tools"


def check(conversation: Conversation, template: Template) -> list[str]:
    """What is left out and may be (REASONING, TOOLS). Refused for tool calls, tools' answers and system texts."""
    messages, tools = conversation.messages, conversation.tools
    lost: list[str] = []
    first = messages[0]
    says = first["role"] == "system" and (first.get("content") or "").strip()
    if says and not _differs(messages, messages[1:], tools, template):
        raise Refused("the template leaves out the system text", "set merge_system = true")
    for index, message in enumerate(messages):
        before, after = messages[:index], messages[: index + 1]
        lacking = {
            key: [*before, _without(message, key)] for key in ("tool_calls", "reasoning_content") if message.get(key)
        }
        silent = {key for key, other in lacking.items() if not _differs(after, other, tools, template)}
        if "tool_calls" in silent:
            raise Refused("the template leaves out tool calls", "give a chat_template that knows them")
        if message["role"] == "tool" and not _differs(after, before, tools, template):
            raise Refused("the template leaves out tools' answers", "give a chat_template that knows them")
        if index in conversation.trained and "reasoning_content" in silent and REASONING not in lost:
            lost.append(REASONING)
    if tools and not _differs(messages, messages, tools, template, without=None):
        lost.append(TOOLS)
    return lost


def spelled_out(message: Message, template: Template) -> Iterator[str]:
    """Special tokens that the message's own text holds as characters; encoded they would be control tokens."""
    for key in ("content", "reasoning_content"):
        yield from template.specials.pattern.findall(message.get(key) or "")


def trims(conversation: Conversation, texts: list[str]) -> bool:
    """Whether the template takes blanks off the outside of a trained answer. `texts`: the turns' replies."""
    answers = [conversation.messages[index].get("content") or "" for index in conversation.trained]
    pairs = zip(answers, texts, strict=True)
    return any(answer.strip() != answer and answer not in text and answer.strip() in text for answer, text in pairs)


def _without(message: Message, key: str) -> Message:
    return {name: value for name, value in message.items() if name != key}


_SAME: Any = object()


def _differs(one: list[Message], other: list[Message], tools: Any, template: Template, without: Any = _SAME) -> bool:
    """Whether the two render differently (one of them not at all also counts); `without`: the other's tools."""
    texts = []
    for messages, shown in ((one, tools), (other, tools if without is _SAME else without)):
        try:
            texts.append(template.render(messages, shown))
        except NotRendered as error:
            texts.append(f"\0{error}")
    return texts[0] != texts[1]
