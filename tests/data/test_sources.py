"""No file that a dataset's path names is left out without a word: it is read, warned of, or an error names it."""

import os
import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.console import UserError
from pipeline.data.reading import documents, sources


def found(path: object, dataset_type: str = "textfile") -> list[str]:
    return [source.name for source in sources.find(dataset_type, str(path))]


def write(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


# What cannot be read


def dangling(path: Path) -> None:
    path.symlink_to(path.parent / "gone")


def to_itself(path: Path) -> None:
    path.symlink_to(path)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/null")


def local_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (dangling, "b.txt' is a link to '.*/gone', which is not there"),
        (to_itself, r"b.txt' cannot be read \(Too many levels"),
        (pipe, "b.txt' is a pipe, a socket or a device"),
        (device, "b.txt' is a pipe, a socket or a device"),
        (local_socket, "b.txt' is a pipe, a socket or a device"),
    ],
)
@pytest.mark.parametrize("glob", ["*.txt", "b.txt", "**/*.txt", "**", "*"])
def test_what_ends_like_a_text_and_cannot_be_read_is_an_error(
    tmp_path: Path, make: Callable[[Path], None], why: str, glob: str
) -> None:
    write(tmp_path, "a.txt")
    make(tmp_path / "b.txt")
    with pytest.raises(UserError, match=why):
        found(tmp_path / glob)


def test_all_that_cannot_be_read_is_named_at_once(tmp_path: Path) -> None:
    write(tmp_path, "a.txt")
    dangling(tmp_path / "b.txt")
    pipe(tmp_path / "c.txt")
    with pytest.raises(UserError, match=r"b\.txt.*c\.txt"):
        found(tmp_path / "*.txt")


def refuse(monkeypatch: pytest.MonkeyPatch, function: str, path: Path) -> None:
    """As if the user had no right to what is at `path`, which root, under whom tests may run, always has."""
    original = getattr(os, function) if function != "open" else open

    def refusing(where: object, *arguments: object, **named: object) -> object:
        if Path(str(where)) == path:
            raise PermissionError(13, "Permission denied")
        return original(where, *arguments, **named)

    if function == "open":
        monkeypatch.setattr("builtins.open", refusing)
    else:
        monkeypatch.setattr(os, function, refusing)


def test_files_and_folders_without_the_right_to_read_them_are_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "a.txt", "b.txt", "deep/c.txt")
    for function, path in (("open", tmp_path / "b.txt"), ("listdir", tmp_path / "deep"), ("stat", tmp_path / "deep")):
        with monkeypatch.context() as patch:
            refuse(patch, function, path)
            with pytest.raises(UserError, match=rf"{path.name}' cannot be read.*Permission denied"):
                found(tmp_path / "**/*.txt")


def test_a_file_that_cannot_be_read_on_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"/proc/self/mem: cannot be read: Input/output error"):
        _ = next(documents.read_sources([sources.Source(Path("/proc/self/mem"), "mem")])).text


# What is left out, or twice there


@pytest.mark.parametrize(
    ("also", "glob", "said"),
    [
        ("Emma.txt/notes.md", "*.txt", r"left out Emma\.txt/"),
        ("more/b.txt", "*", r"left out more/"),
        ("B.TXT", "*.txt", r"left out .*B\.TXT, which differ from the glob in capital letters only"),
        ("book.epub", "*", r"left out book\.epub.*`pandoc"),
        ("data.csv", "**", r"left out data\.csv.*: a table, which dataset_type = 'doclist'"),
        ("b.txt.gz", "*", r"left out b\.txt\.gz.* unpack"),
        ("notes", "*", r"left out notes.* give it the ending \.txt"),
    ],
)
def test_what_is_left_out_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], also: str, glob: str, said: str
) -> None:
    write(tmp_path, "a.txt")
    assert found(tmp_path / glob) == ["a.txt"]
    assert not capsys.readouterr().err
    write(tmp_path, also)
    assert found(tmp_path / glob) == ["a.txt"]
    warning = capsys.readouterr().err
    assert len(warning.splitlines()) == 1
    assert re.search(said, warning)


def test_a_folder_that_is_a_dangling_link_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "novels/a.txt")
    dangling(tmp_path / "letters")
    for glob in ("**/*.txt", "*/*.txt"):
        assert len(found(tmp_path / glob)) == 1
        assert "letters' is a link to '" in capsys.readouterr().err


