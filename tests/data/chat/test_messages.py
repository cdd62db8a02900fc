"""A row of a file as a conversation: names of fields and roles, tools, reasoning, weights; what is none is refused by reason."""

from typing import Any

import pytest

from pipeline.data.chat.messages import Fields, as_system, conversation, with_strings
from pipeline.data.chat.turns import Conversation, Refused, merged_system

USER, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}


def read(row: Any, **fields: Any) -> Conversation:
    return conversation(row, Fields(**fields))


def said(*messages: Any, **row: Any) -> dict[str, Any]:
    return {"messages": list(messages), **row}


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        (said(USER, ANSWER), {}),
        ({"conversations": [USER, ANSWER]}, {}),
        ({"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]}, {}),
        ({"talk": [USER, ANSWER], "messages": 3}, {"messages": "talk"}),
        (
            said({"who": "user", "what": "Why?"}, {"who": "bot", "what": "Because."}),
            {"properties": {"role": "who", "content": "what"}},
        ),
        (
            said({**USER, "role": "customer"}, {**ANSWER, "role": "shop"}),
            {"roles": {"user": ["customer"], "assistant": ["shop"]}},
        ),
        (said({**USER, "content": [{"type": "text", "text": "Why"}, {"text": "?"}]}, ANSWER), {}),
        (
            said({**USER, "weight": None, "tool_calls": None, "name": None}, ANSWER, tools=None),
            {},
        ),  # a table's empty cells
    ],
)
def test_the_same_conversation_however_it_is_written(row: Any, fields: dict[str, Any]) -> None:
    assert read(row, **fields) == Conversation([USER, ANSWER], None, [1])


@pytest.mark.parametrize("role", ["assistant", "gpt", "model", "chatbot", "bot", "ai"])
@pytest.mark.parametrize("user", ["user", "human"])
def test_roles_of_other_names(role: str, user: str) -> None:
    assert [m["role"] for m in read(said({**USER, "role": user}, {**ANSWER, "role": role})).messages] == [
        "user",
        "assistant",
    ]


@pytest.mark.parametrize("role", ["tool", "function", "observation", "ipython"])
def test_answers_of_tools(role: str) -> None:
    assert read(said(USER, {"role": role, "content": "3"}, ANSWER)).messages[1]["role"] == "tool"


def test_a_system_text_of_its_own_field_comes_first_unless_there_is_one() -> None:
    assert read(said(USER, ANSWER, rules="Be brief."), system="rules").messages[0] == {
        "role": "system",
        "content": "Be brief.",
    }
    own = {"role": "system", "content": "Be long."}
    assert read(said(own, USER, ANSWER, rules="Be brief."), system="rules").messages[0] == own
    assert read(said(USER, ANSWER, rules=""), system="rules").messages == [USER, ANSWER]
    with pytest.raises(Refused, match="the field 'rules' is no text"):
        read(said(USER, ANSWER, rules=3), system="rules")


def test_a_system_text_is_merged_into_the_first_question() -> None:
    system = {"role": "system", "content": "Be brief."}
    found = read(said(system, USER, {**ANSWER, "train": False}, USER, ANSWER), merge_system=True)
    assert found.messages == [{"role": "user", "content": "Be brief.\n\nWhy?"}, ANSWER, USER, ANSWER]
    assert found.trained == [3]  # weights move with their messages
    assert merged_system([system, ANSWER]) == [system, ANSWER]


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_has_one_name(key: str) -> None:
    assert read(said(USER, {**ANSWER, key: "Hm."})).messages[1] == {**ANSWER, "reasoning_content": "Hm."}
    with pytest.raises(Refused, match="reasoning is no text"):
        read(said(USER, {**ANSWER, key: ["Hm."]}))


CALL = {"type": "function", "function": {"name": "sum", "arguments": {"a": 1}}}


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        {"function": {"name": "sum", "arguments": '{"a": 1}'}},
        {"name": "sum", "arguments": {"a": 1}},
        {"name": "sum", "arguments": '{"a": 1}'},
    ],
)
def test_tool_calls_have_one_form(call: Any) -> None:
    found = read(said(USER, {"role": "assistant", "content": None, "tool_calls": [call]}, tools='[{"name": "sum"}]'))
    assert found.messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert found.tools == [{"name": "sum"}]
    assert with_strings(found).messages[1]["tool_calls"][0]["function"]["arguments"] == '{"a": 1}'
    assert found.messages[1]["tool_calls"] == [CALL]  # as it was


