"""Preparing: killed and gone on with, in several processes, with hashes that are remembered; how often files are touched."""

import json
import multiprocessing
import os
import signal
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.console import UserError
from pipeline.data import chunks
from pipeline.data.preparing import hashes, journal, workers
from pipeline.data.reading.sources import find
from pipeline.data.rows import build as rows_build
from pipeline.data.rows import prepared
from tests.helpers.data import build, prose, shelve
from tests.helpers.rows import stored, talk, write_jsonl

FORK = multiprocessing.get_context("fork")


def in_a_process(work: Callable[[], Any]) -> int | None:
    """Its exit code."""
    process = FORK.Process(target=work)
    process.start()
    process.join(120)
    return process.exitcode


# Killed


@pytest.fixture
def talks(tmp_path: Path) -> Path:
    """Three files, with bad rows, and rows that are the same as one of a file before."""
    for file in range(3):
        rows: list[Any] = [talk(f"question {file} {row}", f"answer {row} of {file}") for row in range(150)]
        rows[40], rows[41] = '{"messages": [', talk("question 0 3", "answer 3 of 0")
        write_jsonl(tmp_path / f"{file}.jsonl", rows)
    return tmp_path / "*.jsonl"


@pytest.mark.parametrize("processes", [1, 2])
def test_rows_that_were_made_before_a_kill_are_not_made_again(
    talks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    expected = stored(talks, processes=1)
    monkeypatch.setattr(journal, "PART_IDS", 900)
    (tmp_path / "again").mkdir()
    for file in tmp_path.glob("*.jsonl"):
        file.rename(tmp_path / "again" / file.name)
    path, made = tmp_path / "again" / "*.jsonl", tmp_path / "made"
    make = prepared.made_of

    def noting(*arguments: Any) -> Any:
        with open(made, "a") as file:
            file.write("".join(f"{record.where}\n" for record in arguments[1]))
        return make(*arguments)

    add = rows_build._add

    def killed_at_300(writer: Any, met: Any, one: Any) -> None:
        add(writer, met, one)
        if met.read == 300:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(prepared, "made_of", noting)
    with monkeypatch.context() as patch:
        patch.setattr(rows_build, "_add", killed_at_300)
        assert in_a_process(lambda: stored(path, processes=processes)) == -signal.SIGKILL
    time.sleep(0.2)  # until its processes are gone, too
    before = made.read_text().splitlines()
    made.unlink()
    found = stored(path, processes=processes)
    after = made.read_text().splitlines()
    assert 0 < len(after) < 300
    assert len(set(before) | set(after)) == 447  # all but the three that are no JSON
    if processes == 1:
        assert len(before) + len(after) < 447 + 3 * prepared.AT_ONCE
    assert found.content_hash == expected.content_hash
    assert found.report == expected.report
    assert found.report.duplicates == 3
    assert not list((tmp_path / "again" / "cache").glob(".parts*"))


@pytest.mark.parametrize("held_out", [0, 2])
def test_documents_that_were_tokenised_before_a_kill_are_not_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held_out: int
) -> None:
    texts = [prose(300, seed=number).replace("ka", "k\x07a" if number == 1 else "ka", 1) for number in range(8)]
    shelf, other = shelve(tmp_path / "a", *texts), shelve(tmp_path / "b", *texts)
    split: dict[str, Any] = {"eval_size": held_out, "eval_split": "document"} if held_out else {}
    expected = build(shelf, join_lines=True, **split)
    monkeypatch.setattr(journal, "PART_IDS", 700)
    tokens, encoded = chunks.tokens, tmp_path / "encoded"

    def one_by_one(tokenizer: Any, read: Iterator[Any], processes: int) -> Iterator[Any]:
        for document in read:
            with open(encoded, "a") as file:
                file.write(document.name + "\n")
            yield from tokens(tokenizer, [document])

    add = chunks.ChunkWriter.add

    def killed_at_the_sixth(writer: Any, name: str, ids: Any, last: bool) -> None:
        if name == "005.txt":
            os.kill(os.getpid(), signal.SIGKILL)
        add(writer, name, ids, last)

    monkeypatch.setattr(chunks, "tokens", one_by_one)
    with monkeypatch.context() as patch:
        patch.setattr(chunks.ChunkWriter, "add", killed_at_the_sixth)
        assert in_a_process(lambda: build(other, join_lines=True, **split)) == -signal.SIGKILL
    encoded.unlink()
    found = build(other, join_lines=True, **split)
    again = encoded.read_text().split()
    assert again[-1] == "007.txt"
    assert 2 <= len(again) <= 4
    assert [store.report for store in found.stores] == [store.report for store in expected.stores]
    assert found.train.report.findings.control_characters == 1
    assert not list((other / "cache").glob(".parts*"))


