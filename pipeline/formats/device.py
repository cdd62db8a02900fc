"""The device that a command computes on, checked before anything is read or written."""

import torch

from pipeline.console import UserError


def usable_device(device: str) -> torch.device:
    """`device` as torch knows it. Raises UserError where there is no such device on this machine."""
    try:
        found = torch.device(device)
        torch.zeros(1, device=found).item()  # the meta device has no values
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: {str(error).splitlines()[0]}") from None
    return found
