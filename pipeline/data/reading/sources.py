"""Takes a dataset's type and path (a file, a glob or a folder); gives its files, sorted, or one error that says what is there.

What is on the Hub (hub.py) or at an address (remote.py) is downloaded first.

No file that the path names is left out without a word: dangling links, files and folders that cannot be opened, pipes
and devices are errors; folders, files of other endings, and names that differ in capital letters only, are warned of.
A glob is the shell's, with ** for any depth. A [ in it is also taken as it stands, since folders are called so.
"""

import errno
import fnmatch
import glob
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from pipeline.console import UserError, warn
from pipeline.data.reading import remote
from pipeline.data.reading.packed import ending
from pipeline.foreign import printable, read_object

_ROWS = (".json", ".jsonl", ".parquet", ".csv", ".arrow")
SUFFIXES = {
    "textfile": (".txt", ".md"),
    **dict.fromkeys(("doclist", "chat", "completion", "pretokenized", "multiple_choice"), _ROWS),
    **dict.fromkeys(("preference", "unpaired", "ranked"), _ROWS),
}

_PLAIN = "convert it to plain text, for example with `pandoc FILE -t plain --wrap=none -o FILE.txt`"
_TABLE = "write its rows to a .jsonl, .csv or .parquet file and set dataset_type = 'doclist', 'chat' or 'completion'"
_UNPACK = "it is packed: unpack it first"
# What to do with files of other endings.
_REMEDIES = {
    (".csv", ".arrow"): "a table, which dataset_type = 'doclist', 'chat' or 'completion' reads",
    (".tsv", ".xls", ".xlsx"): f"a table: {_TABLE}",
    (".feather", ".db", ".sqlite"): _TABLE,
    (".epub", ".docx", ".odt", ".html", ".htm", ".rtf", ".fb2", ".rst", ".tex"): _PLAIN,
    (".pdf",): "convert it to plain text, for example with `pdftotext FILE.pdf`, and set join_lines = true",
    (
        ".mobi",
        ".azw",
        ".azw3",
        ".doc",
    ): "convert it to plain text, for example with Calibre's `ebook-convert FILE FILE.txt`",
    (".gz", ".zst", ".xz", ".bz2", ".zip", ".7z", ".tar", ".tgz", ".rar"): _UNPACK,
    (".ndjson", ".jsonlines"): "rename it to .jsonl and set dataset_type = 'doclist'",
    (".text", ".markdown", ".utf8", ""): "if it is plain text, give it the ending .txt",
}


class Source(NamedTuple):
    """A file of a dataset: where it is, and the name it is reported under: its path from the first wildcard on."""

    path: Path
    name: str


def find(dataset_type: str, dataset_path: str) -> list[Source]:
    """The files that `dataset_path` names, sorted by path; `**` in the glob means any depth.

    Files with an ending that `dataset_type` does not read are left out with a warning. UserError when nothing is left,
    or when something that should be read cannot be.
    """
    if dataset_type not in SUFFIXES:
        raise UserError(f"dataset_type = '{printable(dataset_type)}' is not known; use one of: {', '.join(SUFFIXES)}")
    where = f"dataset_path = '{printable(dataset_path)}'"
    if dataset_path.startswith("hub:"):
        return _on_the_hub(dataset_type, dataset_path, where)
    if remote.is_address(dataset_path):
        found = remote.files(dataset_path, lambda path: _is_read(path, dataset_type))
        return [Source(path, _name(name)) for path, name in found]
    pattern = str(Path(dataset_path).expanduser())
    root = _fixed_root(pattern)
    if dataset_type != "textfile" and Path(pattern).is_dir():
        root = Path(pattern)
        if saved := _saved_to_disk(root, where):
            return [Source(path, _name(path.name)) for path in saved]
        pattern = f"{pattern}/**"
    matched, nearly = _matches(pattern, where)
    if matched != [pattern] and Path(pattern).is_file():
        warn(f"{where}: the file of this very name is read; as a glob it would match {some(matched)}")
        matched, nearly = [pattern], []
    paths = [Path(path) for path in matched]
    wanted = [path for path in paths if _is_read(path, dataset_type)]
    statuses = _readable(wanted, where)
    files = [path for path in wanted if stat.S_ISREG(statuses[path].st_mode)]
    others = [path for path in paths if path not in statuses or not stat.S_ISREG(statuses[path].st_mode)]
    others = [path for path in others if not ("**" in pattern and path.is_dir())]
    if not files:
        raise UserError(_nothing_found(dataset_type, where, pattern, root, others))
    if others:
        warn(
            f"{where}: left out {some(_names(others))}, since '{dataset_type}' reads files in "
            f"{' and '.join(SUFFIXES[dataset_type])}{_remedy(others)}"
        )
    if unread := [path for path in nearly if _is_read(Path(path), dataset_type)]:
        warn(f"{where}: left out {some(unread)}, which differ from the glob in capital letters only")
    _warn_of_doubles(files, statuses, where)
    return [Source(path, _name(path.relative_to(root).as_posix())) for path in files]


