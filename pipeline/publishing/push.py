"""The upload to the Hub: one folder's files, by a list of what may go.

Takes a folder that the fold, an export or a save has written; gives a repository. What is not on the list stays here: of
weights the files that the folder's own format names, of the rest what a model or an adapter is used with. A checkpoint's
shards, optimizer states, metrics and caches are on no list.
"""

import fnmatch
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from pipeline.artifacts.adapter.adapter import CONFIG_FILE, WEIGHTS_FILE
from pipeline.console import UserError
from pipeline.foreign import read_object
from pipeline.formats.base_model import read_base
from pipeline.formats.links import check_links
from pipeline.names import public_name

BESIDE_WEIGHTS = (
    "README.md",
    "loss.svg",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
    "adapter_config.json",
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "fold_report.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "tekken.json",
    "chat_template*",
    "additional_chat_templates/*",
)


def check_ready() -> None:
    """Raise UserError where nothing could be uploaded: offline by the environment, or no token. Connects to nothing."""
    if constants.HF_HUB_OFFLINE:
        raise UserError(
            "after_training: 'push' with HF_HUB_OFFLINE=1 (or TRANSFORMERS_OFFLINE=1) in the environment, which forbids "
            "it; unset the variable, or remove 'push'"
        )
    if not get_token():
        raise UserError(
            "after_training: 'push' needs a token that may write: log in with `hf auth login`, or set HF_TOKEN "
            "(https://huggingface.co/settings/tokens); or remove 'push'"
        )


def files_of(folder: Path) -> list[str]:
    """The files of `folder` that may be uploaded, as paths relative to it, in order.

    Raises UserError where there are no weights, and for a link that leads out of the folder.
    """
    check_links(folder)
    if (folder / CONFIG_FILE).is_file():
        weights = {WEIGHTS_FILE}
    elif (folder / "config.json").is_file():
        weights = set(read_base(folder, "push").headers)
    else:
        weights = {path.name for path in folder.glob("*.gguf")}
    if not weights or not all((folder / name).is_file() for name in weights):
        raise UserError(f"{folder} holds neither an adapter nor a model: there is nothing to upload.")
    every = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    beside = {name for name in every if any(_matches(name, pattern) for pattern in BESIDE_WEIGHTS)}
    return [name for name in every if name in weights or name in beside]


def upload(folder: Path, files: list[str], *, repository: str, private: bool, message: str) -> str:
    """Upload `files` of `folder` to the model repository OWNER/NAME, made if it is not there; gives its address.

    `message`: the commit's. Raises UserError where the Hub cannot be reached or refuses, and where `private` is asked for
    and a repository of that name is public.
    """
    check_ready()
    with _explained(repository):
        hub = HfApi(token=get_token())
        made = hub.create_repo(repository, private=private, exist_ok=True)
        if private and not hub.model_info(made.repo_id).private:
            raise UserError(
                f"{made} is public: nothing was uploaded. Set hub_private_repo = false to upload to it, or hub_model_id "
                "to another name."
            )
        operations = [CommitOperationAdd(name, public_content(folder / name)) for name in files]
        hub.create_commit(made.repo_id, operations, commit_message=message)
    return str(made)


def public_content(file: Path) -> Path | bytes:
    """What is uploaded of a file: the file, but of an adapter's configuration without the path of the base on this machine."""
    if file.name != CONFIG_FILE:
        return file
    config = read_object(file, "an adapter's configuration")
    named = config.get("base_model_name_or_path")
    public = {**config, "base_model_name_or_path": public_name(named)} if isinstance(named, str) else config
    return (json.dumps(public, indent=2, ensure_ascii=False) + "\n").encode()


def _matches(name: str, pattern: str) -> bool:
    """`*` stays within a folder."""
    return name.count("/") == pattern.count("/") and fnmatch.fnmatchcase(name, pattern)


@contextmanager
def _explained(repository: str) -> Iterator[None]:
    """One UserError for whatever may go wrong between here and the Hub. Messages hold no token."""
    try:
        yield
    except HfHubHTTPError as error:
        raise UserError(_refusal(error, repository)) from error
    except (httpx.HTTPError, OfflineModeIsEnabled) as error:
        raise UserError(f"cannot reach the Hub at {constants.ENDPOINT}: {error}") from error
    except (HFValidationError, ValueError) as error:
        raise UserError(f"the Hub does not take the upload to {repository}: {error}") from error
    except RuntimeError as error:  # how the client hands on what went wrong in one of its threads
        cause = error.__cause__
        said = _refusal(cause, repository) if isinstance(cause, HfHubHTTPError) else f"{error} {cause or ''}".strip()
        raise UserError(f"the upload to {repository} was cut short: {said}") from error


def _refusal(error: HfHubHTTPError, repository: str) -> str:
    status = error.response.status_code
    if status == 401:
        return (
            "the Hub does not know the token (401), or does not show it the repository "
            f"{repository}: log in again with `hf auth login`, or set HF_TOKEN to one that is valid"
        )
    if status == 403:
        return f"the token may not write to {repository} (403): it needs the role 'write' for that owner"
    said = error.server_message or str(error).splitlines()[0]
    return f"the Hub refused the upload to {repository} ({status}): {said}"
