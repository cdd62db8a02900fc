"""What DeepSpeed's pipeline schedule need not do: work and messages for gradients that nobody reads.

Takes DeepSpeed's engine and the first stage that owns a trained parameter; gives the engine a table of instructions of
its own. A stage below that one only runs forward, without gradients; that stage ends its backward at its first trained
parameter, as what it received asks for no gradient; nobody below it is sent one. Stages above are DeepSpeed's own, a
stage without trained parameters too: gradients go through it.

The schedule itself stays: messages are left out on both ends, in pairs, so their order does. Every stage also frees a
buffer as soon as nothing will read it again; DeepSpeed keeps inputs, outputs and labels until the next micro-batch.
"""

from collections.abc import Callable

import torch
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor

Instruction = Callable[..., None]


def apply(engine: PipelineEngine, first_trained: int) -> None:
    """Cut the engine's instructions for its stage. `first_trained` must be the same number on every process."""
    mine: dict[type, Instruction] = {schedule.ForwardPass: _forward, schedule.SendActivation: _send_activations}
    if engine.stage_id <= first_trained:
        mine |= {schedule.RecvActivation: _receive_without_gradient, schedule.SendGrad: _nothing}
    if engine.stage_id < first_trained:
        mine |= {schedule.ForwardPass: _forward_only, schedule.RecvGrad: _nothing, schedule.BackwardPass: _nothing}
    engine._INSTRUCTION_MAP = {**PipelineEngine._INSTRUCTION_MAP, **mine}


def _forward(engine: PipelineEngine, buffer_id: int) -> None:
    engine._exec_forward_pass(buffer_id)
    _free_unless_gradient_comes(engine, "inputs", buffer_id)
    if engine.is_last_stage():  # the loss has all that its backward needs
        engine.pipe_buffers["outputs"][buffer_id] = engine.pipe_buffers["labels"][buffer_id] = None


def _forward_only(engine: PipelineEngine, buffer_id: int) -> None:
    with torch.no_grad():
        _forward(engine, buffer_id)


def _send_activations(engine: PipelineEngine, buffer_id: int) -> None:
    engine._exec_send_activations(buffer_id)
    _free_unless_gradient_comes(engine, "outputs", buffer_id)


def _receive_without_gradient(engine: PipelineEngine, buffer_id: int) -> None:
    engine._exec_recv_activations(buffer_id)
    for tensor in _tensors(engine, "inputs", buffer_id):
        tensor.requires_grad_(False)  # DeepSpeed asks for the gradient of every float it receives


def _nothing(engine: PipelineEngine, buffer_id: int) -> None:
    pass


def _free_unless_gradient_comes(engine: PipelineEngine, kind: str, buffer_id: int) -> None:
    """What DeepSpeed's SendGrad (inputs) or BackwardPass (outputs) will read, they free themselves: of a tuple the tensors that
    require a gradient. What goes with these (positions, the reference's states) nobody reads again."""
    buffers = engine.pipe_buffers[kind]
    wanted = tuple(t for t in _tensors(engine, kind, buffer_id) if t.requires_grad and torch.is_grad_enabled())
    if not wanted:
        buffers[buffer_id] = None
    elif isinstance(buffers[buffer_id], tuple):
        buffers[buffer_id] = wanted


def _tensors(engine: PipelineEngine, kind: str, buffer_id: int) -> tuple[Tensor, ...]:
    found = engine.pipe_buffers[kind][buffer_id]
    return found if isinstance(found, tuple) else (found,)
