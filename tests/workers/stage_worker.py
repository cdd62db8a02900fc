"""A process of a pipeline that trains given cases with the product's own trainer and records what it computed.

Takes CASES.json and a folder; `deepspeed --num_gpus N tests/workers/stage_worker.py CASES.json FOLDER` runs every case in turn,
each with a new engine over the same processes. Gives, per case and rank, FOLDER/<case>/<rank>.safetensors with

    initial/<name>, weights/<name>       trained parameters before the first and after the last step
    gradient/<step>/<name>               of the step, over all replicas, before clipping

and FOLDER/<case>/<rank>.json. A case is {name, config, overrides, steps, evaluate_at}; `evaluate_at` counts steps done.
A case with `rows` has these for training and evaluation (tests/helpers/row_store.py) in place of the config's datasets.
A case with `sabotage` is one run of the self-test over a DeepSpeed with that fault.
"""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.module import PipelineModule
from safetensors.torch import save_file
from torch import Tensor

from pipeline.config import loading
from pipeline.console import UserError
from pipeline.data import tokenizer
from pipeline.data.selection import Selection
from pipeline.model.memory.host_arena import Ticket
from pipeline.model.stage import Stage
from pipeline.processes import launched_by
from pipeline.training.data import specs
from pipeline.training.data.read import Data, read_data
from pipeline.training.engine import engine, evaluate, schedule, selftest
from pipeline.training.metrics import Clock
from pipeline.training.optim.pipeline_optimizer import NonFiniteError, PipelineOptimizer
from pipeline.training.run import assemble
from pipeline.training.run.stop import Watcher
from pipeline.training.start import resolve
from tests.helpers.row_store import ListStore


def main() -> None:
    """Run all cases and leave."""
    given, out = (Path(argument) for argument in sys.argv[-2:])  # the launcher puts --local_rank before them
    cases = json.loads(given.read_text())
    watcher = Watcher(set())
    rendezvous = out.resolve() / f".rendezvous-{launched_by()}"
    for case in cases:
        config = loading.load(case["config"], None, case["overrides"])
        place = engine.initialise(config.pipeline_stages, rendezvous, config.use_column_major_topology)
        folder = out / case["name"]
        folder.mkdir(parents=True, exist_ok=True)
        facts: dict[str, Any] = {"stage": place.stage, "replica": place.replica}
        tensors: dict[str, Tensor] = {}
        if "sabotage" in case:
            facts["error"] = sabotaged(case["sabotage"], place, config.gradient_accumulation_steps)
        else:
            selftest.run(place, config.gradient_accumulation_steps)
            train(case, config, place, watcher, facts, tensors)
        save_file(tensors, folder / f"{place.rank}.safetensors")
        (folder / f"{place.rank}.json").write_text(json.dumps(facts))
    engine.shutdown()


def train(
    case: dict[str, Any],
    config: Any,
    place: engine.Place,
    watcher: Watcher,
    facts: dict[str, Any],
    tensors: dict[str, Tensor],
) -> None:
    """As `train.py` puts a run together, then the trainer's own step and evaluation; fills `facts` and `tensors`."""
    plan = resolve.resolve(config)
    data = read_data(specs.data_of(config), tokenizer.load(config.model))
    if "rows" in case:
        train_on, held_out = (ListStore(rows) for rows in case["rows"])
        data = Data(
            [Selection(train_on, np.arange(len(train_on)))],
            {"held_out": Selection(held_out, np.arange(len(held_out)))},
        )
    run = assemble.trainer(config, plan, data, place, watcher, None, ["train.py", "--config", case["config"]])
    optimizer = run.optimizer
    facts |= {"run_dir": str(run.saver.run_dir), "norms": [], "coefficients": [], "evaluations": {}}

    def keep(prefix: str, given: dict[str, Tensor]) -> None:
        tensors.update({f"{prefix}/{name}": tensor.detach().clone() for name, tensor in given.items()})

    keep("initial", dict(optimizer.parameters_by_name))
    optimizer.on_gradients = lambda sums: keep(f"gradient/{run.step + 1}", sums)
    clock = Clock(case["steps"])
    with counted(run.engine.module, facts):
        for done in range(case["steps"] + 1):
            if done in case["evaluate_at"]:
                facts["evaluations"][done] = {
                    name: evaluate.evaluate(run.engine, run.objective, batches, name)["loss"]
                    for name, batches in run.evaluations.items()
                }
            if done == case["steps"]:
                break
            try:
                run._train_step(clock, case["steps"])
            except NonFiniteError as error:
                facts["error"] = str(error)
                break
            facts["norms"].append(optimizer.grad_norm)
            facts["coefficients"].append(optimizer.clip_coefficient)
    run.metrics.close()
    keep("weights", dict(optimizer.parameters_by_name))


@contextlib.contextmanager
def counted(module: torch.nn.Module, facts: dict[str, Any]) -> Iterator[None]:
    """Count what activation checkpointing changes: attention's forward passes in training, and tensors kept on the host; and how
    often a layer's output has been given its gradient."""
    facts |= {"passes": 0, "kept": 0, "layers": 0, "backwards": 0}
    stage = next(m for m in module.modules() if isinstance(m, Stage))
    facts["layers"] = len(stage.layers)

    def passed(attention: torch.nn.Module, *_: Any) -> None:
        facts["passes"] += attention.training

    def came_back(gradient: Tensor) -> None:
        facts["backwards"] += 1

    def put_out(layer: torch.nn.Module, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(came_back)

    keep = Ticket.put

    def kept(self: Ticket, tensor: Tensor) -> int:
        facts["kept"] += 1
        return keep(self, tensor)

    for layer in stage.layers.values():
        layer.self_attn.register_forward_hook(passed)  # type: ignore[union-attr]
        layer.register_forward_hook(put_out)
    with mock.patch.object(Ticket, "put", kept):
        yield


def sabotaged(fault: str, place: engine.Place, gradient_accumulation_steps: int) -> str | None:
    """The self-test's refusal of a DeepSpeed (or a norm) with `fault`; None if it lets it pass."""
    forward, backward, connect = PipelineModule.forward, DeepSpeedEngine.backward, PipelineOptimizer.connect
    patches = {
        "none": mock.patch.object(PipelineModule, "forward", forward),
        "gradients are halved": mock.patch.object(
            DeepSpeedEngine, "backward", lambda self, loss, **given: backward(self, loss / 2, **given)
        ),
        "gradients are summed over accumulation steps": mock.patch.object(
            DeepSpeedEngine, "backward", lambda self, loss, **given: backward(self, loss, scale_wrt_gas=False)
        ),
        "forward runs twice": mock.patch.object(
            PipelineModule, "forward", lambda self, x: (forward(self, x), forward(self, x))[1]
        ),
        "each stage has a norm of its own": mock.patch.object(
            PipelineOptimizer, "connect", lambda self, pipe, replicas: connect(self, None, replicas)
        ),
        "a gradient is asked for below all that trains": mock.patch.object(
            schedule, "_receive_without_gradient", PipelineEngine._exec_recv_activations
        ),
    }
    with patches[fault]:
        try:
            selftest.run(place, gradient_accumulation_steps)
        except UserError as error:
            return str(error)
    return None


if __name__ == "__main__":
    main()