def _on_the_hub(dataset_type: str, dataset_path: str, where: str) -> list[Source]:
    from pipeline.data.reading import hub  # its client takes a while to import

    folder, names = hub.files(dataset_path)
    found = [Source(folder / name, _name(name)) for name in names if _is_read(Path(name), dataset_type)]
    if others := [name for name in names if not _is_read(Path(name), dataset_type)]:
        left_out = (
            f"{where}: '{dataset_type}' reads files in {' and '.join(SUFFIXES[dataset_type])}, not {some(others)}"
        )
        if not found:
            raise UserError(f"{left_out}; a conversion to Parquet may be at its revision @refs/convert/parquet")
        warn(left_out)
    return found


def _is_read(path: Path, dataset_type: str) -> bool:
    """Whether the name says that the file can be read; rows may be packed."""
    return (path.suffix.lower() if dataset_type == "textfile" else ending(path)) in SUFFIXES[dataset_type]


def _saved_to_disk(folder: Path, where: str) -> list[Path]:
    """The files of a folder that `datasets` wrote with save_to_disk; none for another folder."""
    if (folder / "dataset_dict.json").is_file():
        splits = read_object(folder / "dataset_dict.json", "the names of a dataset's splits").get("splits", [])
        raise UserError(f"{where}: has the splits {some(list(map(str, splits)))}: give the folder of one of them")
    if not (folder / "state.json").is_file():
        return []
    listed = read_object(folder / "state.json", "the files of a dataset that was saved to disk").get("_data_files")
    names = [entry.get("filename") for entry in listed or [] if isinstance(entry, dict)]
    paths = [folder / name for name in names if isinstance(name, str)]
    if not paths or any(path.parent != folder for path in paths):
        raise UserError(f"{where}: state.json names no files of this folder: save the dataset anew with save_to_disk")
    _readable(paths, where)
    return paths


def _matches(pattern: str, where: str) -> tuple[list[str], list[str]]:
    """(Paths that match, paths whose last part would if capital letters were small), each sorted as text."""
    parts, found, near = Path(pattern).parts, [Path()], list[Path]()
    if Path(pattern).is_absolute():
        parts, found = parts[1:], [Path(parts[0])]
    for place, part in enumerate(parts):
        last = place == len(parts) - 1
        if part == "**":
            found = [path for folder in found for path in _below(folder, where, files_too=last)]
        elif glob.has_magic(part):
            entries = [folder / name for folder in found for name in _listing(folder, where)]
            found = [path for path in entries if _fits(path.name, part)]
            if last:
                near = [path for path in entries if _fits(path.name.lower(), part.lower())]
        else:
            found = [folder / part for folder in found if os.path.lexists(folder / part)]
        if not last:
            found = [path for path in found if _is_folder(path, where)]
    matched = {str(path) for path in found}
    return sorted(matched), sorted({str(path) for path in near} - matched)


def _fits(name: str, part: str) -> bool:
    """Whether a name matches a part of a glob, in which [ may also stand for itself. `*` spares hidden files."""
    if name.startswith(".") and not part.startswith("."):
        return False
    return fnmatch.fnmatchcase(name, part) or fnmatch.fnmatchcase(name, part.replace("[", "[[]"))


def _below(folder: Path, where: str, *, files_too: bool) -> Iterator[Path]:
    """The folder and all folders in it (their files too), but for hidden ones. A link to a folder above is not followed."""
    waiting = [(folder, frozenset[str]())]
    while waiting:
        current, above = waiting.pop()
        real = os.path.realpath(current)
        if real in above:
            continue
        yield current
        for path in (current / name for name in _listing(current, where) if not name.startswith(".")):
            if _is_folder(path, where, surely=path.suffix == ""):
                waiting.append((path, above | {real}))
            elif files_too:
                yield path


