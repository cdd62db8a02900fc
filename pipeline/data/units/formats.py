"""Takes rows of preference data as they stand in their files; gives units: a prompt and its answers, in the order of their slots.

Formats are TRL's (preference with an explicit or implicit prompt, unpaired, as texts or as messages) and those of sets that
are around: a prompt in a field beside the conversations that hold it, which of two texts is better in a third field, answers
with ranks. Nothing is guessed from how two answers begin alike.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.data.chat.messages import Fields, conversation
from pipeline.data.chat.template import Message
from pipeline.data.chat.turns import Refused
from pipeline.foreign import printable

Kind = Literal["preference", "unpaired", "ranked"]
ASSISTANT = "\n\nAssistant:"  # ends an implicit prompt in Anthropic's sets
TRUE_OR_FALSE: dict[Any, bool] = {1: True, 0: False}  # and so true and false
TRUE_OR_FALSE |= {"true": True, "false": False, "True": True, "False": False, "1": True, "0": False}  # of a CSV


@dataclass(frozen=True)
class Names:
    """How a dataset calls what its rows hold. `rejected`: None where the model gives that answer itself. `label`: of unpaired
    data whether the answer is good, 'label' by itself; of pairs whether `chosen` is the better of the two. `chat`: texts are
    messages of user and assistant. `messages`: of messages."""

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str | None = "rejected"
    completion: str = "completion"
    label: str | None = None
    answers: str = "answers"
    chat: bool = False
    messages: Fields = field(default_factory=Fields)


@dataclass(frozen=True)
class Unit:
    """A prompt and its answers: texts, or messages of which an answer is the last. `desirable`: of an answer by itself."""

    prompt: str | Sequence[Message]
    answers: tuple[str | Message, ...]
    desirable: bool = True


def units(value: Any, kind: Kind, names: Names, ranks: int) -> list[Unit]:
    """The row's units; mostly one. `ranks`: answers of a ranked one. Refused with the reason if there is none in it."""
    if not isinstance(value, dict):
        raise Refused("the row is no object", printable(repr(value), 60))
    if kind == "ranked":
        return [_unit(value, _ranked(value, names, ranks), names)]
    if kind == "unpaired" and names.completion in value:
        good = _flag(value, names.label or "label")
        unit = _unit(value, [value[names.completion]], names)
        return [Unit(unit.prompt, unit.answers, good)]
    sides = [_field(value, name) for name in (names.chosen, names.rejected) if name is not None]
    if kind == "preference" and names.label is not None and not _flag(value, names.label):
        sides.reverse()
    unit = _unit(value, sides, names)
    if kind == "preference":
        return [unit]
    return [Unit(unit.prompt, (answer,), good) for answer, good in zip(unit.answers, (True, False), strict=True)]


def _unit(value: dict[str, Any], sides: list[Any], names: Names) -> Unit:
    """One unit of a row's answers, `sides`, and whatever of it is the prompt."""
    prompt = value.get(names.prompt)
    kinds = {type(side) for side in sides}
    if kinds == {list}:
        return _of_messages(value, prompt, sides, names)
    if kinds != {str}:
        raise Refused("its answers are neither all texts nor all lists of messages")
    if isinstance(prompt, list):
        return _of_messages(value, prompt, [[_said("assistant", side, names)] for side in sides], names)
    if prompt is None:
        return _cut(sides, names)
    if not isinstance(prompt, str):
        raise Refused(f"'{names.prompt}' is neither a text nor a list of messages")
    if names.chat or (names.messages.system and value.get(names.messages.system)):
        asked = [_said("user", prompt, names)]
        return _of_messages(value, asked, [[_said("assistant", side, names)] for side in sides], names)
    return Unit(prompt, tuple(sides))