def test_links_to_books_and_folders_are_followed_and_doubles_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in a Hub's cache, whose files are links to blobs. A link to a folder above does not read all again."""
    write(tmp_path, "blobs/1", "books/b.txt")
    (tmp_path / "books/a.txt").symlink_to("../blobs/1")
    (tmp_path / "books/again").symlink_to("..")
    (tmp_path / "shelf").symlink_to("books")
    assert found(tmp_path / "books/**/*.txt") == ["a.txt", "b.txt"]
    assert found(tmp_path / "books/*.txt") == ["a.txt", "b.txt"]
    assert not capsys.readouterr().err
    assert found(tmp_path / "**/*.txt") == ["books/a.txt", "books/b.txt", "shelf/a.txt", "shelf/b.txt"]
    assert "the same file under several names is read as often: " in capsys.readouterr().err
    os.link(tmp_path / "books/b.txt", tmp_path / "books/c.txt")
    assert found(tmp_path / "books/*.txt") == ["a.txt", "b.txt", "c.txt"]
    assert "the same file under several names is read as often: " in capsys.readouterr().err


# Globs


@pytest.mark.parametrize(
    ("files", "glob", "names"),
    [
        (["[Austen] Novels/a.txt"], "[Austen] Novels/*.txt", ["[Austen] Novels/a.txt"]),
        (["[Austen] Novels/a.txt"], "[[]Austen] Novels/*.txt", ["[Austen] Novels/a.txt"]),
        (["[Austen] Novels/x/a.txt"], "[Austen] Novels/**/*.txt", ["[Austen] Novels/x/a.txt"]),
        (["[Austen] Emma.txt", "[Austen] Emma.md"], "[Austen] *.txt", ["[Austen] Emma.txt"]),
        (["b1.txt", "b2.txt", "b3.txt"], "b[12].txt", ["b1.txt", "b2.txt"]),
        (["b[1]/a.txt", "b1/a.txt"], "b[1]/*.txt", ["b1/a.txt", "b[1]/a.txt"]),
        (["what?.txt"], "what?.txt", ["what?.txt"]),
        (["a*b.txt"], "a*b.txt", ["a*b.txt"]),
        (["a[.txt", "b].txt"], "*[*.txt", ["a[.txt"]),
        (["x/.hidden/a.txt", "x/.b.txt", "x/c.txt"], "**/*.txt", ["x/c.txt"]),
        (["x/.hidden/a.txt"], "x/.hidden/*.txt", ["a.txt"]),
    ],
)
def test_brackets_stand_for_themselves_too(tmp_path: Path, files: list[str], glob: str, names: list[str]) -> None:
    write(tmp_path, *files)
    assert found(tmp_path / glob) == names


def test_globs_without_brackets_are_the_standard_librarys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import glob

    write(
        tmp_path,
        "a.txt",
        "b/c.txt",
        "b/d/e.txt",
        "b/d.txt/f.txt",
        "b-1/g.txt",
        "b/.h/i.txt",
        ".j.txt",
        "b/k.md",
        "b0/l.txt",
    )
    monkeypatch.chdir(tmp_path)
    for pattern in (
        "*",
        "*.txt",
        "**",
        "**/*.txt",
        "b*/*.txt",
        "b/**",
        "?/?.txt",
        "./b/*.txt",
        "**/d*/*",
        "*/../a.txt",
        "**/**/*.md",
    ):
        for where in (pattern, str(tmp_path / pattern)):
            there = [path for path in glob.glob(where, recursive=True) if Path(path).is_file()]
            expected = sorted({str(Path(path)) for path in there if path.endswith((".txt", ".md"))})
            assert [str(source.path) for source in sources.find("textfile", where)] == expected, where


def test_the_file_of_this_very_name_is_read_and_the_others_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, "b[12].txt", "b1.txt")
    assert found(tmp_path / "b[12].txt") == ["b[12].txt"]
    assert "the file of this very name is read; as a glob it would match" in capsys.readouterr().err


def test_a_name_that_is_no_text_is_spelled_out(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("x")
    assert found(tmp_path / "*.txt") == ["caf\\xe9.txt"]


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("a.tsv", "a table: write its rows to a .jsonl, .csv or .parquet file"),
        ("a.epub", "pandoc FILE -t plain --wrap=none"),
        ("a.pdf", "pdftotext FILE.pdf"),
        ("a.zip", "unpack it"),
        ("a.ndjson", "rename it to .jsonl"),
    ],
)
@pytest.mark.parametrize("glob", [False, True])
def test_files_of_other_kinds_are_refused_with_what_to_do(tmp_path: Path, name: str, remedy: str, glob: bool) -> None:
    write(tmp_path, name)
    with pytest.raises(UserError, match=f"It matches {name}. {name}: .*{remedy}"):
        found(tmp_path / ("*" if glob else name))


def test_names_of_the_hub_and_addresses_are_told_what_to_do() -> None:
    with pytest.raises(UserError, match=r"is on the Hub, write dataset_path = 'hub:owner/books'"):
        found("owner/books")
