"""Datasets that are read as they are trained on: what a window holds, where it is resumed, what is on the disk.

Oracle of the order: every row of a stream exactly once a pass, and the run that was not interrupted.
"""

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pytest

from pipeline.config import loading
from pipeline.config.data_tables import Dataset
from pipeline.console import UserError
from pipeline.data.batches import Position
from pipeline.data.streaming import kinds
from pipeline.data.streaming.cursor import Cursor
from pipeline.data.streaming.sources import LocalFiles, rows_of
from pipeline.data.streaming.windows import INDEX, Windows
from pipeline.publishing import card_text
from pipeline.training.data import specs
from pipeline.training.data.batches import micro_batches
from pipeline.training.data.read import read_data
from pipeline.training.run import record
from tests.helpers.configs import problems, small
from tests.helpers.data import tokenizer
from tests.helpers.rows import write_jsonl

SIZE = 20  # rows of a window
STREAMED = {"streaming": True, "window_rows": SIZE}


def numbered(folder: Path, counts: list[int], bad: tuple[int, ...] = ()) -> Path:
    """Files of rows of token ids of unequal length, each row known by its first id."""
    number = 0
    for file, count in enumerate(counts):
        rows: list[Any] = []
        for _ in range(count):
            rows.append("{" if number in bad else {"input_ids": [10 + number] * (2 + number % 5)})
            number += 1
        write_jsonl(folder / f"{file}.jsonl", rows)
    return folder / "*.jsonl"


def spec_of(folder: Path, path: Path | str, **changes: Any) -> Any:
    dataset = {"name": "ids", "dataset_type": "pretokenized", "dataset_path": str(path), "sequence_len": 8, **STREAMED}
    keys = {key: changes.pop(key) for key in list(changes) if key in Dataset.model_fields}
    raw = small(
        model="m", output_dir=str(folder / "runs"), epochs=None, max_steps=9, datasets=[dataset | keys], **changes
    )
    return specs.data_of(loading.validate(raw, "x.toml"))


@pytest.fixture(autouse=True)
def _without_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(specs, "stop_ids", lambda folder: [])


def steps_of(batches: Any, position: Position, count: int) -> tuple[list[list[int]], Position]:
    """First ids of the rows of each of the next steps, in order, and where they end."""
    found = []
    for _ in range(count):
        micro_batches, info = batches.step(position)
        rows = [b.input_ids[place, 0].item() for b in micro_batches for place, row in enumerate(b.rows) if row]
        found.append([int(first) - 10 for first in rows])
        position = info.next_position
    return found, position


def opened(spec: Any, replica: int = 0, replicas: int = 1) -> Any:
    return micro_batches(spec, read_data(spec, tokenizer()), replica, replicas)


# What a window holds


def test_every_row_comes_once_a_pass_in_windows_that_are_shuffled(tmp_path: Path) -> None:
    """47 rows of three files in windows of 20: 20, 20 and 7, and then from the beginning in another order."""
    spec = spec_of(tmp_path, numbered(tmp_path, [13, 0, 29, 5]), micro_batch_size_per_gpu=3)
    batches = opened(spec)
    found, position = [list[int]() for _ in range(6)], Position()
    while position.epoch < 6:
        (rows,), after = steps_of(batches, position, 1)
        found[position.epoch] += rows
        position = after
    for window, rows in enumerate(found):
        begin = window % 3 * SIZE
        assert sorted(rows) == list(range(begin, min(begin + SIZE, 47)))
        assert rows != sorted(rows)
    assert found[0] != found[3]
    assert found[1] != [row + SIZE for row in found[0]]


@pytest.mark.parametrize("how", ["at once", "afresh", "without the index", "with nothing left"])
def test_it_goes_on_at_any_row_as_if_it_had_not_stopped(tmp_path: Path, how: str) -> None:
    spec = spec_of(tmp_path, numbered(tmp_path, [31, 16]), gradient_accumulation_steps=2)
    whole, position = [], Position()
    batches = opened(spec)
    places = []
    for _ in range(60):  # two passes and more
        places.append(position)
        rows, position = steps_of(batches, position, 1)
        whole += rows
    cache = tmp_path / "runs" / "dataset_cache"
    tried = range(len(places)) if how == "at once" else (0, 9, 10, 11, 23, 24, 25, 47, 59)
    for step in tried:
        if how != "at once":
            batches = opened(spec)
        for file in cache.glob(f"*/{INDEX}") if how == "without the index" else ():
            file.unlink()
        for file in sorted(cache.glob("*/**/*"), reverse=True) if how == "with nothing left" else ():
            file.rmdir() if file.is_dir() else file.unlink()
        here = batches if how == "at once" else opened(spec)
        count = min(3, len(places) - step)
        assert steps_of(here, places[step], count)[0] == whole[step : step + count]


