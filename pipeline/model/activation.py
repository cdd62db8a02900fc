"""Activation memory: recompute decoder layers in backward, keep their inputs on the device or in pinned host memory.

Takes a stage; its layers then keep only their input (16 KB per token and layer at D = 8192 in bf16) and run forward
again in backward. Non-reentrant, so gradients need not reach the embedding and the RNG state is restored: dropout in a
recomputed layer drops the same elements.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pipeline.model.stage import Stage


def apply(stage: Stage, mode: bool | str) -> None:
    """`False` keeps everything; `True` recomputes each layer; 'unsloth' also keeps the layers' inputs in host memory."""
    if not mode:
        return
    host = HostMemory() if mode == "unsloth" else None
    for layer in stage.layers.values():
        trains = any(p.requires_grad for p in layer.parameters())
        layer.forward = functools.partial(_recomputed, layer.forward, host, trains)  # type: ignore[method-assign]


def _recomputed(
    forward: Any, host: "HostMemory | None", trains: bool, hidden: Tensor, *args: Any, **kwargs: Any
) -> Any:
    if not torch.is_grad_enabled() or not (trains or hidden.requires_grad):  # nothing runs backward through here
        return forward(hidden, *args, **kwargs)
    if host is None:
        return checkpoint(forward, hidden, *args, use_reentrant=False, **kwargs)
    # `checkpoint` saves its input through autograd, so these hooks see that one tensor and nothing inside the layer.
    with torch.autograd.graph.saved_tensors_hooks(host.keep, host.bring_back):
        return checkpoint(forward, hidden, *args, use_reentrant=False, **kwargs)


class HostMemory:
    """Keeps saved tensors in host memory; on a GPU in pinned buffers, copied out on a side stream.

    The copy out overlaps with the layer's own work; the copy back waits for it and runs on the current stream.
    """

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream() if torch.cuda.is_available() else None

    def keep(self, tensor: Tensor) -> tuple[Tensor, torch.device, Any]:
        """Device tensor → (host copy, its device, the event after which the copy is whole)."""
        if self._stream is None or not tensor.is_cuda:
            return tensor.detach().clone(), tensor.device, None
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            host.copy_(tensor, non_blocking=True)
            event = self._stream.record_event()
        tensor.record_stream(self._stream)  # its memory must not be reused before the copy is done
        return host, tensor.device, event

    def bring_back(self, kept: tuple[Tensor, torch.device, Any]) -> Tensor:
        """The tensor as it was, on its device."""
        host, device, event = kept
        if event is not None:
            torch.cuda.current_stream().wait_event(event)
        return host.to(device, non_blocking=True)