def test_what_is_left_of_other_files_is_cleared(talks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "PART_IDS", 200)
    cache = tmp_path / "cache"

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(rows_build, "_will_not_stop", stopped)
        stored(talks)
    (left,) = cache.glob(".parts*")
    (tmp_path / "0.jsonl").unlink()
    stored(talks)
    assert not left.exists()


# In several processes


def test_several_processes_make_what_one_makes(talks: Path, tmp_path: Path) -> None:
    one = stored(talks, processes=1)
    (tmp_path / "cache").rename(tmp_path / "of one")
    several = stored(talks, processes=3)
    assert several.report == one.report
    texts = [prose(2000, seed=number) for number in range(5)]
    shelf, other = shelve(tmp_path / "a", *texts), shelve(tmp_path / "b", *texts)
    assert build(shelf, processes=3).train.report == build(other, processes=1).train.report


def test_results_come_in_order_and_few_are_ahead() -> None:
    read: list[int] = []

    def items() -> Iterator[int]:
        for number in range(40):
            read.append(number)
            yield number

    def slow_at_first(number: int) -> int:
        time.sleep(0.05 if number == 0 else 0)
        return number * number

    results = workers.in_order(slow_at_first, items(), 2)
    assert next(results) == 0
    assert len(read) <= 2 * workers.AHEAD + 1
    assert list(results) == [number * number for number in range(1, 40)]


def test_an_error_and_a_killed_process_are_said(talks: Path) -> None:
    def work(number: int) -> int:
        if number == 3:
            raise UserError("three is bad")
        if number == 13:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    with pytest.raises(UserError, match="three is bad"):
        list(workers.in_order(work, range(9), 2))
    with pytest.raises(UserError, match="one of the 2 processes that prepare the data was killed") as error:
        list(workers.in_order(work, range(10, 19), 2))
    assert error.value.exit_code == 5
    with pytest.raises(UserError, match=r"0\.jsonl:1: a row has .* tokens, more than sequence_len"):
        stored(talks, limit=3, too_long="error", processes=2)


def test_small_data_begins_no_processes() -> None:
    cores = len(os.sched_getaffinity(0))
    assert workers.processes_for(2**20, None) == 1
    assert workers.processes_for(2**30, None) == cores
    assert workers.processes_for(5, 3) == 3


# Files


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """How often files are opened, and how often their status is asked for."""
    found: Counter[str] = Counter()
    names = {"open": "open", "stat": "stat", "lstat": "stat", "listdir": "listdir"}
    real = {name: getattr(os, name) for name in names}
    import builtins
    import io

    opens = io.open

    def counting(name: str, call: Any) -> Any:
        def called(*arguments: Any, **options: Any) -> Any:
            found[name] += 1
            return call(*arguments, **options)

        return called

    with pytest.MonkeyPatch.context() as patch:
        for name, kind in names.items():
            patch.setattr(os, name, counting(kind, real[name]))
        patch.setattr(io, "open", counting("open", opens))
        patch.setattr(builtins, "open", counting("open", opens))
        yield found


def small_files(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        (folder / f"{number:06}.txt").write_text(f"text {number}")
    return folder


def test_a_file_more_costs_two_looks_and_one_opening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a dataset that is in the cache; when it is built a file is opened twice more: for its hash, and to be read."""
    monkeypatch.setattr(hashes, "SETTLED_S", 0.0)
    costs: dict[int, list[Counter[str]]] = {}
    for count in (50, 100):
        folder = small_files(tmp_path / str(count), count)
        time.sleep(0.05)
        costs[count] = []
        for _ in range(2):
            with counted() as touched:
                build(folder)
            costs[count].append(touched)
    first, again = ({kind: costs[100][n][kind] - costs[50][n][kind] for kind in ("open", "stat")} for n in (0, 1))
    assert again == {"open": 50, "stat": 100}
    assert first == {"open": 150, "stat": 150}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_hundred_thousand_files_cost_as_much_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "SETTLED_S", 0.0)
    costs = []
    for count in (100, 100_000):
        folder = small_files(tmp_path / str(count), count)
        time.sleep(0.05)
        for _ in range(2):
            with counted() as touched:
                store = build(folder, sequence_len=64).train
            costs.append({kind: touched[kind] for kind in ("open", "stat")})
        assert store.report.documents == count
    for kind, each in (("open", (3, 1)), ("stat", (3, 2))):
        for n in (0, 1):
            more = costs[2 + n][kind] - costs[n][kind]
            assert more <= each[n] * 99_900 + 1000, f"{kind}: {costs}"  # the store itself has more files' worth of text


# Hashes


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The names of the files of which a hash was computed."""
    monkeypatch.setattr(hashes, "SETTLED_S", 0.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "machine"))
    names, computed = list[str](), hashes._computed

    def noting(path: Path) -> str:
        names.append(path.name)
        return computed(path)

    monkeypatch.setattr(hashes, "_computed", noting)
    return names


