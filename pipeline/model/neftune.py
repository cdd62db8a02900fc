"""NEFTune: noise on the embedding's output, in training only (Jain et al. 2023, arXiv:2310.05914, algorithm 1).

Takes a stage; gives it hooks that add U(−1, 1)·α/√(T·D) to each row of what its embedding returns, T the row's own
length, or, where positions begin again within a row, that of each part. The first stage alone has an embedding. It lies outside
every layer that is recomputed, so that the noise is drawn once a micro-batch; from torch's default generator, whose state a
checkpoint holds.
"""

from typing import Any

import torch
from torch import Tensor, nn

from pipeline.model.stage import FIRST_READS, Stage
from pipeline.model.structure.parts import embedding_of_model


def apply(stage: Stage, alpha: float) -> None:
    """Hook the noise onto the embedding of `stage`, if it has one."""
    if stage.is_first:
        noise = _Noise(alpha)
        stage.register_forward_pre_hook(noise.note_lengths)
        embedding_of_model(stage.model).register_forward_hook(noise.add)


class _Noise:
    """The two hooks; what the first notes about a micro-batch, the second uses in the same forward."""

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha
        self._lengths_BT = torch.empty(0)

    def note_lengths(self, stage: nn.Module, arguments: tuple[tuple[Tensor, ...]]) -> None:
        """`arguments`: the stage's one, the tensors of `FIRST_READS`; without lengths, rows are full."""
        given = dict(zip(FIRST_READS, arguments[0], strict=False))
        positions_BT = given["position_ids"]
        rows, tokens = positions_BT.shape
        lengths_B = given.get("lengths", torch.full((rows,), tokens, device=positions_BT.device))
        part_BT = (positions_BT == 0).cumsum(1)
        there_BT = torch.arange(tokens, device=positions_BT.device) < lengths_B[:, None]
        counts = torch.zeros(rows, tokens + 1, dtype=torch.int64, device=positions_BT.device)
        self._lengths_BT = counts.scatter_add_(1, part_BT, there_BT.long()).gather(1, part_BT)

    def add(self, embedding: nn.Module, arguments: Any, output_BTD: Tensor) -> Tensor:
        """output + noise, the sum in fp32 and rounded once to the output's dtype."""
        if not embedding.training:
            return output_BTD
        places_BT = self._lengths_BT.clamp(min=1) * output_BTD.shape[-1]  # filler and padding have no tokens
        size_BT = self.alpha / places_BT.to(torch.float32).sqrt()
        noise_BTD = torch.empty(output_BTD.shape, dtype=torch.float32, device=output_BTD.device).uniform_(-1, 1)
        return noise_BTD.mul_(size_BT[:, :, None]).add_(output_BTD).to(output_BTD.dtype)
