"""The oracle of the training tests: the whole Hugging Face model, a plain PyTorch loop, an adapter written here.

Takes a model folder, the adapter's initial tensors and the rows of each step; gives loss, gradients, norm, clip
coefficient and weights of each step. Of the product it uses nothing but the order of the rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pipeline.config import loading
from pipeline.data import tokenizer
from pipeline.data.batches import Position
from pipeline.training.data import specs
from pipeline.training.data.batches import micro_batches
from pipeline.training.data.read import read_data

Rows = list[Tensor]  # token ids, int64 [T], of each row

UNIT = 2**-24  # fp32 rounds a number by this part of it at most
# A gradient is the end of some 4 layers × 12 operations forward and as many backward, each rounded, on our side and on
# the oracle's. By step k it has also inherited what its weights drifted apart in k − 1 steps, which is as much again each.
GRADIENT_TOLERANCE = 2 * 100 * UNIT
# A loss of 6 has gone through the forward half of them.
LOSS_TOLERANCE = 6 * 2 * 50 * UNIT


@dataclass
class Trace:
    """What five steps computed, by step: index 0 is the first."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    coefficients: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)


def rows(config_path: Path, overrides: list[str], steps: int, replicas: int = 1) -> tuple[list[Rows], dict[str, Rows]]:
    """The training rows of each step over all replicas, unpadded, and the evaluation rows by set."""
    config = loading.load(str(config_path), None, overrides)
    data = read_data(specs.data_of(config), tokenizer.load(config.model))
    batches = micro_batches(specs.data_of(config), data, 0, replicas)
    training, position = [], Position()
    for _ in range(steps):
        info = batches.info(position)
        training.append([as_tensor(batches.stores[dataset].ids(row)) for dataset, row in info.rows])
        position = info.next_position
    held_out = {name: [as_tensor(r.store.ids(int(row))) for row in r.rows] for name, r in data.evaluation.items()}
    return training, held_out


def size(tensor: Tensor) -> float:
    """Its 2-norm, in fp64."""
    return float(torch.linalg.vector_norm(tensor.double()))


def weight_tolerance(trace: Trace, name: str, lr: float, eps: float) -> float:
    """How far apart, in norm, noise in the gradients and rounding can bring a weight in the steps of `trace`.

    An update m/(√v + ε) moves by at most δg/ε · 5/4 with a gradient's δg: 1 through m, and through v at most
    √v/(√v + ε)² ≤ 1/(4ε). (So ε must not be tiny: elements whose gradient is nearly 0 would show nothing but noise.)
    The decay and the update round the weight once each, on both sides.
    """
    steps = len(trace.losses)
    largest = max(c * size(g[name]) for c, g in zip(trace.coefficients, trace.gradients, strict=True))
    noise = lr * 5 / 4 * steps * GRADIENT_TOLERANCE * largest / eps
    return noise + steps * 2 * 2 * UNIT * size(trace.weights[name])


def as_tensor(ids: Any) -> Tensor:
    """Any integers as int64."""
    return torch.tensor([int(i) for i in ids])


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The whole model, frozen."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)


def with_multiplicative(model: Any, initial: dict[str, Tensor], scaling: float) -> dict[str, Tensor]:
    """Hooks h + s·(h·Aᵀ)·Bᵀ on the output h of each module named in `initial` (<module>.A, <module>.B); the leaves."""
    leaves = {name: tensor.to(model.dtype, copy=True).requires_grad_() for name, tensor in initial.items()}
    for module in {name[:-2] for name in initial}:
        A, B = leaves[f"{module}.A"], leaves[f"{module}.B"]
        model.get_submodule(module).register_forward_hook(lambda _m, _x, h, A=A, B=B: h + scaling * (h @ A.T) @ B.T)
    return leaves


def keep_output(kept: dict[int, Tensor], index: int, module: Any, args: Any, output: Any) -> None:
    """A forward hook of layer `index`: its hidden state [B, T, D] into `kept`."""
    kept[index] = output[0] if isinstance(output, tuple) else output


def in_full(model: Any, parts: tuple[str, ...] | None) -> dict[str, Tensor]:
    """The model's own weights, all or those with one of `parts` in their name; a tied head is its embedding, and comes once."""
    leaves = {n: p for n, p in model.named_parameters() if parts is None or set(parts) & set(n.split("."))}
    for leaf in leaves.values():
        leaf.requires_grad_(True)
    return leaves


def with_peft_lora(model: Any, initial: dict[str, Tensor], rank: int, alpha: float) -> tuple[Any, dict[str, Tensor]]:
    """PEFT's own LoRA over the whole model, with `initial` put in place; the PEFT model and the leaves by our names."""
    from peft import LoraConfig, get_peft_model

    modules = sorted({name[:-2] for name in initial})
    peft = get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, target_modules=modules, bias="none"))
    theirs = dict(peft.named_parameters())
    leaves = {name: theirs[f"base_model.model.{name[:-2]}.lora_{name[-1]}.default.weight"] for name in initial}
    assert {id(p) for p in theirs.values() if p.requires_grad} == {id(p) for p in leaves.values()}
    with torch.no_grad():
        for name, leaf in leaves.items():
            leaf.copy_(initial[name])
    return peft, leaves


def summed_loss(model: Any, row: Tensor, logit_scale: float) -> Tensor:
    """Σ over a row's T − 1 targets of −log p(next token), from the model's own logits."""
    logits = model(input_ids=row.unsqueeze(0), use_cache=False).logits[0, :-1].float() * logit_scale
    return cross_entropy(logits, row[1:], reduction="sum")


@torch.no_grad()
def evaluate(model: Any, rows: Rows) -> float:
    """Mean loss over all target tokens, summed in fp64."""
    return sum(float(summed_loss(model, row, 1.0)) for row in rows) / sum(len(row) - 1 for row in rows)


def train(
    model: Any,
    leaves: dict[str, Tensor],
    steps: list[Rows],
    make_optimizer: Callable[[list[Tensor]], Any],
    clip: float,
    logit_scale: float = 1.0,
) -> Trace:
    """The plain loop: mean over the step's target tokens, backward, PyTorch's clipping, the optimizer's step."""
    trace = Trace()
    optimizer = make_optimizer(list(leaves.values()))
    for step in steps:
        targets = sum(len(row) - 1 for row in step)
        loss = 0.0
        for row in step:
            part = summed_loss(model, row, logit_scale) / targets
            part.backward()
            loss += part.item()
        trace.losses.append(loss)
        trace.gradients.append({name: leaf.grad.clone() for name, leaf in leaves.items()})  # type: ignore[union-attr]
        norm = float(torch.nn.utils.clip_grad_norm_(list(leaves.values()), clip or float("inf")))
        trace.norms.append(norm)
        trace.coefficients.append(min(1.0, clip / (norm + 1e-6)) if clip else 1.0)
        optimizer.step()
        optimizer.zero_grad()
    trace.weights = {name: leaf.detach().clone() for name, leaf in leaves.items()}
    return trace
