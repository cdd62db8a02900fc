"""Chunks and their cache, against cutting the whole stream in one go; memory, against what encoding whole needs."""

import hashlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pipeline.processes
from pipeline.console import UserError
from pipeline.data import chunks
from tests.helpers import data as helpers_data
from tests.helpers.data import ROOT, WILD, build, measure, prose, shelve, tokenizer, whole

FAST = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


# Streams and chunks


@FAST
@given(st.lists(WILD, min_size=1, max_size=6), st.integers(3, 70), st.booleans(), st.integers(1, 200))
def test_every_token_of_every_document_is_in_one_chunk_in_order_or_in_the_counted_tail(
    tmp_path: Path, texts: list[str], sequence_len: int, bos: bool, batch_tokens: int
) -> None:
    folder = shelve(tmp_path / "shelf", *texts)
    special = tokenizer("gpt2", bos)
    stream: list[int] = []
    owners: list[str] = []
    for number, text in enumerate(texts):
        ids = whole("gpt2", text.replace("\r\n", "\n"), bos=bos)
        ids = ids[1:] if bos and ids[:1] == [special.bos_token_id] else ids
        if ids:
            ids = ids if ids[-1] == special.eos_token_id else [*ids, special.eos_token_id]
            stream += ids
            owners += [f"{number:03}.txt"] * len(ids)
    body = sequence_len - bos
    count = len(stream) // body
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.data.store.BATCH_TOKENS", batch_tokens)
        patch.setattr("pipeline.data.store.BATCH_DOCUMENTS", 2)
        if not count:
            with pytest.raises(UserError, match=f"give {len(stream)} tokens, fewer than the {body} that one chunk"):
                build(folder, sequence_len=sequence_len, tokenizer=special)
            assert [path.name for path in (folder / "cache").iterdir()] == [".lock"]
            return
        store = build(folder, sequence_len=sequence_len, tokenizer=special).train
        expected = np.array(stream[: count * body]).reshape(count, body)
        for chunk in range(count):
            ids = store.ids(chunk).tolist()
            assert ids == [special.bos_token_id] * bos + expected[chunk].tolist()
            spans = store.documents(chunk)
            assert [span.name for span in spans for _ in range(span.start, span.end)] == owners[chunk * body :][:body]
            first = [i == 0 or owners[i] != owners[i - 1] for i in range(chunk * body, (chunk + 1) * body)]
            assert [span.start for span in spans if not span.continued] == [i + bos for i in np.flatnonzero(first)]
            assert spans[0].start == bos
            assert spans[-1].end == sequence_len
    report = store.report
    assert (len(store), report.tail_tokens) == (count, len(stream) - count * body)
    assert report.text_tokens + report.eos_tokens == report.chunks * body + report.tail_tokens
    chunk_bytes = b"".join(store.ids(chunk).tobytes() for chunk in range(count))
    assert report.sha256 == hashlib.sha256(chunk_bytes).hexdigest()
    assert report.documents == len(dict.fromkeys(owners))
    assert report.documents + report.empty_documents == len(texts)


def test_the_report_is_one_line_that_adds_up(tmp_path: Path) -> None:
    folder = shelve(tmp_path / "shelf", "roka " * 50, "", "mo</s>lin")
    tokens = sum(len(whole("gpt2", text)) for text in ("roka " * 50, "mo</s>lin"))
    report = build(folder, sequence_len=11).train.report
    chunks_, tail = divmod(tokens + 2, 10)
    assert str(report) == (
        f"books: 2 documents, {tokens} tokens + 2 EOS = {chunks_} chunks × 10 (after BOS) + {tail} dropped "
        f"from the tail; "
        f"1 empty documents left out; 1 special tokens are spelled out in the text; read as UTF-8"
    )
    without = build(folder, sequence_len=11, tokenizer=tokenizer("gpt2", bos=False)).train.report
    assert "chunks × 11 (no BOS, the tokenizer has none)" in str(without)


