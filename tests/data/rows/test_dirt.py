"""What becomes of rows that are not as they should be: each kind is a file, and the report names the row and the reason."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.console import UserError
from tests.helpers import chat
from tests.helpers.chat import EOS
from tests.helpers.rows import decoded, stored, talk, write_jsonl

GOOD = talk("Why?", "Because.")
USER, ANSWER = GOOD["messages"]
CALL = {"function": {"name": "sum", "arguments": {"a": 1}}}


def said(*messages: dict[str, Any]) -> dict[str, Any]:
    return {"messages": list(messages)}


# (the row, changes of the dataset, what the report says of it with its place)
BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "empty answer": (talk("Why?", ""), {}, r"1 × empty answer \(a.jsonl:2\): allow_empty_answers = true"),
    "no assistant turn": (talk("Why?"), {}, r"1 × there is no turn of the assistant \(a.jsonl:2\)"),
    "only an assistant turn": (said(ANSWER), {}, r"1 × no turn of it is trained \(a.jsonl:2\)"),
    "roles must alternate": (
        said(USER, USER, ANSWER),
        {"template": "gemma", "stop": "<end_of_turn>"},
        r"1 × the template raises: .*alternate.* \(a.jsonl:2\)",
    ),
    "content null": (said(USER, {**ANSWER, "content": None}), {}, r"1 × content is null \(a.jsonl:2\)"),
    "content a number": (said(USER, {**ANSWER, "content": 12}), {}, r"1 × content is a number, not text \(a.jsonl:2\)"),
    "content a bool": (said(USER, {**ANSWER, "content": True}), {}, r"1 × content is true or false, not text"),
    "content an image": (
        said({**USER, "content": [{"type": "image", "url": "x"}]}, ANSWER),
        {},
        r"1 × content has a part of type 'image': images are not supported \(a.jsonl:2\)",
    ),
    "no messages": ({"messages": []}, {}, r"1 × 'messages' is empty or no list \(a.jsonl:2\)"),
    "messages null": ({"messages": None}, {}, r"1 × 'messages' is empty or no list \(a.jsonl:2\)"),
    "another field": ({"text": "x"}, {}, r"1 × there is no field 'messages' \(a.jsonl:2\): its fields are text"),
    "no object": ("[1]", {}, r"1 × the row is no object \(a.jsonl:2\)"),
    "unknown role": (
        said({"role": "narrator", "content": "x"}, ANSWER),
        {},
        r"1 × unknown role 'narrator' \(a.jsonl:2\)",
    ),
    "weight": (said(USER, {**ANSWER, "weight": 0.5}), {}, r"1 × weight is 0.5 \(a.jsonl:2\): a message is trained"),
    "control tokens in the text": (
        talk("a<|im_end|>\n<|im_start|>assistant\nb", "Because."),
        {},
        r"1 × its text holds <\|im_end\|>, which marks turns \(a.jsonl:2\): allow_special_text = true",
    ),
    "tool calls lost": (
        said(USER, {**ANSWER, "content": "", "tool_calls": [CALL]}),
        {"template": "phi3", "stop": "<|end|>"},
        r"1 × the template leaves out tool calls \(a.jsonl:2\)",
    ),
    "the last line is cut": (
        '{"messages": [{"role": "us',
        {},
        r"1 × not valid JSON \(a.jsonl:2\): the first is not valid JSON, column 24: Unterminated string",
    ),
    "half a surrogate pair": ('{"messages": "\\ud800"}', {}, r"1 × half a surrogate pair .* \(a.jsonl:2\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_left_out_and_named(tmp_path: Path, name: str) -> None:
    row, changes, message = BAD[name]
    store = stored(write_jsonl(tmp_path / "a.jsonl", [GOOD, row, GOOD]), **changes)
    import re

    assert any(re.search(message, line) for line in store.report.notes), store.report.notes
    assert (store.report.read, store.report.bad, len(store)) == (3, 1, 2)
    assert [store.documents(row)[0].name for row in range(2)] == ["a.jsonl:1", "a.jsonl:3"]


def test_bad_utf8_is_a_bad_row_with_its_line_and_byte(tmp_path: Path) -> None:
    lines = [json.dumps(GOOD).encode(), b'{"messages": "\xff"}', json.dumps(GOOD).encode()]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    store = stored(tmp_path / "a.jsonl")
    byte = len(lines[0]) + 1 + lines[1].index(b"\xff")
    assert (
        f"bad, left out: 1 × not UTF-8 (a.jsonl:2): the first is not UTF-8 at byte {byte} of the file (0xff, invalid start byte)"
        in store.report.notes
    )
    assert len(store) == 2


# (the row, changes, the texts of its trained turns)
KEPT: dict[str, tuple[Any, dict[str, Any], list[str]]] = {
    "empty answer, allowed": (talk("Why?", ""), {"allow_empty_answers": True}, ["<|im_end|>"]),
    "two user turns": (said(USER, USER, ANSWER), {}, ["Because.<|im_end|>"]),
    "ends in a user turn": (talk("Why?", "Because.", "Sure?"), {}, ["Because.<|im_end|>"]),
    "begins with an assistant turn": (said(ANSWER, USER, {**ANSWER, "content": "So."}), {}, ["So.<|im_end|>"]),
    "content null beside tool calls": (
        said(USER, {**ANSWER, "content": None, "tool_calls": [CALL]}),
        {"template": "qwen3_instruct_2507"},
        ['<tool_call>\n{"name": "sum", "arguments": {"a": 1}}\n</tool_call><|im_end|>'],
    ),
    "control tokens, allowed": (talk("a<|im_end|>b", "c"), {"allow_special_text": True}, ["c<|im_end|>"]),
    "a system text that is blank, which the template leaves out": (
        said({"role": "system", "content": " \n"}, USER, ANSWER),
        {"template": "llama3_1", "stop": "<|eot_id|>"},
        ["Because.<|eot_id|>"],
    ),
    "outer blanks": (talk("Why?", " Because. \n"), {}, [" Because. \n<|im_end|>"]),
    "parts of text": (
        said({**USER, "content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}]}, ANSWER),
        {},
        ["Because.<|im_end|>"],
    ),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]},
        {},
        ["Because.<|im_end|>"],
    ),
    "weights": (
        said(USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "content": "So.", "train": True}),
        {},
        ["So.<|im_end|>"],
    ),
    "the last turn only": (talk("1", "2", "3", "4"), {"train_on": "last"}, ["4<|im_end|>"]),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_can_be_trained_is_kept(tmp_path: Path, name: str) -> None:
    row, changes, trained = KEPT[name]
    store = stored(write_jsonl(tmp_path / "a.jsonl", [row]), **changes)
    ((text, targets),) = decoded(store, changes.get("template", "qwen2_5"), changes.get("stop", "<|im_end|>"))
    assert targets == trained
    assert text.endswith(trained[-1])  # nothing after the last target
    assert store.report.bad == 0


def test_blanks_that_a_template_trims_are_counted(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [talk("Why?", " Because. ")])
    store = stored(path, template="llama3", stop="<|eot_id|>")
    assert any("1 conversations have blanks around an answer" in line for line in store.report.notes)


def test_a_system_text_without_a_place_is_refused_and_merged(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [talk("Why?", "Because.", system="Be brief."), GOOD])
    kind = {"template": "gemma", "stop": "<end_of_turn>"}
    assert any("merge_system = true" in line for line in stored(path, **kind).report.notes)
    merged = stored(path, merge_system=True, **kind)
    assert "Be brief.\n\nWhy?" in decoded(merged, **kind)[0][0]


def test_rows_that_are_too_long(tmp_path: Path) -> None:
    long = talk(*["Why is that so?", "Because it is."] * 9, system="Be brief.")
    path = write_jsonl(tmp_path / "a.jsonl", [GOOD, long])
    kind = {"template": "phi3", "stop": "<|end|>"}
    whole = int(stored(path, **kind).lengths[1])
    limit = {"limit": whole // 2, **kind}
    dropped = stored(path, **limit)
    assert len(dropped) == 1
    said_so = "1 rows were longer than sequence_len and left out (first a.jsonl:2)"
    assert said_so in dropped.report.notes
    parts = decoded(stored(path, too_long="truncate_left", **limit), "phi3", "<|end|>")[1:]
    assert [answer for _, answers in parts for answer in answers] == ["Because it is.<|end|>"] * 9
    assert all("Be brief." in text for text, _ in parts)
    with pytest.raises(
        UserError, match=rf"a\.jsonl:2: a row has {whole} tokens, more than sequence_len = {whole // 2}"
    ):
        stored(path, too_long="error", **limit)


@pytest.mark.parametrize("deduplicate", [False, True])
def test_rows_that_are_the_same_are_counted(tmp_path: Path, deduplicate: bool) -> None:
    swapped = {"messages": [dict(reversed(message.items())) for message in GOOD["messages"]]}
    store = stored(write_jsonl(tmp_path / "a.jsonl", [GOOD, talk("a", "b"), swapped]), deduplicate=deduplicate)
    assert store.report.duplicates == 1
    assert len(store) == 3 - deduplicate


def test_more_bad_rows_than_allowed_are_an_error_that_counts_them(tmp_path: Path) -> None:
    bad = [talk("Why?", "")] * 5 + ["{"]
    path = write_jsonl(tmp_path / "a.jsonl", [GOOD] * 94 + bad)
    with pytest.raises(UserError) as error:
        stored(path, most_bad=0.05)
    assert error.value.exit_code == 2
    first, *rest = str(error.value).splitlines()
    assert first == "dataset 'talks': 6 of 100 rows are bad (6.0%), more than max_bad_rows = 0.05 allows:"
    assert rest == [
        "  bad, left out: 5 × empty answer (a.jsonl:95, a.jsonl:96, a.jsonl:97, …): allow_empty_answers = true lets it pass",
        "  bad, left out: 1 × not valid JSON (a.jsonl:100): the first is not valid JSON, column 2: Expecting property name "
        "enclosed in double quotes",
    ]
    assert stored(path, most_bad=0.06).report.bad == 6
    with pytest.raises(UserError, match=r"more than max_bad_rows = 0\.05"):  # from the cache as well
        stored(path, most_bad=0.05)


def test_a_dataset_of_which_nothing_is_left_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none of its 1 rows is left to train on"):
        stored(write_jsonl(tmp_path / "a.jsonl", [talk("Why?", "")]))


def test_history_that_a_template_rewrites_is_split_or_refused(tmp_path: Path) -> None:
    first, second = ({**ANSWER, "reasoning_content": thought} for thought in ("Hm.", "Ha."))
    path = write_jsonl(tmp_path / "a.jsonl", [said(USER, first, USER, second)])
    store = stored(path, template="qwen3")
    assert len(store) == 2
    assert store.groups.tolist() == [0, 0]
    assert any("1 conversations became several rows" in line for line in store.report.notes)
    assert [len(targets) for _, targets in decoded(store, "qwen3")] == [1, 1]
    with pytest.raises(UserError, match="the template rewrites its history"):
        stored(path, template="qwen3", history="refuse")


# It will not stop


def test_a_template_whose_end_the_model_does_not_know_is_warned_of(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [GOOD])
    (warning,) = stored(path, stop=EOS).report.warnings
    assert "ends a turn with '<|im_end|>', at which the model does not stop" in warning
    report = stored(path, stop=EOS).report
    tokenizer = chat.tokenizer("qwen2_5", EOS)
    assert report.specials == sorted(tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>"))
    assert report.ends == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert not stored(path).report.warnings
    assert stored(path).report.ends is None
    assert stored(path, stop=EOS, train_on_eos="none").report.ends is None  # nothing to stop at was learnt


def test_ends_that_are_not_trained_are_warned_of(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [GOOD])
    (warning,) = stored(path, train_on_eos="none").report.warnings
    assert "no token at which the model stops is trained: it will not learn to stop" in warning


def test_a_template_that_prints_the_date_keeps_the_day_of_the_preparation(tmp_path: Path) -> None:
    import datetime

    path = write_jsonl(tmp_path / "a.jsonl", [GOOD])
    store = stored(path, template="dated", stop="<|end|>")
    assert f"{datetime.date.today():%d %b %Y}" in decoded(store, "dated", "<|end|>")[0][0]
    assert f"the template prints the date: {datetime.date.today().isoformat()}" in store.report.notes[0]
