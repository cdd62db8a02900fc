"""Tokens, chunks, cache and split, against encoding whole, a plain re-cutting, and Hugging Face's own splitting."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import helpers_data
import numpy as np
import pytest
from helpers_data import KINDS, prose, tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer

from pipeline.console import UserError
from pipeline.data import chunks, documents, tokenize
from pipeline.data.split import Streams, split
from pipeline.data.split import whole as whole_rows

ROOT = Path(__file__).resolve().parent.parent
FAST = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
WORDS = prose(300, seed=1).split(" ")
ODD = [  # fmt: skip
    "\n",
    "\n\n",
    "  ",
    " " * 9,
    "\t",
    "\r\n",
    " \n",
    "\n  ",
    "12345",
    "1" * 30,
    " " * 30,
    "\n" * 30,
    "a" * 30,
    "…",
    "—",
    "</s>",
    "<s>",
    "日本語",
    "。",
    "🙂",
    "e\u0301",
    "’s",
    "...",
    "ka" * 20,
    "▁",
    "\u00a0",
    "_",
]
TEXT = st.lists(st.one_of(st.sampled_from([word + " " for word in WORDS]), st.sampled_from(ODD)), max_size=250).map(
    "".join
)


def whole(kind: str, text: str, **special: bool) -> list[int]:
    """The ids of a text by transformers' own call."""
    ids: list[int] = tokenizer(kind, **special)(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def build(folder: Path, **changes: Any) -> Streams:
    """`chunks.build` of all text files of a folder."""
    given = {"name": "books", "dataset_type": "textfile", "dataset_path": str(folder / "*.txt"), "sequence_len": 32}
    return chunks.build(**({**given, "tokenizer": tokenizer(), "cache_dir": folder / "cache"} | changes))


def shelve(folder: Path, *texts: str) -> Path:
    """The texts as files 0.txt, 1.txt, … of an emptied folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number:03}.txt").write_text(text, encoding="utf-8", newline="")
    return folder


# Tokens


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None)
@given(TEXT)
def test_encoding_in_segments_is_encoding_whole(kind: str, text: str) -> None:
    encode = tokenize.encoder(tokenizer(kind))
    pieces = [text[i : i + 50] for i in range(0, len(text), 50)]
    segments = list(tokenize.segments(encode, pieces, segment_chars=200, window_chars=64))
    assert [id for ids in encode(segments) for id in ids] == whole(kind, text)


@pytest.mark.parametrize("kind", KINDS)
def test_a_book_is_cut_into_segments_of_bounded_size(kind: str) -> None:
    text = prose(20_000, seed=4)
    encode = tokenize.encoder(tokenizer(kind))
    segments = list(tokenize.segments(encode, [text], segment_chars=4000, window_chars=500))
    assert max(map(len, segments)) <= 4000 + 500  # the last may reach over the window
    assert [id for ids in encode(segments) for id in ids] == whole(kind, text)


def test_text_without_a_place_to_cut_is_encoded_whole() -> None:
    text = "ka" * 3000
    segments = list(tokenize.segments(tokenize.encoder(tokenizer()), [text], segment_chars=200, window_chars=64))
    assert segments == [text]


def test_a_place_where_cutting_changes_tokens_is_passed_over() -> None:
    """A tokenizer with one token for 'ro mo' must not be cut between the two."""
    from tokenizers import Tokenizer, models

    vocabulary = {character: id for id, character in enumerate("mor \n")} | {"ro": 5, "mo": 6, "ro ": 7, "ro mo": 8}
    backend = Tokenizer(models.BPE(vocabulary, [("r", "o"), ("m", "o"), ("ro", " "), ("ro ", "mo")]))
    encode = lambda texts: [e.ids for e in backend.encode_batch(texts, add_special_tokens=False)]  # noqa: E731
    text = "ro mo" * 40 + "\n" + "ro mo" * 20
    segments = list(tokenize.segments(encode, [text], segment_chars=100, window_chars=40))
    assert [id for ids in encode(segments) for id in ids] == backend.encode(text).ids
    assert segments == ["ro mo" * 40 + "\n", "ro mo" * 20]


@FAST
@given(st.lists(TEXT, max_size=8), st.integers(1, 400), st.integers(1, 3))
def test_documents_are_tokenised_in_order_whatever_the_batches(texts: list[str], batch_chars: int, batch: int) -> None:
    read = [documents.Document(str(i), lambda text=text: iter([text])) for i, text in enumerate(texts)]  # type: ignore[misc]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize, "BATCH_CHARS", batch_chars)
        patch.setattr(tokenize, "BATCH_SEGMENTS", batch)
        patch.setattr(tokenize.segments, "__defaults__", (200, 64))
        found: list[tuple[str, list[int]]] = []
        ended = True
        for name, ids, last in tokenize.tokens(tokenizer(), read):
            if ended:
                found.append((name, []))
            found[-1][1].extend(ids.tolist())
            assert found[-1][0] == name
            ended = last
    assert found == [(str(i), whole("gpt2", text)) for i, text in enumerate(texts)]


def test_the_state_left_in_a_tokenizer_changes_neither_tokens_nor_fingerprint() -> None:
    plain, used = tokenizer(), helpers_data.tokenizer.__wrapped__("gpt2")
    before = tokenize.fingerprint(used)
    used(["one", "a longer one"], padding="max_length", truncation=True, max_length=4)
    text = prose(100)
    assert tokenize.fingerprint(used) == before == tokenize.fingerprint(plain)
    assert tokenize.encoder(used)([text, "a"]) == [whole("gpt2", text), whole("gpt2", "a")]
    assert len({tokenize.fingerprint(tokenizer(kind)) for kind in KINDS}) == len(KINDS)
    assert tokenize.fingerprint(tokenizer("gpt2", bos=False)) != before


def test_a_tokenizer_written_in_python_is_encoded_whole_too() -> None:
    """ByT5's: no backend in Rust, no BOS."""
    used = ByT5Tokenizer()
    assert not used.is_fast
    text = prose(300) + "日本 🙂"
    read = [documents.Document("a", lambda: iter([text])), documents.Document("b", lambda: iter([]))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize.segments, "__defaults__", (200, 64))
        found = [(name, ids.tolist()) for name, ids, _ in tokenize.tokens(used, read)]
    assert len(found) > 5
    assert [id for _, ids in found for id in ids] == [byte + 3 for byte in text.encode()]  # as its paper defines them
    assert len(tokenize.fingerprint(used)) == 64


# Streams and chunks


@FAST
@given(st.lists(TEXT, min_size=1, max_size=6), st.integers(3, 70), st.booleans(), st.integers(1, 200))
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
            ids = store[chunk].tolist()
            assert ids == [special.bos_token_id] * bos + expected[chunk].tolist()
            spans = store.spans(chunk)
            assert [span.name for span in spans for _ in range(span.start, span.end)] == owners[chunk * body :][:body]
            first = [i == 0 or owners[i] != owners[i - 1] for i in range(chunk * body, (chunk + 1) * body)]
            assert [span.start for span in spans if not span.continued] == [i + bos for i in np.flatnonzero(first)]
            assert spans[0].start == bos and spans[-1].end == sequence_len
    report = store.report
    assert (len(store), report.tail_tokens) == (count, len(stream) - count * body)
    assert report.text_tokens + report.eos_tokens == report.chunks * body + report.tail_tokens
    assert report.documents == len(dict.fromkeys(owners)) and report.documents + report.empty_documents == len(texts)


def test_the_report_is_one_line_that_adds_up(tmp_path: Path) -> None:
    folder = shelve(tmp_path / "shelf", "roka " * 50, "", "mo</s>lin")
    tokens = sum(len(whole("gpt2", text)) for text in ("roka " * 50, "mo</s>lin"))
    report = build(folder, sequence_len=11).train.report
    chunks_, tail = divmod(tokens + 2, 10)
    assert str(report) == (
        f"books: 2 documents, {tokens} tokens + 2 EOS = {chunks_} chunks × 10 (after BOS) + {tail} dropped "
        f"from the tail; "
        f"1 empty documents left out; 1 special tokens are spelled out in the text"
    )
    without = build(folder, sequence_len=11, tokenizer=tokenizer("gpt2", bos=False)).train.report
    assert "chunks × 11 (no BOS, the tokenizer has none)" in str(without)


def test_unknown_tokens_are_counted(tmp_path: Path) -> None:
    folder = shelve(tmp_path / "shelf", "roka " * 50 + "日 本")
    report = build(folder, tokenizer=tokenizer("wordpiece")).train.report
    assert report.unknown_tokens == whole("wordpiece", "roka " * 50 + "日 本").count(0) == 2
    assert report.special_tokens == 0 and "2 tokens are unknown to the tokenizer" in str(report)


def test_a_tokenizer_without_eos_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the tokenizer has no EOS token.*tokenizer_config\.json"):
        build(shelve(tmp_path / "shelf", prose(100)), tokenizer=tokenizer("gpt2", eos=False))


def test_bos_and_eos_that_a_document_spells_out_are_not_doubled(tmp_path: Path) -> None:
    folder = shelve(tmp_path / "shelf", "<s>roka", "linmo</s>", "ka<s>mo</s>ber", "<s>", "<s></s>", "</s>")
    documents_ = ["roka</s>", "linmo</s>", "ka<s>mo</s>ber</s>", "</s>", "</s>"]
    stream = [id for text in documents_ for id in whole("gpt2", text)]
    streams = build(folder, sequence_len=len(stream) + 1)
    assert streams.train[0].tolist() == [1, *stream]
    assert streams.train.report.empty_documents == 1 and streams.train.report.eos_tokens == 2


def test_bos_inside_a_document_stays_wherever_segments_begin(tmp_path: Path) -> None:
    writer = helpers_data.ChunkWriter(tmp_path / "store", "books", "all", 6, helpers_data.MARKS)
    for ids, last in (([1, 7], False), ([1, 8], False), ([2], False), ([], True)):
        writer.add("a.txt", np.array(ids, dtype=np.int32), last)
    assert writer.add("b.txt", np.array([9], dtype=np.int32), True) is None
    assert writer.close().tail_tokens == 1
    assert helpers_data.ChunkStore(tmp_path / "store")[0].tolist() == [1, 7, 1, 8, 2, 9]


# The cache


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    return shelve(tmp_path / "shelf", *(prose(60 + 40 * i, seed=i) for i in range(10)))


def test_the_cache_is_keyed_by_content_tokenizer_and_settings(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build(shelf)
    (shelf / "001.txt").touch()
    moved = shelf.rename(shelf.with_name("moved"))
    with monkeypatch.context() as patch:
        patch.setattr(chunks, "tokens", None)  # nothing is tokenised again
        assert build(moved).path.name == first.path.name
        assert build(moved, eval_size=0.5).path.name == first.path.name  # a split by chunk needs no other chunks
    others = [
        build(moved, sequence_len=33),
        build(moved, name="novels"),
        build(moved, tokenizer=tokenizer("llama3")),
        build(moved, tokenizer=tokenizer("gpt2", bos=False)),
        build(moved, eval_size=2, eval_split="document"),
        build(moved, eval_size=3, eval_split="document"),
    ]
    (moved / "001.txt").rename(moved / "0011.txt")
    others.append(build(moved))
    (moved / "002.txt").write_text(prose(200))
    others.append(build(moved))
    assert len({stream.path.name for stream in [first, *others]}) == len(others) + 1
    loaded = chunks.load(others[4].path)
    assert loaded.eval is not None and loaded.reports == others[4].reports
    assert [(loaded.eval[i] == others[4].eval[i]).all() for i in range(len(loaded.eval))]  # type: ignore[index]


def test_a_store_that_is_not_whole_is_refused(shelf: Path) -> None:
    path = build(shelf).path
    with open(path / "all/chunks.arrow", "r+b") as file:
        file.truncate(100)
    with pytest.raises(UserError, match="have not the size they were written with; delete the folder"):
        build(shelf)
    (path / "all/documents.arrow").unlink()
    with pytest.raises(UserError, match="not a whole store of chunks"):
        chunks.load(path)


def _interrupt(*_: Any) -> Any:
    yield "0.txt", np.arange(100, dtype=np.int32), True
    raise KeyboardInterrupt


def test_an_interrupted_build_leaves_nothing(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(chunks, "tokens", _interrupt)
        build(shelf)
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
    assert not list((shelf / "cache").glob(".staging*")) and len(build(shelf).train)


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
    monkeypatch.setattr(chunks, "LET_FIRST_RANK_S", 0.1)
    monkeypatch.setenv("RANK", "1")
    assert len(build(shelf).train)  # alone, another rank builds after all


# The split


@pytest.mark.parametrize("eval_size", [0.01, 0.25, 0.9, 1, 7])
@pytest.mark.parametrize("subsample", [None, 0.3, 1.0])
def test_the_split_by_chunk_is_hugging_faces(shelf: Path, eval_size: float, subsample: float | None) -> None:
    streams = build(shelf)
    rows = datasets.Dataset.from_dict({"chunk": list(range(len(streams.train)))})
    expected = rows.train_test_split(test_size=eval_size, shuffle=True, seed=42)
    parts = {name: part.shuffle(seed=42) for name, part in expected.items()}
    if subsample:
        parts = {name: part.select(range(int(len(part) * subsample))) for name, part in parts.items()}
    if not all(len(part) for part in parts.values()):
        with pytest.raises(UserError, match=r"subsample = 0\.3 of \d+ chunks leaves none"):
            split(streams, eval_size, subsample)
        return
    found = split(streams, eval_size, subsample)
    assert found.eval is not None
    assert found.train.chunks.tolist() == sorted(parts["train"]["chunk"])
    assert found.eval.chunks.tolist() == sorted(parts["test"]["chunk"])


def test_whole_documents_are_held_out(shelf: Path) -> None:
    streams = build(shelf, eval_size=0.25, eval_split="document")
    assert streams.eval is not None
    found = split(streams, 0.25, num_repeats=2)
    assert found.train.chunks.tolist() == list(range(len(streams.train))) * 2
    assert found.eval is not None and found.eval.store is streams.eval
    assert [report.stream for report in streams.reports] == ["train", "eval"]
    sides = [{span.name for chunk in range(len(s)) for span in s.spans(chunk)} for s in (streams.train, streams.eval)]
    assert len(sides[0]) == 7 and len(sides[1]) == 3 and not sides[0] & sides[1]  # a part is rounded up: 2.5 → 3
    held_out = [[*whole("gpt2", (shelf / name).read_text()), 2] for name in sorted(sides[1])]
    stream = [id for ids in held_out for id in ids]
    body = np.concatenate([streams.eval[chunk][1:] for chunk in range(len(streams.eval))])
    assert body.tolist() == stream[: len(body)] and streams.eval.report.tail_tokens == len(stream) - len(body)
    assert streams.train.report.documents == 7


def test_documents_of_a_list_can_be_held_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": prose(60, seed=i)}) + "\n" for i in range(6)))
    rows = {"dataset_type": "doclist", "dataset_path": str(tmp_path / "a.jsonl")}
    streams = build(tmp_path, eval_size=2, eval_split="document", **rows)
    assert streams.eval is not None and (streams.train.report.documents, streams.eval.report.documents) == (4, 2)


def test_a_split_that_leaves_one_side_empty_is_refused(shelf: Path) -> None:
    streams = build(shelf)
    count = len(streams.train)
    for eval_size, message in (
        (count, f"would hold out {count} of {count} chunks and leave 0 to train on"),
        (count + 1, f"would hold out {count + 1} of {count} chunks and leave 0 to train on"),
        (-1, "would hold out -1"),
        (1.5, "must be 0, a part below 1, or a whole number of chunks"),
    ):
        with pytest.raises(UserError, match=message):
            split(streams, eval_size)
    for subsample in (0.0, 1.01):
        with pytest.raises(UserError, match="must be greater than 0 and at most 1"):
            split(streams, 0, subsample)
    assert whole_rows(streams).chunks.tolist() == list(range(count))
    assert len(whole_rows(streams, 0.5)) == count // 2
    with pytest.raises(UserError, match="num_repeats = 0 must be 1 or more"):
        split(streams, num_repeats=0)
    with pytest.raises(UserError, match="would hold out 10 of 10 documents"):
        build(shelf, eval_size=10, eval_split="document")
    with pytest.raises(UserError, match="eval_split = 'page' is not known; use chunk or document"):
        build(shelf, eval_split="page")
    with pytest.raises(UserError, match="sequence_len = 2 leaves nothing to predict"):
        build(shelf, sequence_len=2)
    with pytest.raises(UserError, match=r"1 documents held for 'eval' give \d+ tokens, fewer than the 2,999"):
        build(shelf, sequence_len=3000, eval_size=1, eval_split="document")


# Memory and names

MEASURE = """
import json, resource, sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
from helpers_data import prose, tokenizer
from pipeline.data import chunks
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
used, folder = tokenizer(), Path({folder!r})
settings = dict(name="books", dataset_type={kind!r}, sequence_len=8192, tokenizer=used, cache_dir=folder / "cache")
(folder / "small.txt").write_text(prose(40_000))
chunks.build(**settings | dict(dataset_type="textfile", dataset_path=str(folder / "small.txt")))
before = peak()
store = chunks.build(**settings, dataset_path=str(folder / {file!r})).train
print(json.dumps([before, peak(), store.report.text_tokens]))
"""


def measure(folder: Path, file: str, megabytes: int) -> tuple[float, float]:
    """(MiB at the peak after 0.3 MB of text, MiB at the peak after `megabytes` of it in one document)."""
    text = prose(100_000, seed=3) + "🙂"  # four bytes a character in memory for the whole text, if it were held
    with open(folder / file, "w", encoding="utf-8") as out:
        out.write('{"text": "' if file.endswith("jsonl") else "")
        for _ in range(megabytes * 10**6 // len(text.encode())):
            out.write(json.dumps(text, ensure_ascii=False)[1:-1] if file.endswith("jsonl") else text)
        out.write('"}' if file.endswith("jsonl") else "")
    kind = "doclist" if file.endswith("jsonl") else "textfile"
    code = MEASURE.format(root=str(ROOT), tests=str(ROOT / "tests"), folder=str(folder), kind=kind, file=file)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=500)
    before, after, tokens = json.loads(done.stdout)
    assert tokens > megabytes * 10**5
    return before, after


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    """8 MB of text in one document. Encoded whole, that takes 800 MiB (100 bytes for each byte of text, measured).
    In segments it is what one batch of 2 MiB takes, 200 MiB at most, whatever the size of the text."""
    before, after = measure(tmp_path, "large.txt", 8)
    assert after - before < 200


@pytest.mark.slow
@pytest.mark.parametrize("file", ["large.txt", "large.jsonl"])
def test_a_hundred_megabytes_need_less_than_a_gigabyte(tmp_path: Path, file: str) -> None:
    before, after = measure(tmp_path, file, 100)
    assert after < 10**9 / 2**20
    assert file == "large.jsonl" or after - before < 250  # a text file of any size is never held; a row of a list is


def test_the_folder_named_datasets_does_not_hide_hugging_faces_package() -> None:
    assert (ROOT / "datasets").is_dir() and not list((ROOT / "datasets").rglob("*.py"))
    for command in (["-c", "import datasets; print(datasets.Dataset)"], ["-m", "datasets.config"]):
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