def test_unknown_tokens_are_counted(tmp_path: Path) -> None:
    folder = shelve(tmp_path / "shelf", "roka " * 50 + "日 本")
    report = build(folder, tokenizer=tokenizer("wordpiece")).train.report
    assert report.unknown_tokens == whole("wordpiece", "roka " * 50 + "日 本").count(0) == 2
    assert report.special_tokens == 0
    assert "2 tokens are unknown to the tokenizer" in str(report)


def test_a_tokenizer_without_eos_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the tokenizer has no EOS token.*tokenizer_config\.json"):
        build(shelve(tmp_path / "shelf", prose(100)), tokenizer=tokenizer("gpt2", eos=False))


def test_bos_and_eos_that_a_document_spells_out_are_not_doubled(tmp_path: Path) -> None:
    folder = shelve(tmp_path / "shelf", "<s>roka", "linmo</s>", "ka<s>mo</s>ber", "<s>", "<s></s>", "</s>")
    documents_ = ["roka</s>", "linmo</s>", "ka<s>mo</s>ber</s>", "</s>", "</s>"]
    stream = [id for text in documents_ for id in whole("gpt2", text)]
    streams = build(folder, sequence_len=len(stream) + 1)
    assert streams.train.ids(0).tolist() == [1, *stream]
    assert streams.train.report.empty_documents == 1
    assert streams.train.report.eos_tokens == 2


def test_bos_inside_a_document_stays_wherever_segments_begin(tmp_path: Path) -> None:
    writer = helpers_data.ChunkWriter(tmp_path / "store", "books", "all", 6, helpers_data.MARKS)
    for ids, last in (([1, 7], False), ([1, 8], False), ([2], False), ([], True)):
        writer.add("a.txt", np.array(ids, dtype=np.int32), last)
    assert writer.add("b.txt", np.array([9], dtype=np.int32), True) is None
    assert writer.close().tail_tokens == 1
    assert helpers_data.ChunkStore(tmp_path / "store").ids(0).tolist() == [1, 7, 1, 8, 2, 9]


# The cache


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    return shelve(tmp_path / "shelf", *(prose(60 + 40 * i, seed=i) for i in range(10)))


def cached(shelf: Path) -> set[Path]:
    """The stores in the cache beside the texts."""
    return {path for path in (shelf / "cache").iterdir() if path.is_dir()}