def test_a_call_without_arguments_has_none() -> None:
    for empty in (None, "", " "):
        call = {"function": {"name": "now", "arguments": empty}}
        found = read(said(USER, {**ANSWER, "tool_calls": [call]}))
        assert found.messages[1]["tool_calls"][0]["function"]["arguments"] == {}


def test_a_developer_is_the_system_where_that_is_asked() -> None:
    found = read(said({"role": "developer", "content": "Be brief."}, USER, ANSWER))
    assert found.messages[0]["role"] == "developer"
    assert as_system(found).messages[0]["role"] == "system"


@pytest.mark.parametrize(
    ("weights", "train_on", "trained"),
    [
        ([{}, {}], "all", [1, 3]),
        ([{}, {}], "last", [3]),
        ([{"weight": 0}, {}], "all", [3]),
        ([{"weight": 1}, {"weight": 0}], "last", [1]),
        ([{"weight": 1.0}, {"train": False}], "all", [1]),
        ([{"train": True}, {}], "last", [1, 3]),
        ([{"train": False}, {"train": False}], "all", []),
    ],
)
def test_which_turns_are_trained(weights: list[dict[str, Any]], train_on: str, trained: list[int]) -> None:
    first, second = ({**ANSWER, **weight} for weight in weights)
    assert read(said(USER, first, USER, second), train_on=train_on).trained == trained


def test_a_first_turn_of_the_assistant_has_no_prompt() -> None:
    assert read(said(ANSWER, USER, ANSWER)).trained == [2]


def called(arguments: Any) -> dict[str, Any]:
    return said(USER, {**ANSWER, "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (3, "the row is no object"),
        ({"text": "x"}, "there is no field 'messages'"),
        (said(), "'messages' is empty or no list"),
        ({"messages": "x"}, "'messages' is empty or no list"),
        (said("x", ANSWER), "a message is no object"),
        (said({**USER, "role": "narrator"}, ANSWER), "unknown role 'narrator'"),
        (said({**USER, "role": None}, ANSWER), "unknown role None"),
        (said({**USER, "content": None}, ANSWER), "content is null"),
        (said({**USER, "content": 1}, ANSWER), "content is a number, not text"),
        (said({**USER, "content": 1.5}, ANSWER), "content is a number, not text"),
        (said({**USER, "content": False}, ANSWER), "content is true or false, not text"),
        (said({**USER, "content": {}}, ANSWER), "content is an object, not text"),
        (
            said({**USER, "content": [{"type": "image_url"}]}, ANSWER),
            "content has a part of type 'image_url': images are not supported",
        ),
        (said({**USER, "content": [{"type": "text"}]}, ANSWER), "content has a part without text"),
        (said(USER), "there is no turn of the assistant"),
        (said(USER, {**ANSWER, "content": ""}), "empty answer"),
        (said(USER, {**ANSWER, "weight": 0.5}), "weight is 0.5"),
        (said(USER, {**ANSWER, "weight": "1"}), "weight is '1'"),
        (said(USER, {**ANSWER, "train": 1}), "train is 1, not true or false"),
        (said(USER, {**ANSWER, "tool_calls": {}}, tools=[1]), "tools is no list of objects"),
        (said(USER, ANSWER, tools="{"), "tools is no JSON"),
        (said(USER, {**ANSWER, "tool_calls": "x"}), "tool_calls is no list of objects"),
        (said(USER, {**ANSWER, "tool_calls": [{}]}), "a tool call has no function's name"),
        (
            said(USER, {**ANSWER, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}),
            "a tool call's arguments are no JSON",
        ),
        (
            said(USER, {**ANSWER, "tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}),
            "a tool call's arguments are no object",
        ),
    ],
)
def test_what_is_no_conversation_is_refused_by_reason(row: Any, reason: str) -> None:
    with pytest.raises(Refused) as found:
        read(row)
    assert found.value.reason == reason


def test_an_answer_that_is_not_trained_may_be_empty() -> None:
    assert read(said(USER, {**ANSWER, "content": "", "train": False}, USER, ANSWER)).trained == [3]
    assert read(said(USER, {**ANSWER, "content": ""}), allow_empty_answers=True).trained == [1]
