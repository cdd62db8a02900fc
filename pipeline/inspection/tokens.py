"""Which tokens a direction of the residual stream points to.

Takes a base model's folder and directions [N, D]; gives, for each, the tokens whose logits it raises and lowers most when
it is added to the last hidden state: the logit lens (nostalgebraist 2020), as Millidge & Black 2022 use it on singular
vectors. The path from there to the logits is linear but for the last norm's division by a length, which changes no order:
score_v = w_v · (γ ⊙ d), with d less its mean where the norm is a LayerNorm. A constant added to all logits changes no
probability, so scores are given less their mean over the vocabulary, in units of their standard deviation.

The head is read in blocks: of its values, and of the scores of a block, never more than BLOCK_ITEMS are in memory.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.console import UserError, progress
from pipeline.families import MULTIPLICATIVE, Kind
from pipeline.formats.base_model import Base, head_of
from pipeline.formats.dtypes import FLOATS
from pipeline.formats.safetensors import StoredTensor, read_floats
from pipeline.names import EMBEDDING, HEAD

BLOCK_ITEMS = 2**24  # 64 MiB in fp32

# Modules by the last part of their names, as transformers' decoders have them: whose output is added to the residual
# stream, and whose input is the (normed) stream. Of other modules no vector is a direction of it.
WRITERS = ("o_proj", "down_proj", "out_proj", "dense_4h_to_h", "c_proj", "fc2", "w2", "wo")
READERS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "qkv_proj",
    "query_key_value",
    "gate_proj",
    "up_proj",
    "gate_up_proj",
    "fc1",
    "w1",
    "w3",
)

Label = Callable[[int], str]


@dataclass(frozen=True)
class Lens:
    """From the last hidden state to the logits: the head's rows [V, D] on disk, and the last norm's linear part.

    gamma_D: fp32, what the norm multiplies by (None: it is not known and left out); centred: it subtracts the mean.
    """

    head: StoredTensor
    gamma_D: Tensor | None
    centred: bool

    def through_norm(self, directions_ND: Tensor) -> Tensor:
        """Directions [N, D] as the head sees them, fp32."""
        seen = directions_ND.float()
        if self.centred:
            seen = seen - seen.mean(1, keepdim=True)
        return seen if self.gamma_D is None else seen * self.gamma_D


@dataclass(frozen=True)
class TokenScores:
    """For one direction: (token id, score) of the tokens it raises most and of those it lowers most, strongest first.

    A score is in standard deviations over the vocabulary. `chance`: the largest of V draws from a normal distribution,
    √(2·ln V) in expectation (from below), which is what a direction that means nothing would show.
    """

    raised: tuple[tuple[int, float], ...]
    lowered: tuple[tuple[int, float], ...]
    chance: float


def sides(kind: Kind, module: str) -> tuple[bool, bool]:
    """Whether a module's (detectors, responses) are directions of the residual stream, by its name and the adapter's kind.

    A multiplicative adapter reads and writes a module's output; an additive one reads its input and writes its output.
    """
    last = module.rsplit(".", 1)[-1]
    writes = last in WRITERS
    return (writes if kind == MULTIPLICATIVE else last in READERS), writes


def lens(base: Base) -> Lens:
    """The lens of a base model: its own head, or the embedding where they are tied.

    Raises UserError where there is no head, it is not a floating-point matrix, or transformers cannot build the model.
    """
    from pipeline.kernels.norm import layer_norm
    from pipeline.model.fusion.probe import norm_form
    from pipeline.model.stage import empty_model, read_model_config
    from pipeline.model.structure.parts import parts_of

    head = _head(base)
    model = empty_model(read_model_config(str(base.folder)), torch.float32, None)
    (norm, *others) = parts_of(model).leaving or (None,)
    form = norm_form(model.get_submodule(norm)) if norm and not others else None
    stored = base.find(f"{norm}.weight")
    if form is None or stored is None or stored.dtype not in FLOATS or stored.shape != head.shape[1:]:
        return Lens(head, None, centred=False)
    function, options = form
    gamma_D = next(read_floats(stored, stored.shape[0], stored.shape[0]))[0].float()
    return Lens(head, gamma_D + 1 if options.get("plus_one") else gamma_D, centred=function is layer_norm)


def _head(base: Base) -> StoredTensor:
    head = head_of(base).head
    if head is None:
        raise UserError(f"{base.folder} holds no head that could be read: neither {HEAD} nor a tied {EMBEDDING}")
    if head.dtype not in FLOATS or len(head.shape) != 2:
        raise UserError(f"{head.name} is {head.dtype} {list(head.shape)}; tokens are read from a floating-point [V, D]")
    return head


@torch.no_grad()
def nearest_tokens(lens: Lens, directions_ND: Tensor, *, count: int, vocabulary: int) -> list[TokenScores]:
    """For each of the directions [N, D] the `count` tokens at both ends, of the first `vocabulary` rows of the head.

    (A head may have rows to spare that no token has.) Raises UserError where D is not the head's.
    """
    rows, width = min(vocabulary, lens.head.shape[0]), lens.head.shape[1]
    if directions_ND.shape[1] != width:
        raise UserError(
            f"the adapter's vectors have {directions_ND.shape[1]} numbers, {lens.head.name} {width} columns"
        )
    seen_DN = lens.through_norm(directions_ND).T.contiguous()
    n = seen_DN.shape[1]
    top, low = _Best(n, count, largest=True), _Best(n, count, largest=False)
    total_N, squares_N = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    first = 0
    with progress("unembedding", total=rows) as advance:
        for block in read_floats(lens.head, width, BLOCK_ITEMS // max(width, n) * width):
            scores_VN = (block[: rows - first].float() @ seen_DN).double()
            total_N += scores_VN.sum(0)
            squares_N += scores_VN.square().sum(0)
            top.add(scores_VN, first)
            low.add(scores_VN, first)
            first += len(scores_VN)
            advance(len(scores_VN))
            if first >= rows:
                break
    mean_N = total_N / rows
    spread_N = (squares_N / rows - mean_N.square()).clamp(min=0).sqrt()
    chance = math.sqrt(2 * math.log(max(rows, 2)))
    raised, lowered = top.standardised(mean_N, spread_N), low.standardised(mean_N, spread_N)
    return [TokenScores(up, down, chance) for up, down in zip(raised, lowered, strict=True)]


class _Best:
    """The largest (or smallest) `count` scores of each of N directions over blocks of rows, with the rows' numbers."""

    def __init__(self, n: int, count: int, *, largest: bool) -> None:
        self.count, self.largest = count, largest
        self.values_KN, self.ids_KN = torch.empty(0, n, dtype=torch.float64), torch.empty(0, n, dtype=torch.int64)

    def add(self, scores_VN: Tensor, first: int) -> None:
        """Take in the scores of the rows from `first` on."""
        values, places = scores_VN.topk(min(self.count, len(scores_VN)), dim=0, largest=self.largest)
        values, ids = torch.cat([self.values_KN, values]), torch.cat([self.ids_KN, places + first])
        self.values_KN, order = values.topk(min(self.count, len(values)), dim=0, largest=self.largest)
        self.ids_KN = ids.gather(0, order)

    def standardised(self, mean_N: Tensor, spread_N: Tensor) -> list[tuple[tuple[int, float], ...]]:
        """(id, score in standard deviations) of each direction, the best first."""
        z_KN = (self.values_KN - mean_N) / spread_N.clamp(min=torch.finfo(torch.float64).tiny)
        return [tuple(zip(ids, z, strict=True)) for ids, z in zip(self.ids_KN.T.tolist(), z_KN.T.tolist(), strict=True)]


def labels(tokenizer: Any) -> Label:
    """A function from a token's id to a readable word: its text with blanks and control characters made visible."""

    def label(token: int) -> str:
        raw = tokenizer.convert_ids_to_tokens(token)
        if raw is None:
            return f"⟨{token}⟩"
        text = tokenizer.decode([token])
        if raw.startswith(("▁", "Ġ")) and not text.startswith(" "):
            text = f" {text}"
        return visible(text) if text and "\ufffd" not in text else f"⟨{visible(raw)}⟩"

    return label


def visible(text: str) -> str:
    """`text` on one line: ␣ for spaces, ↵ for ends of lines, · for what has no shape (control characters among them)."""
    marks = {" ": "␣", "\n": "↵", "\t": "⇥"}
    return printable("".join(marks.get(c, c) for c in text))


def printable(text: str, *, kept: str = "") -> str:
    """`text` with · for every character that has no shape, control characters of a terminal among them, but for `kept`."""
    return "".join(c if c.isprintable() or c in kept else "·" for c in text)