def test_the_cache_is_keyed_by_content_tokenizer_and_settings(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(shelf)
    (shelf / "001.txt").touch()
    moved = shelf.rename(shelf.with_name("moved"))
    first = cached(moved)
    assert len(first) == 1
    with monkeypatch.context() as patch:
        patch.setattr(chunks, "tokens", None)  # nothing is tokenised again
        build(moved)
        build(moved, eval_size=0.5)  # a split by chunk needs no other chunks
        assert cached(moved) == first
    held_out = {"eval_size": 2, "eval_split": "document"}
    others: list[dict[str, Any]] = [
        {"sequence_len": 33},
        {"name": "novels"},
        {"tokenizer": tokenizer("llama3")},
        {"tokenizer": tokenizer("gpt2", bos=False)},
        held_out | {"eval_size": 3},
        {"join_lines": True},
        {"field_text": "body"},
    ]
    for changes in others:
        build(moved, **changes)
    (moved / "001.txt").rename(moved / "0011.txt")
    build(moved)
    (moved / "002.txt").write_text(prose(200))
    build(moved)
    before = cached(moved)
    assert len(before) == 1 + len(others) + 2
    split = build(moved, **held_out)
    (path,) = cached(moved) - before
    loaded = chunks.load(path)
    assert loaded.eval is not None
    assert [s.report for s in loaded.stores] == [s.report for s in split.stores]
    assert [(loaded.eval.ids(i) == split.eval.ids(i)).all() for i in range(len(loaded.eval))]  # type: ignore[union-attr]


def test_a_store_that_is_not_whole_is_refused(shelf: Path) -> None:
    build(shelf)
    (path,) = cached(shelf)
    with open(path / "all/chunks.arrow", "r+b") as file:
        file.truncate(100)
    with pytest.raises(UserError, match="have not the size they were written with; delete the folder"):
        build(shelf)
    (path / "all/documents.arrow").unlink()
    with pytest.raises(UserError, match="not a whole store of chunks"):
        chunks.load(path)


def _interrupt(_: Any, read: Any, *__: Any) -> Any:
    next(read)
    yield "0.txt", np.arange(100, dtype=np.int32), True
    raise KeyboardInterrupt


def test_an_interrupted_build_leaves_nothing(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(chunks, "tokens", _interrupt)
        build(shelf)
    assert [path.name for path in (shelf / "cache").iterdir()] == [".lock"]


def test_a_full_disk_is_one_message_and_leaves_nothing(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        with open("/dev/full", "w") as file:
            file.write("x")

    monkeypatch.setattr("pipeline.data.arrow_files.ArrowFile.write", full)
    with pytest.raises(
        UserError, match=r"cannot write .*cache/.*: the disk is full: about [0-9.]+ KiB needed, .* free at .*cache"
    ) as error:
        build(shelf)
    assert error.value.exit_code == 28
    assert [path.name for path in (shelf / "cache").iterdir()] == [".lock"]


def _build_slowly(shelf: Path, log: Path) -> None:
    """Build, noting in `log` that tokenising began; it takes a while."""
    tokens = chunks.tokens

    def slow(*arguments: Any) -> Any:
        with open(log, "a") as file:
            file.write("began\n")
        time.sleep(1)
        yield from tokens(*arguments)

    chunks.tokens = slow  # type: ignore
    build(shelf)


def test_of_several_processes_one_builds_and_a_killed_one_is_in_nobodys_way(shelf: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    fork = multiprocessing.get_context("fork")
    killed = fork.Process(target=_build_slowly, args=(shelf, log))
    killed.start()
    deadline = time.monotonic() + 20
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert killed.pid
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    assert [path.name for path in (shelf / "cache").glob(".staging*/*")] == ["all"]
    processes = [fork.Process(target=_build_slowly, args=(shelf, log)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert log.read_text() == "began\n" * 2  # the killed one's, and one
    assert not list((shelf / "cache").glob(".staging*"))
    assert len(build(shelf).train)


def _build_as(rank: int, shelf: Path, log: Path) -> None:
    os.environ["RANK"] = str(rank)
    time.sleep(0.5 * (rank == 0))  # the first rank comes last
    tokens = chunks.tokens

    def noted(*arguments: Any) -> Any:
        with open(log, "a") as file:
            file.write(f"{rank}\n")
        return tokens(*arguments)

    chunks.tokens = noted  # type: ignore
    build(shelf)


def test_the_first_rank_builds_since_it_shows_progress(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_build_as, args=(rank, shelf, tmp_path / "log")) for rank in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "0\n"
    shutil.rmtree(shelf / "cache")
    monkeypatch.setattr(pipeline.processes, "LET_FIRST_RANK_S", 0.1)
    monkeypatch.setenv("RANK", "1")
    assert len(build(shelf).train)  # alone, another rank builds after all


# Memory and names


@pytest.mark.slow
def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    """8 MB of text in one document. Encoded whole, that takes 800 MiB (100 bytes for each byte of text, measured).
    In segments it is what one batch of 2 MiB takes, 200 MiB at most, whatever the size of the text."""
    before, after = measure(tmp_path, "large.txt", 8)
    assert after - before < 200


@pytest.mark.slow
@pytest.mark.parametrize("file", ["large.txt", "large.jsonl"])
def test_a_hundred_megabytes_are_not_held_more_often_than_needed(tmp_path: Path, file: str) -> None:
    """A text file of any size is never held. A row of a list is: its line, and its value, of four bytes a character here."""
    before, after = measure(tmp_path, file, 100)
    assert file == "large.jsonl" or after < 10**9 / 2**20
    assert after - before < (250 if file == "large.txt" else (1 + 4 + 4) * 100 * 10**6 / 2**20)


def test_the_folder_named_datasets_does_not_hide_hugging_faces_package() -> None:
    assert (ROOT / "datasets").is_dir()
    assert not list((ROOT / "datasets").rglob("*.py"))
    for command in (["-c", "import datasets; print(datasets.Dataset)"], ["-m", "datasets.config"]):
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