@pytest.mark.parametrize("replicas", [1, 2])
def test_it_goes_on_after_every_row_of_three_hundred(tmp_path: Path, replicas: int) -> None:
    """A step is a row of each replica: after every k of 0 … 300 rows the rest is what it was."""
    spec = spec_of(tmp_path, numbered(tmp_path, [150, 101]), window_rows=60)
    whole = [opened(spec, replica, replicas) for replica in range(replicas)]
    again = [opened(spec, replica, replicas) for replica in range(replicas)]
    position, seen = Position(), list[int]()
    expected = {}
    for _ in range(300 // replicas):
        both = [steps_of(batches, position, 1) for batches in whole]
        expected[position] = sorted(row for (rows,), _ in both for row in rows)
        seen += expected[position]
        (position,) = {after for _, after in both}
    assert sorted(seen[:251]) == list(range(251))
    for place in sorted(expected, key=lambda p: (-p.epoch, p.rows)):  # the last windows first
        rows = sorted(row for batches in again for (of_step,), _ in [steps_of(batches, place, 1)] for row in of_step)
        assert rows == expected[place]


def test_two_replicas_see_the_rows_that_one_sees(tmp_path: Path) -> None:
    path = numbered(tmp_path, [47])
    one = opened(spec_of(tmp_path, path, gradient_accumulation_steps=4))
    halves = [opened(spec_of(tmp_path, path, gradient_accumulation_steps=2), replica, 2) for replica in (0, 1)]
    position = Position()
    for _ in range(25):
        (rows,), after = steps_of(one, position, 1)
        both = [steps_of(half, position, 1) for half in halves]
        assert {place for _, place in both} == {after}
        assert sorted(rows) == sorted(row for (found,), _ in both for row in found)
        assert len({batches.order_hash(position.epoch) for batches in (one, *halves)}) == 1
        position = after


def test_few_windows_are_on_the_disk(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, numbered(tmp_path, [400]), micro_batch_size_per_gpu=7)
    batches, position, most = opened(spec), Position(), 0
    while position.epoch < 20:
        _, position = steps_of(batches, position, 1)
        (folder,) = {path.parent for path in (tmp_path / "runs" / "dataset_cache").glob("*/windows.jsonl")}
        most = max(most, len(list(folder.glob("*window-*"))))
    assert most <= 3
    index = [json.loads(line) for line in (folder / INDEX).read_text().splitlines() if line]
    assert [entry["begins"] for entry in index if "begins" in entry] == list(range(1, 20))
    assert len((folder / INDEX).read_bytes()) < 150 * 2 * 20


def test_what_was_read_is_recorded(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, numbered(tmp_path, [47]), micro_batch_size_per_gpu=20)
    data = read_data(spec, tokenizer())
    steps_of(micro_batches(spec, data), Position(), 3)
    described = record.describe(data)
    made = {"windows": 3, "window_rows": SIZE, "windows_in_all": 3}
    tokens = sum(2 + number % 5 for number in range(47))
    assert described == [{"use": "training", "name": "ids", "documents": 47, "tokens": tokens, "streaming": made}]
    facts: Any = SimpleNamespace(data=described, epochs=None)
    shown = card_text.data(facts)
    assert shown is not None
    assert shown.rows[0][-2:] == ("streamed, 3 windows of 20", "all that was read")


def test_windows_without_a_target_are_passed_over(tmp_path: Path) -> None:
    rows = [{"input_ids": [10 + n] * 4, "labels": [-100 if 20 <= n < 60 else 10 + n] * 4} for n in range(70)]
    spec = spec_of(tmp_path, write_jsonl(tmp_path / "a.jsonl", rows), micro_batch_size_per_gpu=5)
    batches = opened(spec)
    found, position = steps_of(batches, Position(), 8)
    assert sorted(chain(*found[:4])) == list(range(20))
    assert sorted(chain(*found[4:6])) == list(range(60, 70))  # window 3, after two without
    assert position.epoch == 4
    assert batches.step(position)[1].rows
    empty = write_jsonl(tmp_path / "none.jsonl", [row | {"labels": [-100] * 4} for row in rows])
    with pytest.raises(UserError, match=r"'ids': nothing of window 0 is left to train on. Give a larger window_rows"):
        opened(spec_of(tmp_path, empty))


def test_bad_rows_are_counted_over_all_windows(tmp_path: Path) -> None:
    path = numbered(tmp_path, [47], bad=(3, 25, 26))
    batches = opened(spec_of(tmp_path, path, max_bad_rows=0.06))
    _, position = steps_of(batches, Position(), 18)
    with pytest.raises(UserError, match=r"3 of 40 rows are bad \(7\.5%\), more than max_bad_rows = 0\.06"):
        steps_of(batches, position, 1)  # 1 of 20 was not too much
    assert steps_of(opened(spec_of(tmp_path, path, max_bad_rows=0.08)), position, 1)[0]


def test_a_text_is_cut_window_by_window(tmp_path: Path) -> None:
    """Each window's documents are one stream of chunks, whatever kind of file they are in."""
    texts = [f"document {number}: " + "word " * (number % 7 + 3) for number in range(50)]
    write_jsonl(tmp_path / "rows.jsonl", [{"body": text} for text in texts])
    (tmp_path / "books").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "books" / f"{number:02}.txt").write_text(text)
    common = {"sequence_len": 12, "dataset_type": "doclist", "field_text": "body"}
    rows = opened(spec_of(tmp_path, tmp_path / "rows.jsonl", **common))
    common = {"sequence_len": 12, "dataset_type": "textfile"}
    books = opened(spec_of(tmp_path, tmp_path / "books" / "*.txt", **common))
    assert rows.fixed_shape == books.fixed_shape == (1, 12)
    encode = tokenizer()
    for window in range(4):
        ids: list[int] = []
        for text in (texts * 2)[50 * (window // 3) + window % 3 * SIZE :][: min(SIZE, 50 - window % 3 * SIZE)]:
            ids += [*encode(text, add_special_tokens=False)["input_ids"], encode.eos_token_id]
        for batches in (rows, books):
            store = batches._at(window).stores[0]
            got = np.concatenate([store.ids(row)[1:] for row in range(len(store))])
            assert got.tolist() == ids[: len(got)]
            assert len(ids) - len(got) < 11


def test_conversations_and_packed_rows_are_streamed(tmp_path: Path) -> None:
    rows = [{"prompt": f"say {n}", "completion": "so " * (n % 9 + 1)} for n in range(90)]
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    common = {"dataset_type": "completion", "sequence_len": 64, "packing": "best_fit"}
    batches = opened(spec_of(tmp_path, path, **common))
    assert batches.fixed_shape == (1, 64)  # packed rows of any window have one length
    names = [
        batches._at(window).documents([(0, n) for n in range(len(batches._at(window).stores[0]))]) for window in (0, 1)
    ]
    assert sorted(names[1], key=lambda name: int(name.rpartition(":")[2])) == [
        f"ids: pairs.jsonl:{n}" for n in range(SIZE + 1, 2 * SIZE + 1)
    ]
    loose = opened(spec_of(tmp_path, path, **{**common, "packing": "none"}))
    assert loose.fixed_shape is None


# Where it comes from


def test_a_cursor_knows_its_place_and_its_end() -> None:
    at = [0]

    def items() -> Iterator[int]:
        for number in range(7):
            at[0] += 1
            yield number

    cursor = Cursor(items(), lambda: at[0])
    assert (list(cursor.take(3)), cursor.place, cursor.ended) == ([0, 1, 2], 3, False)
    assert (list(cursor.take(4)), cursor.place, cursor.ended) == ([3, 4, 5, 6], 7, True)
    assert list(cursor.take(4)) == []


def test_files_are_gone_on_with_at_any_row(tmp_path: Path) -> None:
    source = rows_of("pretokenized", str(numbered(tmp_path, [3, 0, 4, 1])), "ids")
    assert isinstance(source, LocalFiles)
    everything = [record.value["input_ids"][0] for record in source.open(None).take(99)]
    assert everything == list(range(10, 18))
    for done in range(9):
        cursor = source.open(None)
        assert len(list(cursor.take(done))) == done
        rest = source.open(json.loads(json.dumps(cursor.place)))
        assert [record.value["input_ids"][0] for record in rest.take(99)] == everything[done:]
        assert rest.ended


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_rows_from_elsewhere_are_gone_on_with_at_any_row(tmp_path: Path, ending: str) -> None:
    """In fsspec's memory, two files; the state of datasets' stream is taken and put back after any number of rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    there = fsspec.filesystem("memory")
    for file, numbers in enumerate((range(10, 20), range(20, 27))):
        rows = [{"input_ids": [number] * 3} for number in numbers]
        name = f"/{tmp_path.name}-{ending}/{file}.{ending}"
        if ending == "jsonl":
            there.pipe(name, "".join(json.dumps(row) + "\n" for row in rows).encode())
        else:
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=4)
            there.pipe(name, (tmp_path / "a.parquet").read_bytes())
    path = f"memory://{tmp_path.name}-{ending}/*.{ending}"
    source = rows_of("pretokenized", path, "ids")
    for done in (0, 1, 4, 5, 9, 10, 11, 16, 17):
        cursor = source.open(None)
        taken = [record.value["input_ids"] for record in cursor.take(done)]
        rest = source.open(json.loads(json.dumps(cursor.place)))
        left = list(rest.take(99))
        assert taken + [record.value["input_ids"] for record in left] == [[n] * 3 for n in range(10, 27)]
        assert not left or left[0].where == f"ids#{done + 1}"
    spec = spec_of(tmp_path, path, micro_batch_size_per_gpu=9, window_rows=12)
    found, _ = steps_of(opened(spec), Position(), 4)
    assert [sorted(chain(*window)) for window in (found[:2], found[2:3])] == [list(range(12)), list(range(12, 17))]
    for kind, other, message in (
        ("pretokenized", path.replace(ending, "csv"), "names no file that this dataset_type reads"),
        ("textfile", path, "text files that are not on this machine are not streamed"),
    ):
        with pytest.raises(UserError, match=message):
            opened(spec_of(tmp_path, other, dataset_type=kind))
    there.pipe(f"/{tmp_path.name}-{ending}/b.csv", b"input_ids\n1\n")
    with pytest.raises(UserError, match=r"files of one kind are streamed, .*; it has \.csv, \."):
        rows_of("pretokenized", f"memory://{tmp_path.name}-{ending}/*", "ids")


def test_a_window_that_was_half_made_is_made_anew(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, numbered(tmp_path, [47]))
    data = read_data(spec, tokenizer())
    assert data.stream is not None
    windows: Windows[Any] = data.stream.windows
    write = kinds.Rows.write

    def killed(kind: Any, staging: Path, items: Iterator[Any]) -> None:
        next(items)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kinds.Rows, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            windows.store(1)
    assert kinds.Rows.write is write
    store: Any = windows.store(1)
    assert sorted(int(store.ids(row)[0]) - 10 for row in range(len(store))) == list(range(20, 40))
    (windows.folder / INDEX).open("a").write('\n{"begins": 3, "pla')  # as a kill leaves it
    assert len(windows.store(2)) == 7


# What goes with it


def test_what_has_no_meaning_with_a_stream_is_said() -> None:
    dataset = {"name": "a", "dataset_type": "doclist", "dataset_path": "a", "sequence_len": 64, "streaming": True}
    fine = {"epochs": None, "max_steps": 5}
    for changes, table, line in (
        ({"epochs": 2}, {}, "epochs: with streaming = true nobody knows where an epoch ends"),
        ({"max_steps": None, "epochs": 1}, {}, "max_steps: required with streaming = true"),
        (
            {"save_every_n_epochs": 2},
            {},
            "save_every_n_epochs: with streaming = true there are no epochs; use save_steps",
        ),
        ({"warmup_steps": 0.1}, {}, "warmup_steps: 0.1 is a part of an epoch"),
        ({}, {"eval_size": 0.1}, "datasets.0.eval_size: nothing is held out of a stream"),
        ({}, {"subsample": 0.5}, "datasets.0.subsample: is of a dataset's rows together"),
        ({}, {"num_repeats": 2.0}, "datasets.0.num_repeats: is of a dataset's rows together"),
        ({}, {"max_tokens": 9}, "datasets.0.max_tokens: is of a dataset's rows together"),
        (
            {},
            {"streaming": False, "window_rows": 9},
            "datasets.0.window_rows: has a meaning with streaming = true only",
        ),
        ({}, {"dataset_type": "preference"}, "datasets.0.streaming: has a meaning for 'textfile'"),
    ):
        said = problems(small(**{**fine, **changes}, datasets=[dataset | table]))
        assert any(problem.startswith(line) for problem in said), said
    several = problems(small(**fine, datasets=[dataset, dataset | {"name": "b", "streaming": False}]))
    assert several[0].startswith("datasets: one with streaming = true is a run's only one")
    assert loading.validate(small(**fine, datasets=[dataset]), "x.toml").datasets[0].window_rows == 10_000