def digests(folder: Path) -> list[str]:
    time.sleep(0.02)
    paths = [path for path, _ in find("textfile", str(folder / "*.txt"))]
    return hashes.sha256_of(paths, [path.stat() for path in paths])


def test_a_hash_is_computed_once(tmp_path: Path, hashed: list[str]) -> None:
    folder = shelve(tmp_path / "texts", "a", "b", "c")
    first = digests(folder)
    assert hashed == ["000.txt", "001.txt", "002.txt"]
    assert digests(folder) == first
    build(folder, sequence_len=3)
    assert len(hashed) == 3
    (folder / "001.txt").write_text("B")  # of the same size
    changed = digests(folder)
    assert hashed[3:] == ["001.txt"]
    assert [changed[n] == first[n] for n in range(3)] == [True, False, True]
    status = (folder / "002.txt").stat()
    (folder / "002.txt").write_text("C")
    os.utime(folder / "002.txt", ns=(status.st_atime_ns, status.st_mtime_ns))  # of the same time, too
    assert digests(folder)[2] != changed[2]


def test_processes_wait_for_the_one_that_computes(
    tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, log = shelve(tmp_path / "texts", "a", "b"), tmp_path / "log"
    computed = hashes._computed

    def slow(path: Path) -> str:
        with open(log, "a") as file:
            file.write(f"{path.name}\n")
        time.sleep(0.1)
        return computed(path)

    monkeypatch.setattr(hashes, "_computed", slow)
    time.sleep(0.05)
    processes = [FORK.Process(target=digests, args=(folder,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert log.read_text().split() == ["000.txt", "001.txt"]


@pytest.mark.parametrize("spoil", ["folder", "file", "settling"])
def test_without_a_memory_hashes_are_computed(
    tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch, spoil: str
) -> None:
    folder = shelve(tmp_path / "texts", "a", "b")
    if spoil == "folder":
        (tmp_path / "machine").write_text("a file")
    elif spoil == "file":
        hashes.memory().write_bytes(b"no database" * 1000)
    else:
        monkeypatch.setattr(hashes, "SETTLED_S", 60.0)
    assert digests(folder) == digests(folder)
    assert len(hashed) == 4
    (folder / "000.txt").unlink()
    missing = folder / "000.txt"
    with pytest.raises(UserError, match=r"000\.txt: cannot be read"):
        hashes.sha256_of([missing], [os.stat(folder)])


def test_a_large_file_is_hashed_in_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "large.txt"
    with open(path, "wb") as file:
        file.truncate(2**26)
    tracemalloc.start()
    hashes.sha256_of([path], [path.stat()])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**21


def test_an_entry_comes_back_as_it_was() -> None:
    given = prepared.Prepared(
        "a:1", "ff", 5, [(np.arange(3, dtype=np.int32), [(1, 3)]), (np.arange(2, dtype=np.int32), [])], {"border": 1}
    )
    facts, ids = given.entry()
    back = prepared.Prepared.of((json.loads(json.dumps(facts)), ids))
    assert [(row.tolist(), runs) for row, runs in back.rows] == [([0, 1, 2], [(1, 3)]), ([0, 1], [])]
    assert (back.where, back.digest, back.size, back.notes, back.refused) == ("a:1", "ff", 5, {"border": 1}, None)
    bad = prepared.Prepared("a:2", None, 0, [], {}, ("no JSON", ""))
    assert prepared.Prepared.of((json.loads(json.dumps(bad.entry()[0])), bad.entry()[1])) == bad
