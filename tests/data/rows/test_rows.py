"""Completions, instructions and token ids become rows; the store gives them back; conversations are held out whole."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import processes
from pipeline.console import UserError
from pipeline.data.rows.store import BATCH_ROWS, RowWriter, UnequalRows
from pipeline.data.selection import Streams, split
from tests.data.test_records import FORMATS, PACKINGS
from tests.helpers import chat
from tests.helpers.paths import ROOT
from tests.helpers.row_store import Row
from tests.helpers.row_store import rows as drawn_rows
from tests.helpers.rows import decoded, stored, talk, write_jsonl

PHI = {"template": "phi3", "stop": "<|end|>"}


def completions(path: Path, rows: list[Any], **changes: Any) -> list[tuple[str, list[str]]]:
    return decoded(stored(write_jsonl(path / "c.jsonl", rows), "completion", **PHI, **changes), **PHI)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("name", [name for name in FORMATS if not name.endswith("csv")])
def test_conversations_of_every_format_make_the_same_rows(tmp_path: Path, name: str, packing: str) -> None:
    (tmp_path / f"{name}{packing}").write_bytes(
        PACKINGS[packing](FORMATS[name][0]([talk("Thé?\n🙂", "NA"), talk("b", "null")]))
    )
    assert [targets for _, targets in decoded(stored(tmp_path / f"{name}{packing}"))] == [
        ["NA<|im_end|>"],
        ["null<|im_end|>"],
    ]


def test_a_csv_of_completions_is_text_whatever_it_spells(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('prompt,completion\nNA,null\n"a,\n",None\n1,2.50\n')
    found = decoded(stored(tmp_path / "a.csv", "completion", **PHI), **PHI)
    assert found == [
        ("NAnull<|end|>", ["null<|end|>"]),
        ("a,\nNone<|end|>", ["None<|end|>"]),
        ("12.50<|end|>", ["2.50<|end|>"]),
    ]


def test_a_completion_is_trained_with_its_end(tmp_path: Path) -> None:
    rows = [{"prompt": "2+2=", "completion": "4"}, {"prompt": "3", "completion": "4<|end|>"}]
    assert completions(tmp_path, rows) == [("2+2=4<|end|>", ["4<|end|>"]), ("34<|end|>", ["4<|end|>"])]
    assert completions(tmp_path, rows[:1], train_on_eos="none") == [("2+2=4<|end|>", ["4"])]
    other = [{"question": "2+2=", "answer": "4"}]
    assert completions(tmp_path, other, prompt="question", completion="answer") == [("2+2=4<|end|>", ["4<|end|>"])]


def test_instructions_go_through_the_template_or_stay_text(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add.", "input": "1 1", "output": "2"},
        {"instruction": "Go.", "input": "", "output": "Gone."},
    ]
    assert completions(tmp_path, rows, chat_template=chat.source("phi3")) == [
        ("<|user|>\nAdd.\n\n1 1<|end|>\n<|assistant|>\n2<|end|>", ["2<|end|>"]),
        ("<|user|>\nGo.<|end|>\n<|assistant|>\nGone.<|end|>", ["Gone.<|end|>"]),
    ]
    assert completions(tmp_path, rows, chat_template="none") == [
        ("Add.\n\n1 1\n\n2<|end|>", ["2<|end|>"]),
        ("Go.\n\nGone.<|end|>", ["Gone.<|end|>"]),
    ]
    with pytest.raises(UserError, match=r"c\.jsonl:1: a row has an instruction.* the model's tokenizer has none"):
        completions(tmp_path, rows)


def test_prompts_and_completions_may_be_messages(tmp_path: Path) -> None:
    turns = talk("Hi.", "Hello.", "More?", "No.")["messages"]
    rows = [
        {"prompt": turns[:3], "completion": turns[3:]},
        {"prompt": "Hi.", "completion": turns[1:2]},
        {"prompt": turns[:1], "completion": turns[1:]},  # all that follows the prompt
        {"prompt": turns[:3], "completion": "Never."},
    ]
    hi, more = "<|user|>\nHi.<|end|>\n<|assistant|>\nHello.<|end|>", "\n<|user|>\nMore?<|end|>\n<|assistant|>\n"
    assert completions(tmp_path, rows, chat_template=chat.source("phi3")) == [
        (f"{hi}{more}No.<|end|>", ["No.<|end|>"]),
        (hi, ["Hello.<|end|>"]),
        (f"{hi}{more}No.<|end|>", ["Hello.<|end|>", "No.<|end|>"]),
        (f"{hi}{more}Never.<|end|>", ["Never.<|end|>"]),
    ]
    for row, reason in (
        ({"prompt": [], "completion": turns[1:2]}, "its prompt or completion is an empty list"),
        ({"prompt": turns[:1], "completion": [1]}, "a message is no object"),
        ({"prompt": turns[:1], "completion": 5}, "'completion' is no text"),
    ):
        with pytest.raises(UserError, match=reason):
            completions(tmp_path, [row], chat_template=chat.source("phi3"))
    with pytest.raises(UserError, match=r"is a list of messages .*leave out chat_template = 'none'"):
        completions(tmp_path, rows[:1], chat_template="none")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "completion": ""}, "empty answer"),
        ({"prompt": "a", "completion": None}, "'completion' is null"),
        ({"prompt": 1, "completion": "b"}, "'prompt' is no text"),
        ({"prompt": "a"}, "there is no field 'completion'"),
        ({"prompt": "a<|end|>", "completion": "b"}, "its text holds <|end|>, which marks a row's end"),
    ],
)
def test_a_bad_completion_is_named(tmp_path: Path, row: Any, reason: str) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", [row, {"prompt": "a", "completion": "b"}])
    store = stored(path, "completion", **PHI)
    assert any(f"1 × {reason} (c.jsonl:1)" in line for line in store.report.notes), store.report.notes


def test_a_prompt_that_is_too_long_loses_its_beginning(tmp_path: Path) -> None:
    rows = [{"prompt": "roka linmo " * 40, "completion": "ber"}, {"prompt": "a", "completion": "ber " * 80}]
    ((text, targets),) = completions(tmp_path, rows, limit=40, too_long="truncate_left")
    assert targets == ["ber<|end|>"]
    assert ("roka linmo " * 40 + "ber<|end|>").endswith(text)


def test_bos_is_put_where_the_tokenizer_puts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenizers import processors

    tokenizer = chat.with_marks.__wrapped__(("<|end|>",), "<|end|>")
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", bos)]
    )
    assert tokenizer("x")["input_ids"][0] == bos
    monkeypatch.setattr(chat, "tokenizer", lambda *_: tokenizer)
    path = write_jsonl(
        tmp_path / "c.jsonl", [{"prompt": "ab", "completion": "c"}, {"prompt": "<|bos|>", "completion": "c"}]
    )
    store = stored(path, "completion", **PHI)
    first, second = (store.ids(row).tolist() for row in range(2))
    assert first == tokenizer("abc<|end|>")["input_ids"]
    assert second == tokenizer("c<|end|>")["input_ids"]  # not twice
    assert [store.spans(row) for row in range(2)] == [[(len(first) - 2, len(first))], [(1, 3)]]


PRETOKENIZED = [
    ({"input_ids": [5, 6, 7]}, [(1, 3)]),
    ({"input_ids": [5, 6, 7, 8], "labels": [5, -100, 7, 8], "attention_mask": [1, 1, 1, 1]}, [(2, 4)]),
    ({"input_ids": [5, 6, 7, 8], "labels": [-100, 6, -100, 8]}, [(1, 2), (3, 4)]),
]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.arrow"])
def test_token_ids_are_taken_as_they_are(tmp_path: Path, name: str) -> None:
    empty: dict[str, Any] = {"input_ids": None, "labels": None, "attention_mask": None}  # a table's columns
    (tmp_path / name).write_bytes(FORMATS[name][0]([empty | row for row, _ in PRETOKENIZED]))
    store = stored(tmp_path / name, "pretokenized")
    assert [(store.ids(row).tolist(), store.spans(row)) for row in range(3)] == [
        (row["input_ids"], spans) for row, spans in PRETOKENIZED
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"input_ids": []}, "input_ids is empty"),
        ({"input_ids": [1.0]}, "input_ids is no list of whole numbers"),
        ({"input_ids": [True]}, "input_ids is no list of whole numbers"),
        ({"ids": [1]}, "input_ids is no list of whole numbers"),
        ({"input_ids": [3, -1]}, "input_ids has a number below 0"),
        ({"input_ids": [3, 2**31]}, "input_ids has a number that is no token's"),
        ({"input_ids": [3, 4], "labels": [3]}, "labels has another length than input_ids"),
        ({"input_ids": [3, 4], "labels": [4, 5]}, "labels has a token that is not input_ids' at its place"),
        ({"input_ids": [3, 4], "attention_mask": [1, 0]}, "attention_mask is not all ones"),
    ],
)
def test_bad_token_ids_are_named(tmp_path: Path, row: Any, reason: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"input_ids": [3, 4]}, row])
    assert any(f"1 × {reason} (a.jsonl:2)" in line for line in stored(path, "pretokenized").report.notes)


# The store


@settings(max_examples=15, deadline=None)
@given(given_rows=st.lists(drawn_rows(60), min_size=1, max_size=9), data=st.data())
def test_a_store_gives_back_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, given_rows: list[Row], data: Any
) -> None:
    folder = tmp_path_factory.mktemp("store") / "rows"
    copies = data.draw(st.sampled_from([1, 1 + BATCH_ROWS // len(given_rows)]))
    writer, rows = RowWriter(folder, frozenset({3, 4})), given_rows * copies
    for number, (ids, runs) in enumerate(rows):
        writer.add(ids, runs, number // 2, f"a.jsonl:{number}")
    facts = {"name": "a", "kind": "chat", "bos": 1, "eos": 2, "read": len(rows), "bad": 0, "duplicates": 0}
    report, store = writer.close(**facts), UnequalRows(folder)
    assert store.report == report
    picked = range(0, len(rows), max(1, len(rows) // 20))
    for row in picked:
        assert store.ids(row).tolist() == rows[row][0]
        assert store.spans(row) == rows[row][1]
        assert store.documents(row)[0].name == f"a.jsonl:{row}"
    assert store.lengths.tolist() == [len(ids) for ids, _ in rows]
    assert store.targets.tolist() == [sum(end - start for start, end in runs) for _, runs in rows]
    assert report.tokens == store.lengths.sum()
    trained = [id for ids, runs in rows for start, end in runs for id in ids[start:end]]
    assert (report.targets, report.stops) == (len(trained), sum(id in (3, 4) for id in trained))
    with pytest.raises(IndexError):
        store.ids(len(rows))


def test_a_store_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [talk("a", "b")])
    stored(path)
    (file,) = (tmp_path / "cache").glob("*/rows.arrow")
    with open(file, "ab") as more:
        more.write(b"x")
    with pytest.raises(UserError, match="files have not the size they were written with; delete the folder"):
        stored(path)


def test_the_cache_is_keyed_by_files_and_settings_and_not_by_the_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [talk("a", "b"), talk("c", "d", "e", "f")])

    def there() -> int:
        return sum(entry.is_dir() for entry in (tmp_path / "cache").iterdir())

    dated = {"template": "dated", "stop": "<|end|>"}
    first = stored(path, **dated)
    monkeypatch.setattr("pipeline.data.rows.build.datetime", _Tomorrow)
    assert stored(path, **dated).content_hash == first.content_hash
    assert stored(path, most_bad=0.5, **dated).content_hash == first.content_hash
    assert there() == 1
    for count, changes in enumerate(
        ({"limit": 400}, {"train_on": "last"}, {"train_on_eos": "none"}, {"deduplicate": True}), 2
    ):
        stored(path, **dated, **changes)
        assert there() == count
    stored(path, template="phi3", stop="<|end|>")
    assert there() == 6
    path.write_text(json.dumps(talk("a", "c")))
    stored(path, **dated)
    assert there() == 7
    assert processes.LET_FIRST_RANK_S > 0


PREPARED = """
import json, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.helpers.data import prose
from tests.helpers.rows import stored, talk, write_jsonl
peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**10
folder, words = Path({folder!r}), prose(20_000).split()
row = lambda n: talk(*(" ".join(words[(n * 37 + 90 * part) % (len(words) - 80) :][:80]) for part in range(4)))
write_jsonl(folder / "small.jsonl", [row(n) for n in range(200)])
stored(folder / "small.jsonl", limit=4096)
before, rows = peak(), 0
with open(folder / "large.jsonl", "w") as out:
    while out.tell() < 10_000_000:
        out.write(json.dumps(row(rows)) + "\\n")
        rows += 1
