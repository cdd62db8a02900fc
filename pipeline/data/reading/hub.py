"""Takes the name of a dataset on the Hub; gives the files of one of its splits, downloaded into the Hub's own cache, or where
they are on the Hub.

`hub:OWNER/NAME[@REVISION][:[CONFIG/]SPLIT]`. Which file is of which split is `datasets`' to say, by the repository's card and the
names of its files; the rows are read by our own readers. Where the Hub cannot be asked, what the cache has is taken.
"""

import os
import re
import tempfile
from pathlib import Path
from typing import NamedTuple

import httpx
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from pipeline.console import UserError, is_out_of_space, log, warn
from pipeline.files import write_json
from pipeline.foreign import parse_json, printable, read_by_library
from pipeline.formats.hub import OURS, first_of_launch, literally, note_commit, reason
from pipeline.processes import launched_by

PREFIX, CARD = "hub:", "README.md"
_NAME = re.compile(
    r"hub:(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[^:@\s]+))?(:((?P<config>[\w.-]+)/)?(?P<split>[\w.-]+))?"
)
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})(.*)")


class Asked(NamedTuple):
    """What of the Hub is meant. A `split` of None is 'train', or the only one."""

    repository: str
    revision: str | None
    config: str | None
    split: str | None


def parsed(path: str) -> Asked:
    """UserError for what is no such name."""
    if not (found := _NAME.fullmatch(path)):
        raise UserError(
            f"dataset_path = '{printable(path)}' is not hub:OWNER/NAME, with @REVISION and :SPLIT or :CONFIG/SPLIT behind it "
            "where they are needed"
        )
    return Asked(*found.group("repository", "revision", "config", "split"))


def files(path: str) -> tuple[Path, list[str]]:
    """The folder in which the dataset is now, and the files of the split, as paths in it, in the split's order.

    UserError: no such dataset, revision or split, not to be had and not in the cache, downloaded in part.
    """
    asked, where = parsed(path), f"dataset_path = '{printable(path)}'"
    locks = _locks(asked)
    with first_of_launch(locks, locks / "none"):  # the first downloads, the others find it
        try:
            return _downloaded(asked, where)
        except (HfHubHTTPError, httpx.HTTPError, OfflineModeIsEnabled) as error:
            why = reason(error, asked.repository, asked.revision, "dataset")
            folder = _cached(asked)
            if folder is None:
                raise UserError(f"{where}: it is not in {constants.HF_HUB_CACHE}, and {why}") from error
            (log if isinstance(error, OfflineModeIsEnabled) else warn)(
                f"{where}: taken from the cache ({folder}): {why}"
            )
        except HFValidationError as error:
            raise UserError(f"{where}: {printable(error)}") from error
        except (OSError, RuntimeError) as error:  # RuntimeError is what hf-xet raises
            if is_out_of_space(error):
                raise
            raise UserError(
                f"{where}: the download stopped ({printable(error)}). What has arrived is kept: run again"
            ) from error
    present = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    found = _of_split(sorted(present), asked, where, folder)
    _check_whole(found, present, where)
    return folder, found


def addresses(path: str) -> list[str]:
    """The files of the split as fsspec knows them, hf://datasets/OWNER/NAME@COMMIT/…, in the split's order; none is downloaded.

    UserError: no such dataset, revision or split, not to be had.
    """
    asked, where = parsed(path), f"dataset_path = '{printable(path)}'"
    locks = _locks(asked)
    answer = locks / f"{OURS}{launched_by()}-stream"
    with first_of_launch(locks, answer):  # processes that ask one by one might be told of two commits
        if "WORLD_SIZE" in os.environ and answer.is_file():
            known = parse_json(answer.read_text(encoding="utf-8"), str(answer))
            if known["given"] == path:
                return [str(address) for address in known["addresses"]]
        try:
            commit, found = _listed(asked, where)
        except (HfHubHTTPError, httpx.HTTPError, OfflineModeIsEnabled) as error:
            raise UserError(f"{where}: {reason(error, asked.repository, asked.revision, 'dataset')}") from error
        except HFValidationError as error:
            raise UserError(f"{where}: {printable(error)}") from error
        there = [f"hf://datasets/{asked.repository}@{commit}/{name}" for name in found]
        if "WORLD_SIZE" in os.environ and locks.is_dir():
            write_json(answer, {"given": path, "addresses": there})
    return there


