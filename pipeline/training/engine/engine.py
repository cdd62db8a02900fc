"""DeepSpeed: the schedule, the wires and the launcher; nothing of the numerics.

Takes a stage, an objective and an optimizer; gives DeepSpeed's pipeline engine over them. Its configuration has no
dtype, clipping or ZeRO block: those would cast parameters, wrap the optimizer and clip by the first stage's norm.
"""

import contextlib
import importlib
import io
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology, ProcessTopology
from torch import nn
from torch.utils._pytree import tree_leaves

from pipeline import processes
from pipeline.console import UserError, log_if_slow, rank
from pipeline.objectives.objective import Objective
from pipeline.training.engine import schedule as schedule_cuts
from pipeline.training.engine import wires
from pipeline.training.nodes import meeting
from pipeline.training.optim.pipeline_optimizer import PipelineOptimizer
from pipeline.training.start import launch

MINIMUM_DEEPSPEED = (0, 19, 3)
# DeepSpeed's instructions, and whether they wait for another process.
IN_WORDS = {
    schedule.LoadMicroBatch: ("reading a micro-batch", False),
    schedule.ForwardPass: ("the forward pass", False),
    schedule.BackwardPass: ("the backward pass", False),
    schedule.OptimizerStep: ("the optimizer's update", False),
    schedule.SendActivation: ("sending activations", True),
    schedule.RecvActivation: ("waiting for activations", True),
    schedule.SendGrad: ("sending gradients", True),
    schedule.RecvGrad: ("waiting for gradients", True),
    schedule.ReduceGrads: ("summing gradients", True),
    schedule.ReduceTiedGrads: ("summing tied gradients", True),
}


class Place(NamedTuple):
    """Where this process stands: its rank, stage and replica, and how many there are of each; `nodes`: of each rank, its node."""

    rank: int
    world: int
    stage: int
    stages: int
    replica: int
    replicas: int
    topology: ProcessTopology
    device: torch.device
    nodes: tuple[int, ...] = (0,)

    @property
    def number(self) -> int:
        """The same for a stage of a replica in any order of the ranks: what is random goes by it."""
        return self.stage * self.replicas + self.replica

    @property
    def node(self) -> int:
        """The node of this process."""
        return self.nodes[self.rank]

    @property
    def over_nodes(self) -> bool:
        """Whether there are processes on another node."""
        return len(set(self.nodes)) > 1

    @property
    def here(self) -> int:
        """Processes on this node."""
        return self.nodes.count(self.node)


def check_version() -> None:
    """Before 0.19.3 DeepSpeed scaled accumulated gradients in three other ways."""
    version = tuple(int(part) for part in deepspeed.__version__.split("+")[0].split(".")[:3])
    if version < MINIMUM_DEEPSPEED:
        raise UserError(f"DeepSpeed {deepspeed.__version__} scales accumulated gradients differently; install ≥ 0.19.3")


@log_if_slow("starting: waiting for the other processes")
def initialise(stages: int, rendezvous: Path | dist.Store, column_major: bool | None) -> Place:
    """Start the process group over `rendezvous`, a file on one node or the launcher's store over several, and find our place.

    `column_major`: neighbouring stages on neighbouring ranks, which are one node's as far as it goes, so that replicas are
    what lies across nodes; otherwise the replicas of a stage are neighbours. None: on several nodes.
    """
    world = processes.world()
    launch.check_processes(stages)
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("LOCAL_SIZE", str(processes.here()))
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    accelerator = get_accelerator()
    local = int(os.environ["LOCAL_RANK"])
    if accelerator.device_name() != "cpu":
        accelerator.set_device(local)
    backend = accelerator.communication_backend_name() if accelerator.device_name() != "cpu" else "gloo"
    with _quiet(), without_shared_memory_extension():
        if not isinstance(rendezvous, Path):
            meeting.join(rendezvous, backend, world)  # which DeepSpeed then takes as it is
        deepspeed.init_distributed(
            backend,
            init_method=f"file://{rendezvous}" if isinstance(rendezvous, Path) else None,
            rank=rank(),
            world_size=world,
            auto_mpi_discovery=False,
            timeout=meeting.TIMEOUT,
            verbose=False,
        )
    nodes = [0] * world
    if not isinstance(rendezvous, Path):
        dist.all_gather_object(nodes, processes.node())
    replicas = world // stages
    if column_major if column_major is not None else len(set(nodes)) > 1:
        topology = ProcessTopology(axes=["data", "pipe"], dims=[replicas, stages])
    else:
        topology = PipeDataParallelTopology(num_pp=stages, num_dp=replicas)
    coordinate = topology.get_coord(rank())
    return Place(
        rank(),
        world,
        coordinate.pipe,
        stages,
        coordinate.data,
        replicas,
        topology,
        torch.device(accelerator.device_name(local)),
        tuple(nodes),
    )