store = stored(folder / "large.jsonl", limit=4096)
assert store.report.read == rows == len(store)
print(json.dumps([before, peak()]))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """10 MB of conversations; what a row leaves behind is a hash of 8 bytes. (100 MB took 78 MiB more, measured.)"""
    code = PREPARED.format(root=str(ROOT), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=280)
    before, after = json.loads(done.stdout)
    assert after - before < 100


class _Tomorrow:
    class date:
        @staticmethod
        def today() -> Any:
            import datetime

            return datetime.date.today() + datetime.timedelta(1)


@pytest.mark.parametrize("eval_size", [0.25, 3])
def test_whole_conversations_are_held_out(tmp_path: Path, eval_size: float) -> None:
    folder = tmp_path / "rows"
    writer, sizes = RowWriter(folder, frozenset()), [1 + number % 4 for number in range(12)]
    for number, size in enumerate(sizes):
        for _ in range(size):
            writer.add([5, 6, 7], [(1, 3)], number, "x")
    writer.close(name="a", kind="chat", bos=1, eos=2, read=12, bad=0, duplicates=0)
    store = UnequalRows(folder)
    found = split(Streams(store), eval_size)
    assert found.eval is not None
    held, kept = set(store.groups[found.eval.rows].tolist()), set(store.groups[found.train.rows].tolist())
    assert len(held) == 3
    assert not held & kept
    assert held | kept == set(range(12))
    rows = Counter(store.groups[np.concatenate([found.train.rows, found.eval.rows])].tolist())
    assert rows == dict(enumerate(sizes))
    with pytest.raises(UserError, match="would hold out 12 of 12 conversations"):
        split(Streams(store), 12)