def _of_messages(value: dict[str, Any], prompt: Any, sides: list[list[Any]], names: Names) -> Unit:
    """Of conversations that end in the answer; the prompt is in them, or stands beside them."""
    found: list[list[Message]] = []
    for side in sides:
        if not side:
            raise Refused("an answer is an empty list")
        whole = list(side)
        if len(side) == 1 or (isinstance(prompt, list) and side[: len(prompt)] != prompt):
            if prompt is None:
                raise Refused(f"there is no field '{names.prompt}', and no message before the answer")
            whole = [*(prompt if isinstance(prompt, list) else [_said("user", prompt, names)]), *side]
            if len(side) > 1:
                raise Refused("an answer is several messages", "put all but the last into the prompt")
        row = {"messages": whole}
        if (system := names.messages.system) and value.get(system) is not None:
            row[system] = value[system]
        talk = conversation(row, _last_turn(names.messages))
        if talk.messages[-1]["role"] != "assistant" or len(talk.messages) < 2:
            raise Refused("the conversation does not end with the assistant's answer")
        found.append(talk.messages)
    if any(messages[:-1] != found[0][:-1] for messages in found):
        raise Refused("the conversations differ before their last message")
    return Unit(found[0][:-1], tuple(messages[-1] for messages in found))


def _last_turn(fields: Fields) -> Fields:
    """Fields of a list under 'messages', of which the last turn counts; empty answers are left to whoever counts them."""
    return Fields(
        "messages",
        fields.properties,
        fields.roles,
        fields.system,
        None,
        "last",
        fields.merge_system,
        allow_empty_answers=True,
    )


def _said(role: str, text: Any, names: Names) -> Message:
    """A message in the form that the dataset's own have."""
    if not isinstance(text, str):
        raise Refused(f"a text of the {role} is no text")
    properties: Mapping[str, str] = names.messages.properties
    return {properties.get("role", "role"): role, properties.get("content", "content"): text}


def _cut(sides: list[str], names: Names) -> Unit:
    """An implicit prompt: it ends after the last mark of the assistant that all texts share, whatever the answers begin with."""
    common = 0
    shortest = min(map(len, sides))
    while common < shortest and len({side[common] for side in sides}) == 1:
        common += 1
    end = sides[0].rfind(ASSISTANT, 0, common)
    if end < 0:
        raise Refused(
            f"there is no field '{names.prompt}', and its texts do not begin alike up to an 'Assistant:'",
            "field_prompt names the field of the prompt",
        )
    end += len(ASSISTANT)
    return Unit(sides[0][:end], tuple(side[end:] for side in sides))


def _ranked(value: dict[str, Any], names: Names, ranks: int) -> list[Any]:
    """The `ranks` best answers, best first: of texts in order, or of objects with `answer` and `rank` (1 the best)."""
    answers = _field(value, names.answers)
    if not isinstance(answers, list):
        raise Refused(f"'{names.answers}' is no list")
    if any(isinstance(one, dict) and "rank" in one for one in answers):
        if not all(isinstance(one, dict) and isinstance(one.get("rank"), int | float) for one in answers):
            raise Refused("an answer has no rank")
        order = sorted(answers, key=lambda one: one["rank"])
        apart: list[Any] = []
        for one in order:
            if not apart or one["rank"] > apart[-1]["rank"]:  # of equal ranks the first
                apart.append(one)
        answers = [one.get("answer") for one in apart]
    if len(answers) < ranks:
        raise Refused(f"it has {len(answers)} answers of different rank, fewer than ranks = {ranks}")
    return list(answers[:ranks])


def _field(value: dict[str, Any], name: str) -> Any:
    if value.get(name) is None:
        raise Refused(f"there is no field '{name}'", f"its fields are {printable(', '.join(map(str, value)), 80)}")
    return value[name]


def _flag(value: dict[str, Any], name: str) -> bool:
    flag = _field(value, name)
    if not isinstance(flag, bool | int | float | str) or flag not in TRUE_OR_FALSE:
        raise Refused(f"'{name}' is {printable(repr(flag), 30)}, neither true nor false (1, 0)")
    return TRUE_OR_FALSE[flag]