def build(
    module: nn.Module,
    place: Place,
    objective: Objective,
    optimizer: PipelineOptimizer,
    gradient_accumulation_steps: int,
    dynamic_shape: bool,
    first_trained: int,
) -> PipelineEngine:
    """DeepSpeed's engine with `module` as this process's one pipeline layer, and `optimizer` connected to its groups.

    `first_trained`: the first stage that owns a trained parameter, from `first_trained_stage`. Gradients go no further.
    """
    _broadcast_only_trained(module)
    others = [nn.Identity() for _ in range(place.stages)]
    layers = [*others[: place.stage], module, *others[place.stage + 1 :]]
    with _quiet():
        pipeline = deepspeed.pipe.PipelineModule(
            layers,
            topology=place.topology,
            loss_fn=wires.training_loss(objective),
            partition_method="uniform",
            activation_checkpoint_interval=0,
            dynamic_shape=dynamic_shape,
        )
        engine, *_ = deepspeed.initialize(
            model=pipeline,
            optimizer=optimizer,
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": 1,  # counted by DeepSpeed's own timers only
                "gradient_accumulation_steps": gradient_accumulation_steps,
                "gradient_clipping": 0.0,
                "steps_per_print": None,
            },
        )
    engine.pipeline_enable_backward_allreduce = False
    optimizer.connect(engine.grid.get_pipe_parallel_group(), engine.grid.get_data_parallel_group())
    schedule_cuts.apply(engine, first_trained)
    return engine


def first_trained_stage(trains: bool, place: Place) -> int:
    """The first stage that trains anything, the same number on every process; the last if none does."""
    everyone: list[int] = [0] * place.world
    dist.all_gather_object(everyone, place.stage if trains else place.stages - 1)
    return min(everyone)


def announce(engine: PipelineEngine, doing: Callable[[str, bool], None]) -> None:
    """Call `doing(what, waits)` before each instruction of the schedule, and when it is done: a collective may follow."""

    def announced(words: tuple[str, bool], instruction: Callable[..., None]) -> Callable[..., None]:
        def execute(engine: PipelineEngine, **arguments: Any) -> None:
            doing(*words)
            instruction(engine, **arguments)
            doing("between two instructions", True)

        return execute

    table = engine._INSTRUCTION_MAP.items()
    engine._INSTRUCTION_MAP = {kind: announced(IN_WORDS[kind], instruction) for kind, instruction in table}


def held_tensors(engine: PipelineEngine, optimizer: PipelineOptimizer) -> list[torch.Tensor]:
    """What is there between two steps: weights, gradient sums, optimizer state, and DeepSpeed's buffers for messages."""
    messages = tree_leaves((engine.pipe_recv_buf, engine.grad_layer))
    return [
        *engine.module.parameters(),
        *optimizer.held_tensors(),
        *(t for t in messages if isinstance(t, torch.Tensor)),
    ]


@contextlib.contextmanager
def agreement(place: Place) -> Iterator[None]:
    """If any rank raises UserError inside the block, every rank raises it on exit."""
    problem: UserError | None = None
    try:
        yield
    except UserError as error:
        problem = error
    problems: list[Any] = [None] * place.world
    dist.all_gather_object(problems, problem and (str(problem), problem.exit_code))
    if found := list(dict.fromkeys(p for p in problems if p)):
        raise UserError("; ".join(message for message, _ in found), found[0][1])


def is_failed_collective(error: BaseException) -> bool:
    """Whether the processes lost each other: gloo says in words only that another one has gone."""
    return (
        isinstance(error, dist.DistError) or "Connection closed by peer" in str(error) or "reset by peer" in str(error)
    )


def shutdown() -> None:
    """Leave the process group, all together: not after an error, when a peer may be waiting in a collective for ever."""
    dist.barrier()
    dist.destroy_process_group()


def let_go(engine: PipelineEngine) -> None:
    """Clear what DeepSpeed's engine keeps of its last step: the graph of it has hooks that hold the engine, where Python's
    garbage collector does not see it, and with the engine all weights of the stage."""
    engine.loss, engine.total_loss, engine.pipe_buffers = None, None, {}


@contextlib.contextmanager
def without_shared_memory_extension() -> Iterator[None]:
    """DeepSpeed's CPU extension `deepspeed_shm_comm` is not compiled, loaded and given memory by what starts in here.

    It serves all-reduces of tensor-parallel inference, which nothing here does; it asks for a compiler and ninja, waits
    for ever on the lock of a build that was killed, and leaves 66 MiB a process in /dev/shm (0.19.8, `build_shm_op`).
    `tests/training/start/test_start.py` fails when DeepSpeed starts it elsewhere, or not at all.
    """
    backend: Any = importlib.import_module("deepspeed.comm.torch")  # as an attribute, `deepspeed.comm.torch` is torch
    build = backend.build_shm_op
    backend.build_shm_op = lambda: None
    try:
        yield
    finally:
        backend.build_shm_op = build


def _broadcast_only_trained(module: nn.Module) -> None:
    """DeepSpeed broadcasts every parameter over the replicas when it starts, the frozen base too (70 GB for 35B).

    It skips parameters with this attribute (0.19.8, `_broadcast_model`); replicas read the same files anyway.
    `tests/training/engine/test_engine.py` fails when the attribute is no longer looked at.
    """
    for parameter in module.parameters():
        if not parameter.requires_grad:
            parameter.ds_optim_param = True  # type: ignore[attr-defined]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed prints what it builds and its layout with print(); ours says the same in one table."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
