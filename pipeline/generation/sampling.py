"""Which token comes next: greedy, or drawn from what temperature, top-k, top-p and min-p leave.

Takes the logits of one place; gives a token id. The filters are transformers' own, in its order (generation/utils.py,
`_get_logits_processor`). Randomness comes from a generator of its own and from nothing else, so that what a run says changes
no number of its training.
"""

import zlib
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import LogitsProcessor, MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

NOT_FINITE = -1  # in the place of a token, where the model gives no numbers to choose by


@dataclass(frozen=True)
class Sampling:
    """`temperature` 0 is greedy: the likeliest token, whatever the others say. `top_k` 0, `top_p` 1 and `min_p` 0 leave all.

    `min_p`: tokens less likely than this times the likeliest are left out (Nguyen et al. 2024, arXiv:2407.01082).
    `temperature_last`: the filters see the model's own probabilities, as in llama.cpp, and what they leave is tempered.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    temperature_last: bool = False
    seed: int = 0

    def noise(self, step: int, prompt: str) -> torch.Generator:
        """A generator on the CPU for one answer, of the same numbers on any device and whatever else is being written."""
        # One 32-bit number: torch's CPU generator ignores the upper half of a seed.
        return torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {step} {prompt}".encode()))

    def choose(self, logits_V: Tensor, noise: torch.Generator) -> int:
        """The next token's id, or NOT_FINITE where a logit is NaN or +infinite. `logits_V`: fp32."""
        if not bool(torch.isfinite(logits_V.max())):  # -inf is a token that cannot be chosen
            return NOT_FINITE
        if self.temperature == 0:
            return int(logits_V.argmax())
        scores_1V = logits_V.unsqueeze(0)
        for warp in self._warpers:
            scores_1V = warp(None, scores_1V)  # type: ignore[arg-type]  # none of them reads what was said before
        return int(torch.multinomial(scores_1V.softmax(-1).cpu(), 1, generator=noise))

    @cached_property
    def _warpers(self) -> list[LogitsProcessor]:
        heat: list[LogitsProcessor] = [TemperatureLogitsWarper(self.temperature)] if self.temperature != 1 else []
        filters: list[LogitsProcessor] = []
        if self.top_k:
            filters.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            filters.append(TopPLogitsWarper(self.top_p))
        if self.min_p:
            filters.append(MinPLogitsWarper(self.min_p))
        return [*filters, *heat] if self.temperature_last else [*heat, *filters]