def _locks(asked: Asked) -> Path:
    return Path(constants.HF_HUB_CACHE) / ".locks" / f"datasets--{asked.repository.replace('/', '--')}"


def _listed(asked: Asked, where: str) -> tuple[str, list[str]]:
    """The commit that is meant, and the files of the split; of the repository the card alone is downloaded."""
    listed = HfApi().dataset_info(asked.repository, revision=asked.revision)
    names = sorted(sibling.rfilename for sibling in listed.siblings or ())
    commit = str(listed.sha)
    card = _fetched([CARD], asked, commit) if CARD in names else None
    found = _of_split(names, asked, where, card)
    log(f"data:     {where}: commit {commit[:12]}, {len(found):,} files")
    return commit, found


def _fetched(names: list[str], asked: Asked, commit: str) -> Path:
    return Path(
        snapshot_download(
            asked.repository,
            repo_type="dataset",
            revision=commit,
            allow_patterns=[literally(name) for name in names],
            cache_dir=constants.HF_HUB_CACHE,
        )
    )


def _downloaded(asked: Asked, where: str) -> tuple[Path, list[str]]:
    commit, found = _listed(asked, where)
    folder = _fetched(found, asked, commit)
    note_commit(folder, asked.revision or "main")
    return folder, found


def _cached(asked: Asked) -> Path | None:
    """What was downloaded of this revision, None if nothing was."""
    repository = Path(constants.HF_HUB_CACHE) / f"datasets--{asked.repository.replace('/', '--')}"
    ref = repository / "refs" / (asked.revision or "main")
    folder = repository / "snapshots" / (ref.read_text() if ref.is_file() else asked.revision or "main")
    return folder if folder.is_dir() else None


def _of_split(names: list[str], asked: Asked, where: str, folder: Path | None) -> list[str]:
    """The files of the split among a repository's files, as `datasets` tells from their names and `folder`'s card."""
    with tempfile.TemporaryDirectory() as temporary, read_by_library(f"{where}: cannot tell its splits"):
        root = Path(temporary).resolve() / "files"
        for name in names:  # empty files: nothing but their names is looked at
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).touch()
        if folder is not None and CARD in names:
            (root / CARD).write_bytes((folder / CARD).read_bytes())
        from datasets import load_dataset_builder  # takes seconds to import

        config = load_dataset_builder(str(root), asked.config, cache_dir=f"{temporary}/cache").config
        splits = {
            str(split): [Path(file).relative_to(root).as_posix() for file in found]
            for split, found in (config.data_files or {}).items()
        }
    split = asked.split or ("train" if "train" in splits or len(splits) != 1 else next(iter(splits)))
    if split not in splits:
        raise UserError(
            f"{where}: has no split '{printable(split)}'; it has {', '.join(map(printable, splits)) or 'none'}: name one, as in "
            f"hub:{asked.repository}:{printable(next(iter(splits), 'SPLIT'))}"
        )
    return splits[split]


def _check_whole(found: list[str], present: set[str], where: str) -> None:
    """UserError where files of the split are not there: the cache may hold a part only."""
    missing = set[str]()
    for shard in filter(None, map(_SHARD.fullmatch, found)):
        before, _, count, behind = shard.groups()
        missing |= {f"{before}-{number:05}-of-{count}{behind}" for number in range(int(count))} - present
    if missing:
        raise UserError(
            f"{where}: {len(missing):,} of its files are not in the Hub's cache, '{printable(min(missing))}' first: download "
            "them where there is a network"
        )
