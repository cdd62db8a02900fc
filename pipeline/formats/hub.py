"""A model named as on the Hub, 'OWNER/NAME' or 'OWNER/NAME@REVISION': downloaded into huggingface_hub's cache, its folder given.

A folder of that name goes first. Of a repository come the files beside the weights and those safetensors that a model's
folder is read from (formats/base_model.py), none of another format and none in a folder. Of several processes one downloads
and the others take what it found, so that all have one commit. What cannot be had is one UserError; where the Hub cannot be
asked, a whole snapshot in the cache is taken.

huggingface_hub is imported late: most models are folders.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.console import EXIT_DISK_FULL, UserError, gib, is_out_of_space, log, space_message, warn
from pipeline.files import check_disk_space, write_json
from pipeline.foreign import parse_json
from pipeline.names import INDEX, SINGLE, WEIGHT_SUFFIXES, hub_model, id_in_cache
from pipeline.processes import launched_by, one_at_a_time, remove_of_dead_launches

OURS = "mulora-pipe-"  # how our files among the Hub cache's locks begin
ROOM_BESIDE = 64 * 2**20  # bytes that stay free beside a download


def model_folder(given: str | Path, asked: str, *, weights: bool = True) -> str:
    """The folder that `given` names, or the one that its repository on the Hub was downloaded into.

    `asked`: the key or flag that named it, with which messages begin. Without `weights` the safetensors stay where they are.
    What names neither a folder nor a repository is given back as it is: whoever reads it says what is wrong.
    Raises UserError where the repository cannot be had, with exit code 28 where it has no room.
    """
    named = hub_model(str(given))
    if named is None or os.path.exists(given):
        return str(given)
    from huggingface_hub import constants

    owner, name = named[0].split("/")
    locks = Path(constants.HF_HUB_CACHE) / ".locks" / f"models--{owner}--{name}"
    answer = locks / f"{OURS}{launched_by()}-{'all' if weights else 'light'}"
    with first_of_launch(locks, answer):
        if "WORLD_SIZE" in os.environ and answer.is_file():
            found = parse_json(answer.read_text(encoding="utf-8"), str(answer))
            if found["given"] == str(given):
                return str(found["folder"])
        folder = _download(*named, f"{asked} = '{given}'", weights)
        if "WORLD_SIZE" in os.environ and locks.is_dir():
            write_json(answer, {"given": str(given), "folder": str(folder)})
    return str(folder)


@contextmanager
def first_of_launch(locks: Path, answer: Path) -> Iterator[None]:
    """One process at a time, of this launch and of others. A cache that cannot be written needs none."""
    try:
        locks.mkdir(parents=True, exist_ok=True)
        remove_of_dead_launches(locks, OURS)
        open(locks / f"{OURS}lock", "a").close()
    except OSError:
        yield
        return
    with one_at_a_time(locks / f"{OURS}lock", answer.exists):
        yield


def _download(name: str, revision: str | None, asked: str, weights: bool) -> Path:
    """The snapshot's folder, with all that is wanted in it."""
    import httpx
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    cache = Path(constants.HF_HUB_CACHE)
    try:
        listed = HfApi().model_info(name, revision=revision, files_metadata=True)
        commit = str(listed.sha)
        sizes = {file.rfilename: file.size or 0 for file in listed.siblings or () if "/" not in file.rfilename}
        if "config.json" not in sizes:
            raise UserError(f"{asked}: the repository on the Hub has no config.json: it holds no transformers model.")
        _fetch(name, commit, [f for f in sizes if f == INDEX or not f.lower().endswith(WEIGHT_SUFFIXES)], sizes, asked)
        folder = cache / f"models--{name.replace('/', '--')}" / "snapshots" / commit
        kept = _weight_files(folder, sizes, asked)
        if weights:
            _fetch(name, commit, kept, sizes, asked)
        elif missing := [file for file in kept if not (folder / file).exists()]:
            size = gib(sum(sizes[file] for file in missing))
            log(f"model:    its weights, {size}, are not here yet; a run downloads them")
        note_commit(folder, revision or "main")
    except (HfHubHTTPError, httpx.HTTPError, OfflineModeIsEnabled) as error:
        why = reason(error, name, revision)
        if not (cached := _cached(name, revision, weights)):
            lacking = f"it is not {'whole ' if weights else ''}in {cache}"
            raise UserError(f"{asked}: there is no such folder here, {lacking}, and {why}") from error
        (log if isinstance(error, OfflineModeIsEnabled) else warn)(f"{asked}: taken from the cache ({cached}): {why}")
        return cached
    except (OSError, RuntimeError) as error:  # RuntimeError is what hf-xet raises
        if is_out_of_space(error):
            raise UserError(f"{asked}: {space_message(error, cache)}", EXIT_DISK_FULL) from error
        raise UserError(f"{asked}: the download stopped ({error}). What has arrived is kept: run again.") from error
    return folder


