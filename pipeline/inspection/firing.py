"""How often and how strongly an adapter's detectors fire in a text.

Takes a base model's folder, a `Text` and the `Spectrum` of each module; gives a `Firing` a module. The detectors look at
what their modules put out in the *base model without the adapter*: what the adapter would find, not what it makes of it
once the layers below have changed their outputs. With c = cos(detector, h) of a module's output h at a token,

    fires        |c| > 4/√D: four standard deviations of the cosine of a random direction, 1 of 16 000 of which get there
    strength     gain·|c|: what the adapter adds along the response, in lengths of h
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.console import UserError
from pipeline.inspection.passages import Text
from pipeline.inspection.spectrum import Spectrum

DEVIATIONS = 4.0


@dataclass(frozen=True)
class Firing:
    """One module's K detectors in a text of T tokens; fp64 or fp32 on the CPU.

    threshold: the |cos| above which one fires. share_K: of tokens, 0 to 1. mean_K, largest_K: of the strength.
    cosines_TN: c at every token, for the N leading detectors (fp32).
    """

    threshold: float
    share_K: Tensor
    mean_K: Tensor
    largest_K: Tensor
    cosines_TN: Tensor


class _Counts:
    """The sums behind a `Firing` while rows come in."""

    def __init__(self, spectrum: Spectrum, kept: int) -> None:
        self.gains_K, self.detectors_KD, self.kept = spectrum.gains_K, spectrum.detectors_KD.float(), kept
        self.threshold = DEVIATIONS / math.sqrt(spectrum.detectors_KD.shape[1])
        n = len(self.gains_K)
        self.fired_K, self.sum_K, self.max_K = (torch.zeros(n, dtype=torch.float64) for _ in range(3))
        self.cosines: dict[int, Tensor] = {}

    def add(self, row: int, output_TD: Tensor) -> None:
        """Take in a row's outputs [T, D], the tokens of the text alone."""
        h_TD = output_TD.float()
        unit_TD = h_TD / h_TD.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        cosines_TK = (unit_TD @ self.detectors_KD.to(h_TD.device).T).cpu()
        size_TK = cosines_TK.abs().double()
        self.fired_K += (size_TK > self.threshold).sum(0)
        self.sum_K += size_TK.sum(0)
        self.max_K = torch.maximum(self.max_K, size_TK.amax(0))
        self.cosines[row] = cosines_TK[:, : self.kept].clone()

    def firing(self) -> Firing:
        cosines_TN = torch.cat([self.cosines[row] for row in sorted(self.cosines)])
        n = len(cosines_TN)
        return Firing(
            self.threshold, self.fired_K / n, self.gains_K * self.sum_K / n, self.gains_K * self.max_K, cosines_TN
        )


def fire(
    folder: str, text: Text, spectra: Mapping[str, Spectrum], *, kept: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Firing]:
    """Run the base model over `text`, a layer at a time, in `dtype` on `device`; a `Firing` for each module of `spectra`.

    `kept`: of how many leading detectors a module the cosines are kept token by token. Raises UserError where a module
    does not exist, does not give one vector of the detectors' width for every token (experts see some only), or where
    the model gives NaN or infinite values.
    """
    from pipeline.model.layerwise import run_layerwise

    counts = {module: _Counts(spectrum, kept) for module, spectrum in spectra.items()}

    def tap(row: int, name: str, output_TD: Tensor) -> None:
        width = counts[name].detectors_KD.shape[1]
        if output_TD.shape != (len(text.rows[row]), width):
            raise UserError(
                f"--text: {name} gives {list(output_TD.shape)} for {len(text.rows[row])} tokens where the adapter's "
                f"detectors have {width} numbers: it does not give each token one such vector, so it cannot be read"
            )
        if not torch.isfinite(output_TD).all():
            raise UserError(f"--text: {name} gives NaN or infinite values on {text.name} in {dtype}")
        counts[name].add(row, output_TD[text.start :])

    try:
        run_layerwise(folder, text.rows, modules=counts.__contains__, tap=tap, device=device, dtype=dtype)
    except ValueError as error:  # no such modules in the model as transformers builds it
        raise UserError(f"--text: {folder} cannot be read with this adapter: {error}") from error
    silent = [module for module, count in counts.items() if len(count.cosines) != len(text.rows)]
    if silent:
        raise UserError(f"--text: {silent[0]} did not run in the base model ({len(silent)} of {len(counts)} modules)")
    return {module: count.firing() for module, count in counts.items()}