def _is_folder(path: Path, where: str, *, surely: bool = True) -> bool:
    """Whether a path is one. `surely`: it should be one, so a dangling link is warned of. UserError if it cannot be told."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ELOOP):
            raise UserError(f"{where}: '{printable(path)}' cannot be read: {error.strerror}") from None
        if surely and path.is_symlink():
            warn(f"{where}: '{printable(path)}' is a link to '{printable(os.readlink(path))}', which is not there")
        return False


def _listing(folder: Path, where: str) -> list[str]:
    """Names in a folder, sorted; none if it is not a folder. UserError if it cannot be opened."""
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"{where}: the folder '{printable(folder)}' cannot be read: {error.strerror}") from None


def _readable(paths: list[Path], where: str) -> dict[Path, os.stat_result]:
    """What each of these is; each is looked at and opened once. UserError that names all that should be read and cannot be."""
    found, wrong = dict[Path, os.stat_result](), list[str]()
    for path in paths:
        try:
            found[path] = path.stat()
            if stat.S_ISREG(found[path].st_mode):
                with open(path, "rb"):
                    pass
            elif not stat.S_ISDIR(found[path].st_mode):
                wrong.append(f"'{printable(path)}' is a pipe, a socket or a device, not a file")
        except OSError as error:
            why = f"cannot be read ({error.strerror})"
            if path.is_symlink() and isinstance(error, FileNotFoundError):
                why = f"is a link to '{printable(os.readlink(path))}', which is not there"
            wrong.append(f"'{printable(path)}' {why}")
    if wrong:
        raise UserError(f"{where}: {some(wrong)}: mend or remove what cannot be read, or narrow the path")
    return found


def _warn_of_doubles(files: list[Path], statuses: dict[Path, os.stat_result], where: str) -> None:
    """Say which files are one and the same under several names: they are read as often."""
    first: dict[tuple[int, int], Path] = {}
    doubles = []
    for path in files:
        status = statuses[path]
        same = first.setdefault((status.st_dev, status.st_ino), path)
        if same != path:
            doubles.append(f"{printable(path)} (also {printable(same)})")
    if doubles:
        warn(f"{where}: the same file under several names is read as often: {some(doubles)}")


def _fixed_root(pattern: str) -> Path:
    """The folder above a glob's first wildcard; for a plain path the folder it is in."""
    path = Path(pattern)
    if path.is_file() or not glob.has_magic(pattern):
        return path.parent
    fixed = next(place for place, part in enumerate(path.parts) if glob.has_magic(part))
    return Path(*path.parts[:fixed])


def _nothing_found(dataset_type: str, where: str, pattern: str, root: Path, others: list[Path]) -> str:
    """Why a dataset has no files, and what there is instead."""
    message = f"{where} matches no {' or '.join(SUFFIXES[dataset_type])} file. "
    if Path(pattern).is_dir():
        return message + f"It is a folder: write '{pattern}/**/*{SUFFIXES[dataset_type][0]}' for all that it holds"
    for other in SUFFIXES:
        if other != dataset_type and any(_is_read(path, other) for path in others if not path.is_dir()):
            return message + f"It matches {some(_names(others))}: for these set dataset_type = '{other}'"
    if others:
        return message + f"It matches {some(_names(others))}{_remedy(others)}"
    if not root.is_dir():
        above = next(folder for folder in root.absolute().parents if folder.is_dir())
        return message + (
            f"There is no folder '{printable(root)}'; '{printable(above)}' holds {some(_names(above.iterdir()))}"
            f"{_hub_remedy(printable(pattern))}"
        )
    return message + f"'{printable(root)}' holds {some(_names(root.iterdir()))}"


def _hub_remedy(path: str) -> str:
    """How to name a dataset whose name on the Hub `path` can be."""
    if path.count("/") != 1 or glob.has_magic(path) or path.startswith(("/", ".", "~")):
        return ""
    return f"; if '{path}' is on the Hub, write dataset_path = 'hub:{path}'"


def _remedy(others: list[Path]) -> str:
    """What to do with the first of these for which something can be done."""
    for path in others:
        for endings, remedy in _REMEDIES.items():
            if path.suffix.lower() in endings and not path.is_dir():
                return f". {printable(path.name)}: {remedy}"
    return ""


def _names(paths: Iterable[Path]) -> list[str]:
    return sorted(path.name + "/" * path.is_dir() for path in paths)


def _name(path: str) -> str:
    """A document's name, which has to be text: bytes that are none are spelled out."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def some(names: list[str], most: int = 8) -> str:
    """Names in a line: all of a few, the first of many with the count of the rest."""
    if not names:
        return "nothing"
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(printable(name, 300) for name in names[:most]) + rest