def _fetch(name: str, commit: str, files: list[str], sizes: dict[str, int], asked: str) -> None:
    """Download those of `files` that the cache has not, once there is room for their `sizes` [bytes]."""
    from huggingface_hub import constants, snapshot_download, try_to_load_from_cache

    cache = Path(constants.HF_HUB_CACHE)
    missing = [f for f in files if not isinstance(try_to_load_from_cache(name, f, cache, commit), str)]
    if not missing:
        return
    needed = sum(sizes[file] for file in missing)
    if needed > ROOM_BESIDE:
        log(f"model:    downloading {name} at {commit[:12]}: {len(missing)} files, {gib(needed)}, to {cache}")
    try:
        check_disk_space(cache, needed + ROOM_BESIDE)
    except UserError as error:
        raise UserError(f"{asked}: {error} (HF_HUB_CACHE names the folder.)", error.exit_code) from None
    patterns = [literally(file) for file in missing]
    snapshot_download(name, revision=commit, allow_patterns=patterns, cache_dir=cache)


def literally(file: str) -> str:
    """A pattern that only this name matches."""
    return "".join(f"[{c}]" if c in "[*?" else c for c in file)


def _weight_files(folder: Path, sizes: dict[str, int], asked: str) -> list[str]:
    """The files that `base_model.read_base` reads weights from. UserError where the repository has no safetensors."""
    if SINGLE in sizes:
        return [SINGLE]
    if INDEX in sizes:
        index: Any = parse_json((folder / INDEX).read_text(encoding="utf-8"), str(folder / INDEX))
        return sorted({str(file) for file in index.get("weight_map", {}).values()} & sizes.keys())
    others = sorted(file for file in sizes if file.lower().endswith(WEIGHT_SUFFIXES))
    what = f"; it has {others[0]}, which is not read: save the model again with save_pretrained" if others else ""
    raise UserError(f"{asked}: the repository on the Hub has neither {SINGLE} nor {INDEX}{what}.")


def note_commit(folder: Path, revision: str) -> None:
    """Write which commit a branch or tag is, where huggingface_hub looks when it cannot ask."""
    ref = folder.parents[1] / "refs" / revision
    if revision == folder.name or (ref.is_file() and ref.read_text() == folder.name):
        return
    with suppress(OSError):
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(folder.name)


def _cached(name: str, revision: str | None, weights: bool) -> Path | None:
    """The snapshot in the cache; None where there is none, or files of the weights are missing from it."""
    from huggingface_hub import constants

    repository = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    ref = repository / "refs" / (revision or "main")
    folder = repository / "snapshots" / (ref.read_text() if ref.is_file() else revision or "main")
    there = (folder / "config.json").is_file() and (not weights or _holds_weights(folder))
    return folder if there else None


def awaits_weights(folder: Path) -> bool:
    """Whether this is a snapshot in the Hub's cache that was downloaded without its weights, or not with all of them."""
    return id_in_cache(folder) is not None and not _holds_weights(folder)


def _holds_weights(folder: Path) -> bool:
    if (folder / SINGLE).is_file():
        return True
    if not (folder / INDEX).is_file():
        return False
    index: Any = parse_json((folder / INDEX).read_text(encoding="utf-8"), str(folder / INDEX))
    return all((folder / str(file)).is_file() for file in index.get("weight_map", {}).values())


def reason(error: Exception, name: str, revision: str | None, kind: str = "model") -> str:
    """Why the repository could not be asked for, and what mends it. Holds no token."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    hub = f"the Hub ({constants.ENDPOINT})"
    if isinstance(error, OfflineModeIsEnabled):
        return (
            "the Hub is not asked, as HF_HUB_OFFLINE is set: unset it, or put there what `hf download "
            f"{'--repo-type dataset ' * (kind == 'dataset')}{name}` gets where there is a network"
        )
    if isinstance(error, GatedRepoError):
        return (
            f"{name} is gated: accept its terms at {constants.ENDPOINT}/{'datasets/' * (kind == 'dataset')}{name}, and log in "
            "with `hf auth login` (or set HF_TOKEN) as who did"
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{hub} shows no {kind} of that name: check the spelling; a private one needs `hf auth login` or HF_TOKEN "
            "of an account that may read it"
        )
    if isinstance(error, RevisionNotFoundError):
        return (
            f"{name} has no revision '{revision}' on {hub}: give a branch, a tag or a commit, or leave @{revision} out"
        )
    if isinstance(error, HfHubHTTPError):
        said = error.server_message or str(error).splitlines()[0]
        return f"{hub} refused {name} ({error.response.status_code}): {said}"
    return f"{hub} cannot be reached: {error}"
