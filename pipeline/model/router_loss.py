"""The routers' loss of a mixture of experts, which evens out the experts' shares of the tokens, over any number of stages.

Of a micro-batch, over all its tokens n and all layers' routers (Switch Transformer, Fedus et al. 2021, eqs. 4 to 6, as
transformers computes it of all layers together):  L = E · Σ_e f_e·P_e,  f_e the share of the tokens that choose expert e (the
shares sum to k), P_e the mean of e's probability. Both are of all layers, so no stage can compute its part alone; and the
gradient of a probability, E·f_e / n, needs the choices of the layers behind it.

Two sums of E numbers are therefore handed from stage to stage with the hidden state, in rows behind its last token, and the
last stage has the loss. Autograd does the rest: what comes back for these rows is the gradient of every layer's
probabilities before them. One floating-point tensor crosses a boundary, as ever (structure/carried.py).

Takes a stage; gives it a forward that does so, and a `RouterLoss` that has the loss on the last stage and each layer's load.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from pipeline.model.stage import FIRST_READS, Stage
from pipeline.model.structure.carried import pack, rows_behind, unpack
from pipeline.model.structure.parts import carried_width
from pipeline.names import layer_of

COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")  # what models call its weight
SCALE = 2.0**-16  # of the sums on the wire, so that they, and their gradients, are of a size that fp16 has too


def recorder(model: PreTrainedModel) -> Any:
    """What transformers records router logits by; None for a model of which it has no such loss."""
    found = (getattr(model.base_model, "_can_record_outputs", None) or {}).get("router_logits")
    counts = (getattr(model, name, None) for name in ("num_experts", "num_experts_per_tok"))
    weighed = any(getattr(model, name, None) is not None for name in COEFFICIENTS)
    plain = isinstance(found, OutputRecorder) and isinstance(found.target_class, type)
    return found if plain and weighed and all(isinstance(n, int) for n in counts) else None


def asked_for(model: PreTrainedModel) -> float:
    """The weight of the loss that the model's own config asks for in training; 0 for none."""
    text = model.config.get_text_config()
    if not getattr(text, "output_router_logits", False):
        return 0.0
    return next((float(c) for name in COEFFICIENTS if (c := getattr(text, name, None))), 0.0)


def bytes_behind(model: PreTrainedModel, rows: int) -> int:
    """Of a micro-batch of `rows` rows, what travels behind the hidden state of `model`."""
    width = carried_width(model)
    return rows * rows_behind(2 * int(model.num_experts) + 1 + rows, rows, width) * width * model.dtype.itemsize


class RouterLoss:
    """What the routers of one stage do. `coefficient`: the loss's weight beside that of the tokens."""

    def __init__(self, stage: Stage, coefficient: float) -> None:
        recorded = recorder(stage.model)
        if recorded is None:
            raise ValueError("the model has no loss of its routers")
        self.coefficient = coefficient
        self._experts, self._active = int(stage.model.num_experts), int(stage.model.num_experts_per_tok)
        self._seen: list[tuple[int, Tensor]] | None = None  # of a forward that is running: layer, logits [N, E]
        self._loss: Tensor | None = None
        self._losses: list[Tensor] = []
        self._loads: dict[int, Tensor] = {}
        for name, module in stage.model.named_modules():
            if isinstance(module, recorded.target_class) and name.endswith(recorded.layer_name or ""):
                module.register_forward_hook(self._note(layer_of(name) or 0, recorded.index))
        stage.forward = functools.partial(self._run, stage, stage.forward)  # type: ignore[method-assign]

    def begin_step(self) -> None:
        """A step begins: what is measured is of its micro-batches."""
        self._losses, self._loads = [], {}

    def take(self) -> Tensor:
        """On the last stage, the loss of the micro-batch that has just run: fp32 scalar, without the coefficient."""
        assert self._loss is not None, "no micro-batch has run since the last one was taken"
        loss, self._loss = self._loss, None
        return loss

    def measured(self) -> dict[str, float]:
        """Of the step so far, by tag: the loss, on the last stage, as the mean over micro-batches; and for each layer the
        largest and the least share of tokens that an expert has, against the even one (1 is even)."""
        found = {"train/router_loss": float(torch.stack(self._losses).mean())} if self._losses else {}
        for layer, counts in sorted(self._loads.items()):
            relative = counts * (self._experts / counts.sum().clamp(min=1))
            found[f"expert_load/{layer}/most"] = float(relative.max())
            found[f"expert_load/{layer}/least"] = float(relative.min())
        return found

    def _note(self, layer: int, index: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            if self._seen is not None:  # a layer that is computed again is not counted again
                self._seen.append((layer, output[index] if isinstance(output, tuple | list) else output))

        return hook

    def _run(
        self, stage: Stage, forward: Callable[..., Any], inputs: tuple[Tensor, ...], cache: Cache | None = None
    ) -> Any:
        """As `Stage.forward`, in training, when there is no cache, with the sums behind the hidden state."""
        if not stage.training:
            return forward(inputs, cache)
        given = dict(zip(FIRST_READS, inputs, strict=False))
        x, positions_BT = inputs[:2]
        rows, tokens = positions_BT.shape
        if stage.is_first:
            lengths_B = given.get("lengths", torch.full((rows,), tokens, device=x.device)).float()
            totals = torch.zeros(2 * self._experts + 1, device=x.device)
        else:
            x, carried = unpack(x, tokens, 2 * self._experts + 1 + rows, SCALE)
            totals, lengths_B = carried[:-rows], carried[-rows:].detach()
        self._seen = []
        try:
            output = forward((x, *inputs[1:]))
            seen = self._seen
        finally:
            self._seen = None
        kept_N = (torch.arange(tokens, device=x.device) < lengths_B[:, None]).flatten().float()
        for layer, logits in seen:
            totals = totals + self._sums(layer, logits.reshape(-1, self._experts), kept_N)
        if stage.is_last:
            chosen, probable, n = totals.split([self._experts, self._experts, 1])
            n = n.clamp(min=1)
            self._loss = torch.sum((chosen / n).detach() * (probable / n)) * self._experts
            self._losses.append(self._loss.detach())
            return output
        return pack(output[0], torch.cat([totals, lengths_B]), SCALE), *output[1:]

    def _sums(self, layer: int, logits_NE: Tensor, kept_N: Tensor) -> Tensor:
        """Choices, probabilities and tokens of one layer: fp32 [2·E + 1]."""
        weights_NE = logits_NE.softmax(dim=-1)
        chosen = torch.zeros(self._experts, device=kept_N.device)
        indices = weights_NE.topk(self._active, dim=-1).indices
        chosen.scatter_add_(0, indices.flatten(), kept_N.repeat_interleave(self._active))
        self._loads[layer] = self._loads.get(layer, 0) + chosen
        probable = (weights_NE.float() * kept_N[:, None]).sum(0)
        return torch.cat([chosen, probable, kept_N.sum()[None]])
