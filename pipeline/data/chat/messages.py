"""Takes a dataset's row as it stands in its file; gives a `Conversation`, or says what is wrong with the row.

Names of fields and roles are axolotl's: `messages` with `role` and `content`, or ShareGPT's `conversations` with `from` and
`value`, found by itself. Nothing is made up: a content that is no text is a bad row, never its `str()`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.data.chat.template import Message
from pipeline.data.chat.turns import Conversation, Refused, merged_system
from pipeline.foreign import printable

ROLES = {
    "user": ("user", "human"),
    "assistant": ("assistant", "gpt", "model", "chatbot", "bot", "ai"),
    "system": ("system",),
    "developer": ("developer",),
    "tool": ("tool", "function", "observation", "ipython"),
}
REASONING = ("reasoning_content", "thinking", "reasoning")
WEIGHTS = {0: False, 1: True}
KEPT = ("name", "tool_call_id")  # what templates read beside role, content, tool calls and reasoning


@dataclass(frozen=True)
class Fields:
    """How a dataset calls what its rows hold, and which turns are trained."""

    messages: str | None = None  # default: messages, else conversations
    properties: Mapping[str, str] = field(default_factory=dict)  # role, content → the fields' names
    roles: Mapping[str, list[str]] = field(default_factory=dict)  # our role → names for it, beside ROLES
    system: str | None = None
    tools: str | None = None
    train_on: str = "all"
    merge_system: bool = False
    allow_empty_answers: bool = False


def conversation(row: Any, fields: Fields) -> Conversation:
    """The row's messages, tools and trained turns. Refused with the reason if it is none that can be trained on."""
    if not isinstance(row, dict):
        raise Refused("the row is no object", printable(repr(row), 60))
    raw = _listed(row, fields)
    sharegpt = isinstance(raw[0], dict) and "from" in raw[0] and "role" not in raw[0]
    names = {"role": "from", "content": "value"} if sharegpt else {"role": "role", "content": "content"}
    names |= fields.properties
    pairs = [_message(message, names, fields.roles) for message in raw]
    messages, weights = [message for message, _ in pairs], [weight for _, weight in pairs]
    text = row.get(fields.system) if fields.system else None
    if text and messages[0]["role"] != "system":
        if not isinstance(text, str):
            raise Refused(f"the field '{fields.system}' is no text")
        messages, weights = [{"role": "system", "content": text}, *messages], [None, *weights]
    if fields.merge_system and len(merged := merged_system(messages)) < len(messages):
        messages, weights = merged, weights[1:]
    trained = _trained(messages, weights, fields)
    return Conversation(messages, _tools(row, fields), trained)


def _listed(row: dict[str, Any], fields: Fields) -> list[Any]:
    keys = (fields.messages,) if fields.messages else ("messages", "conversations")
    key = next((key for key in keys if key in row), None)
    if key is None:
        raise Refused(f"there is no field '{keys[0]}'", f"its fields are {printable(', '.join(map(str, row)), 80)}")
    if not isinstance(row[key], list) or not row[key]:
        raise Refused(f"'{key}' is empty or no list")
    return row[key]


def _message(raw: Any, names: Mapping[str, str], roles: Mapping[str, list[str]]) -> tuple[Message, bool | None]:
    """A message in the form that templates read, and whether it is trained (None: as train_on says)."""
    if not isinstance(raw, dict):
        raise Refused("a message is no object")
    role = _role(raw.get(names["role"]), roles)
    message: Message = {"role": role}
    if calls := raw.get("tool_calls"):
        message["tool_calls"] = _calls(calls)
    message["content"] = _content(raw.get(names["content"]), bool(calls))
    thinking = next((raw[key] for key in REASONING if raw.get(key)), None)
    if thinking is not None:
        if not isinstance(thinking, str):
            raise Refused("a message's reasoning is no text")
        message["reasoning_content"] = thinking
    message |= {key: raw[key] for key in KEPT if raw.get(key) is not None}
    return message, _weight(raw)


def _role(role: Any, roles: Mapping[str, list[str]]) -> str:
    for known in (roles, ROLES):
        for ours, names in known.items():
            if role in names:
                return ours
    raise Refused(f"unknown role {printable(repr(role), 40)}", "name it in roles, as { user = ['customer'] }")


def _content(content: Any, calls_tools: bool) -> str:
    """A message's text. Parts of text are joined; null is the empty text beside tool calls alone."""
    if isinstance(content, str):
        return content
    if content is None:
        if calls_tools:
            return ""
        raise Refused("content is null")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type", "text") != "text":
                kind = part.get("type") if isinstance(part, dict) else part
                raise Refused(f"content has a part of type {printable(repr(kind), 40)}: images are not supported")
            if not isinstance(part.get("text"), str):
                raise Refused("content has a part without text")
        return "".join(part["text"] for part in content)
    raise Refused(f"content is {_kind(content)}, not text")


def _kind(value: Any) -> str:
    return {bool: "true or false", int: "a number", float: "a number"}.get(type(value), "an object")


def _calls(calls: Any) -> list[Any]:
    """Tool calls with their arguments as objects, which most templates need."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise Refused("tool_calls is no list of objects")
    return [_with_object(call) for call in calls]


def _with_object(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Refused("a tool call has no function's name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except ValueError:
            raise Refused("a tool call's arguments are no JSON") from None
    if not isinstance(arguments, dict | type(None)):
        raise Refused("a tool call's arguments are no object")
    function = {**function, "arguments": arguments or {}}
    return (
        {"type": "function", **call, "function": function}
        if "function" in call
        else {"type": "function", "function": function}
    )


def with_strings(conversation: Conversation) -> Conversation:
    """The same with the arguments of tool calls as JSON text, which some templates need."""

    def as_text(call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}

    messages = [
        {**message, "tool_calls": [as_text(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in conversation.messages
    ]
    return conversation._replace(messages=messages)


def as_system(conversation: Conversation) -> Conversation:
    """The same with the developer's turns as the system's."""
    messages = [{**m, "role": "system"} if m["role"] == "developer" else m for m in conversation.messages]
    return conversation._replace(messages=messages)


def _weight(raw: dict[str, Any]) -> bool | None:
    """What `weight` or `train` says of a message."""
    if raw.get("weight") is not None:
        weight = raw["weight"]
        if not isinstance(weight, int | float) or weight not in WEIGHTS:
            raise Refused(f"weight is {printable(repr(weight), 20)}", "a message is trained (1) or not (0)")
        return WEIGHTS[int(weight)]
    train = raw.get("train")
    if train is not None and not isinstance(train, bool):
        raise Refused(f"train is {printable(repr(train), 20)}, not true or false")
    return train


def _trained(messages: list[Message], weights: list[bool | None], fields: Fields) -> list[int]:
    """Which messages are trained: the assistant's, but for the first of all and what weights leave out."""
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise Refused("there is no turn of the assistant")
    usual = answers if fields.train_on == "all" else answers[-1:]
    trained = [i for i in answers if i > 0 and (weights[i] if weights[i] is not None else i in usual)]
    for index in trained:
        message = messages[index]
        if not (message["content"] or message.get("tool_calls") or fields.allow_empty_answers):
            raise Refused("empty answer", "allow_empty_answers = true lets it pass")
    return trained


def _tools(row: dict[str, Any], fields: Fields) -> list[Any] | None:
    """The definitions of tools that the row shows the model; a string is read as JSON."""
    tools = row.get(fields.tools or "tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError:
            raise Refused("tools is no JSON") from None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise Refused("tools is no list of objects")
    return tools or None
