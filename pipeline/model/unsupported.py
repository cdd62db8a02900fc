"""What a model's type cannot, or does not, have here: said in one message that names the type.

Whatever transformers, or our own look at a model, raises becomes a UserError; the loss of routers, which is not built, is
said where the model's config asks for it.
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pipeline.console import UserError
from pipeline.foreign import printable

ROUTER_LOSSES = ("router_aux_loss_coef", "aux_loss_coef")  # the keys of their weights: the load-balancing one,
Z_LOSSES = ("router_z_loss_coef",)  # and one of the logits' size
MACHINE = (MemoryError, torch.OutOfMemoryError, OSError)  # what lacks is the machine's, and run/errors.py says it


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
        if is_out_of_memory(error):
            raise
        raise UserError(f"model_type '{model_type}': {doing} fails: {reason(error)}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU or the machine had no more: torch has a type for a GPU's memory only, of pinned and of main memory it
    says so in words."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in str(error) for words in ("CUDA error: out of memory", "DefaultCPUAllocator: can't allocate memory")
    )


def router_loss(config: Any, *, trained: bool = False) -> str | None:
    """A sentence on a loss of the routers that `config` (the model's) asks for and training leaves out, or None.

    `trained`: whether the load-balancing one is trained (model/router_loss.py).
    """
    text = config.get_text_config()
    left_out = Z_LOSSES if trained else (*ROUTER_LOSSES, *Z_LOSSES)
    asked = {name: weight for name in left_out if (weight := getattr(text, name, None))}
    if not getattr(text, "output_router_logits", False) or not asked:
        return None
    return (
        f"the model's config.json asks for a loss of the routers (output_router_logits = true, "
        f"{', '.join(f'{name} = {weight:g}' for name, weight in asked.items())}), which is not trained"
        + (
            ""
            if trained
            else ": only the next token's loss is, and the experts' shares of the tokens are not evened out"
        )
    )
