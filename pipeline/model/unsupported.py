"""What transformers, or our own look at a model, raises becomes one message that names the model's type.

Takes the model's type and what is being done; within the context any other exception than a UserError becomes one.
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from pipeline.console import UserError
from pipeline.foreign import printable

MACHINE = (MemoryError, torch.OutOfMemoryError, OSError)  # what lacks is the machine's, and failures.py says it


def reason(error: BaseException | None) -> str:
    """The error and where it was raised, on one line: 'KeyError: 'x' (modeling_zaya.py:123)'."""
    if error is None:
        return "no reason was given"
    where = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(where[-1].filename).name}:{where[-1].lineno})" if where else ""
    return f"{type(error).__name__}: {printable(error)}{place}"


@contextmanager
def named(model_type: str, doing: str) -> Iterator[None]:
    """Whatever is raised inside while `doing` something with a model ends as a UserError with its type and the reason."""
    try:
        yield
    except (UserError, *MACHINE):
        raise
    except Exception as error:
        raise UserError(f"model_type '{model_type}': {doing} fails: {reason(error)}") from error
