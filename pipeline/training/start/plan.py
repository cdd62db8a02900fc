"""The plan of a run: the layers of each stage, what each layer keeps, and the memory and time that should follow.

Takes the config and the model's structure; gives a `Plan`, which `--plan` shows, a run follows, and the end of a run is
compared with. Costs are counted on fake tensors by the code that trains, on `meta`: no weights, no GPU.
"""

import json
import math
from collections.abc import Callable, Iterable
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
import torch.distributed as dist
from torch import nn

from pipeline.config.schema import Config
from pipeline.config.tables import Optimizer
from pipeline.console import EXIT_DONE, UserError, gib, log, log_if_slow, warn
from pipeline.data.batches import Position
from pipeline.files import write_text
from pipeline.model import router_loss
from pipeline.model.adapters.base import trainable
from pipeline.model.memory.host_arena import HostArena
from pipeline.model.memory.levels import ActivationPolicy, RecomputeLevel
from pipeline.model.stage import Stage
from pipeline.model.structure.build import logit_transform
from pipeline.model.structure.parts import layers_of_model, text_config
from pipeline.planning import devices, rates, table
from pipeline.planning.counts.beside import with_reference
from pipeline.planning.counts.model_cost import model_cost
from pipeline.planning.nearest import nearest
from pipeline.planning.quantities import Link, ModelCost, Plan, Rates, Shape, Update
from pipeline.planning.solve import solve
from pipeline.planning.timeline import in_flight
from pipeline.training.data.batches import micro_batches
from pipeline.training.data.read import read_data
from pipeline.training.engine import links
from pipeline.training.engine.engine import Place
from pipeline.training.optim import parameter_groups
from pipeline.training.optim.inner import bytes_per_parameter, update_bytes_per_parameter
from pipeline.training.stage import parts
from pipeline.training.start import prepare
from pipeline.training.start.objective import ObjectiveSpec
from pipeline.training.start.resolve import resolve
from pipeline.training.start.resolved import Layout, Resolved

GIB = 1 << 30
HOST_SHARE = 0.8  # of what is free, what a plan may take: the system and the data need some
ASSUMED_HOST_BYTES = 128 * GIB  # of a machine of which only the GPUs are named


def shape_of(layout: Layout, stages: int) -> Shape:
    """A step's micro-batches and the tokens of one, padding included."""
    return Shape(layout.rows * layout.tokens, layout.accumulation, stages)


def keeping_of(layout: Layout) -> ActivationPolicy | None:
    """What every layer keeps, where activation_checkpointing says so; None for 'auto'."""
    mode = layout.checkpointing
    if mode == "auto":
        return None
    return ActivationPolicy(RecomputeLevel.INPUT if mode else RecomputeLevel.EVERYTHING, on_host=mode == "unsloth")


def host_bytes(layout: Layout) -> int:
    """Of host memory for kept tensors, all processes of a node together. 'unsloth' without a limit takes what it needs."""
    unlimited = layout.checkpointing == "unsloth" and not layout.host_gib
    return 1 << 62 if unlimited else int(layout.host_gib * GIB)


def costs(plan: Resolved, levels: Iterable[RecomputeLevel], on_gpu: bool) -> Callable[[int], ModelCost]:
    """The model's cost for micro-batches of so many tokens: the whole model on `meta` with what is trained and kernels."""
    stage = parts.whole_on_meta(plan.meta_model, plan.trained)
    parts.put_kernels(stage, parts.chosen_kernels(plan.layout.kernels, on_gpu))
    rows, optimizer = plan.layout.rows, plan.updates.optimizer
    own_types = optimizer_types(optimizer, stage)
    behind = router_loss.bytes_behind(stage.model, rows) if plan.router_loss else 0

    def training(parameter: nn.Parameter) -> tuple[int, Update]:
        kind, n, size = own_types.get(parameter, optimizer.type), parameter.numel(), parameter.element_size()
        every, one = update_bytes_per_parameter(kind, size, on_gpu)
        return n * bytes_per_parameter(kind, size), Update(n * every, n * one)

    @cache
    def count(tokens: int) -> ModelCost:
        counted = model_cost(
            stage,
            rows=rows,
            tokens=tokens // rows,
            levels=levels,
            training=training,
            transform=logit_transform(stage.model.config),
            on_gpu=on_gpu,
        )
        return with_objective(counted._replace(behind_bytes=behind), plan.objective)

    return count


def with_objective(counted: ModelCost, objective: ObjectiveSpec | None) -> ModelCost:
    """The cost with that of a reference which runs in every step, and of taps, if the run has any."""
    if objective is None or not (slots := objective.reference_slots):
        return counted
    tapped = {layer for tap in objective.taps for layer in tap.layers}
    return with_reference(
        counted,
        len(slots) / objective.slots,
        through=len(counted.layers) if objective.live else max(tapped) + 1,
        tapped=tapped,
        scores=objective.live,
        head=objective.mixture is not None,
    )


def optimizer_types(optimizer: Optimizer, stage: Stage) -> dict[nn.Parameter, str]:
    """The optimizer's type of those trained parameters for which [[optimizer.groups]] names one."""
    specials = parameter_groups.specials(optimizer)
    found = {p: parameter_groups.values_of(name, specials) for name, p in trainable(stage).items()}
    return {p: values["type"] for p, values in found.items() if "type" in values}


def show(config: Config, described: str | None) -> int:
    """`--plan`: for the devices `described` ('2x48GiB'), or for those of this machine. UserError for nonsense."""
    plan = resolve(config)
    log(full_report(plan, described, _total_steps(plan)))
    return EXIT_DONE


@log_if_slow("planning: counting on fake tensors")
def full_report(plan: Resolved, described: str | None, total_steps: int | None) -> str:
    """The plan's table and figures and, where it does not fit, the nearest configuration that does."""
    there = _described(described, plan.layout.stages, plan.layout.link_gbit_per_s) if described else _devices_here(plan)
    cost_of = costs(plan, RecomputeLevel, there.on_gpu)
    shape, keeping, budget = shape_of(plan.layout, len(there.usable)), keeping_of(plan.layout), host_bytes(plan.layout)
    given = (plan.layout.layers or keeping) and shape.stages == plan.layout.stages
    model, ranges = cost_of(shape.tokens), plan.ranges if given else None
    found = solve(
        model,
        there.usable,
        there.rates,
        shape,
        budget * there.nodes,
        there.share(budget),
        links=there.links,
        ranges=ranges,
        keeping=keeping,
    )
    fitting = (
        None
        if found.fits
        else nearest(
            cost_of,
            min(there.usable),
            there.rates,
            shape,
            0 if keeping else budget,
            max_host_bytes=there.host_bytes,
            chosen_already=not given and keeping is None,
        )
    )
    return table.describe(
        found,
        model,
        shape,
        there.rates,
        device_names=there.names,
        total_steps=total_steps,
        nearest=fitting and fitting.sentence,
        links=there.links,
    )


def _total_steps(plan: Resolved) -> int | None:
    """Optimizer steps of the whole run; None, and a line saying why, where the data cannot be read."""
    try:
        data = read_data(plan.data, prepare.tokenizer_for(plan, plan.base.folder), plan)
        batches = micro_batches(plan.data, data)
    except UserError as error:
        log(f"data:     the run's length is not known: {error}")
        return plan.data.max_steps
    if plan.data.epochs is None:
        return plan.data.max_steps
    return batches.steps_to_come(Position(), plan.data.epochs, plan.data.max_steps)


class RunPlan(NamedTuple):
    """What a run does: each stage's layers, what each of them keeps, and the bytes kept on the host.

    `enough_host_gib`: the host_memory_gib with which all that was asked for would be there; None where a plan decides.
    `plan`: all that was or can be foreseen, on the first process; to count it takes seconds.
    """

    ranges: list[tuple[int, int]]
    keeping: list[list[ActivationPolicy]]
    host_bytes: list[int]
    enough_host_gib: float | None
    plan: Callable[[], Plan]


@log_if_slow("starting: planning what each layer keeps")
def for_run(plan: Resolved, place: Place) -> RunPlan:
    """What this run does, the same on every process. UserError if 'auto' finds nothing that fits."""
    usable: list[Any] = [None] * place.world
    dist.all_gather_object(usable, (place.stage, _usable_here(place)))
    memory = [min(m for stage, m in usable if stage == n) for n in range(place.stages)]
    solved = partial(_solved, plan, _products(plan), place, memory, _network(plan.layout, place))
    keeping = keeping_of(plan.layout)
    if keeping is None:
        found = _on_all(solved)
        stages = found.stages
        return RunPlan(
            [(s.first, s.end) for s in stages],
            [s.keeping for s in stages],
            [s.host_bytes for s in stages],
            None,
            lambda: found,
        )
    shape = shape_of(plan.layout, place.stages)
    input_bytes = (
        shape.tokens * text_config(plan.meta_model.shared.config).hidden_size * plan.meta_model.shared.dtype.itemsize
    )
    on_host = [
        (end - first) * input_bytes * in_flight(stage, shape) if keeping.on_host else 0
        for stage, (first, end) in enumerate(plan.ranges)
    ]
    share = host_bytes(plan.layout) // _most_here(place)
    return RunPlan(
        plan.ranges,
        [[keeping] * (end - first) for first, end in plan.ranges],
        [min(n, share) for n in on_host],
        max(on_host) * _most_here(place) / GIB,
        solved,
    )


def _network(layout: Layout, place: Place) -> tuple[float, str]:
    """Bytes per second between two nodes of this run, and where the figure comes from; measured by all processes if not given."""
    if (given := layout.link_gbit_per_s) is not None:
        return given * 1e9 / 8, f"{given:g} Gbit/s as link_gbit_per_s says"
    measured = links.slowest_bytes_per_s(place) or devices.NETWORK_GBIT_PER_S * 1e9 / 8
    return measured, f"{measured * 8 / 1e9:.3g} Gbit/s measured at this start"


def _most_here(place: Place) -> int:
    """Processes on the node that has most: of host memory, which is a node's, each may take that part."""
    return max(place.nodes.count(node) for node in place.nodes)


def _on_all(solved: Callable[[], Plan]) -> Plan:
    """What the first process solves, or its UserError, on every process."""
    decided: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            decided[0] = solved()
        except UserError as error:
            decided[0] = error
    dist.broadcast_object_list(decided, src=0)
    if isinstance(decided[0], UserError):
        raise decided[0]
    return decided[0]


def _solved(
    plan: Resolved,
    products: list[tuple[int, int]],
    place: Place,
    memory: list[int],
    network: tuple[float, str],
) -> Plan:
    layout = plan.layout
    shape, keeping = shape_of(layout, place.stages), keeping_of(layout)
    rate = _measured(plan, products, place.device)
    levels = [*RecomputeLevel] if keeping is None else [keeping.level]
    model = costs(plan, levels, place.device.type == "cuda")(shape.tokens)
    given = plan.ranges if layout.layers or keeping is not None else None
    between = devices.links_between(links.crossings(place), rate, *network)
    host, each = host_bytes(layout) // place.replicas, None
    if place.over_nodes:  # no stage can take what another node's leaves
        each = host_bytes(layout) // _most_here(place)
        host = each * place.stages
    found = solve(model, memory, rate, shape, host, each, links=between, ranges=given, keeping=keeping)
    if keeping is None:
        names = [gib(m) for m in memory]
        shown = partial(table.describe, found, model, shape, rate, device_names=names, total_steps=None)
        log(shown(replicas=place.replicas, links=between))
        if not found.fits:
            raise UserError(
                "activation_checkpointing = 'auto': nothing fits this machine's memory (the table above comes nearest); "
                "--plan says which configuration does"
            )
    return found


def arena(run_plan: RunPlan, stage: int, device: torch.device) -> HostArena | None:
    """Host memory for what a stage keeps there; None if that is nothing."""
    if not (n_bytes := run_plan.host_bytes[stage]):
        return None
    # Each slot is rounded up; ragged micro-batches may leave gaps.
    return HostArena(n_bytes + n_bytes // 16 + (1 << 20), device)


def say_overflow(run_plan: RunPlan, place: Place, arena: HostArena | None) -> list[int]:
    """Warn of what should have been kept on the host and found no room there; bytes of each stage's so far."""
    everyone: list[Any] = [None] * place.world
    dist.all_gather_object(everyone, (place.stage, arena.overflowed_bytes, arena.short_bytes) if arena else (0, 0, 0))
    bytes_of = [max((all_of for stage, all_of, _ in everyone if stage == n), default=0) for n in range(place.stages)]
    if any(bytes_of):
        short = max(short for _, _, short in everyone)
        mend = (
            f"set host_memory_gib = {_rounded_up(run_plan.enough_host_gib)}"
            if run_plan.enough_host_gib
            else ("the plan did not foresee it; lower host_memory_gib, should the device's memory run short")
        )
        warn(
            f"host memory: {gib(sum(bytes_of))} of what layers keep found no room there so far and stayed on the device, "
            f"{gib(short)} at once on a stage: {mend}"
        )
    return bytes_of


def _rounded_up(value: float) -> str:
    """To three digits."""
    step = 10.0 ** (math.floor(math.log10(value)) - 2)
    return f"{math.ceil(value / step) * step:.3g}"


@log_if_slow("done:     counting what was planned")
def say_outcome(
    run_plan: RunPlan, place: Place, run_dir: Path, arena: HostArena | None, step_s: float, peak_bytes: int
) -> None:
    """At the end of a run: planned against measured, each stage's memory and the time of a step; also as plan.json."""
    overflowed = say_overflow(run_plan, place, arena)
    everyone: list[Any] = [None] * place.world
    dist.all_gather_object(everyone, (place.stage, peak_bytes))
    if place.rank != 0:
        return
    measured = [max(m for stage, m in everyone if stage == n) for n in range(place.stages)]
    try:
        plan = run_plan.plan()
    except Exception as error:  # a planning failure must not fail a run that is finished and saved
        log(f"no plan to compare with: {error}")
        return
    stages = [
        {**s._asdict(), "planned_bytes": s.total_bytes, "measured_bytes": m, "host_overflowed_bytes": over}
        for s, m, over in zip(plan.stages, measured, overflowed, strict=True)
    ]
    facts = {**plan._asdict(), "stages": stages, "measured_step_s": step_s}
    write_text(run_dir / "plan.json", json.dumps(facts, indent=1) + "\n")
    log(table.compare(plan, measured, step_s))


def _products(plan: Resolved) -> list[tuple[int, int]]:
    """(in, out) of the products of one layer."""
    layer: Any = layers_of_model(plan.meta_model.shared)[0]
    return sorted({(p.shape[1], p.shape[0]) for p in layer.parameters() if p.dim() == 2})


def _measured(plan: Resolved, products: list[tuple[int, int]], device: torch.device) -> Rates:
    """The rates of `device` at `products`."""
    return rates.measure(device, products, plan.layout.rows * plan.layout.tokens, plan.base.dtype)


class _There(NamedTuple):
    """The devices to plan for: usable bytes and name of each stage's, rates, host memory of a node, and whether they are GPUs.

    `links`: between each and the next. `of_node`: the node of each.
    """

    usable: list[int]
    names: list[str]
    rates: Rates
    host_bytes: int
    on_gpu: bool
    links: list[Link]
    of_node: list[int]

    @property
    def nodes(self) -> int:
        """How many there are."""
        return len(set(self.of_node))

    def share(self, host_bytes: int) -> int | None:
        """What one stage may take of a node's host memory; None where all are on one, which they share as it comes."""
        return host_bytes // max(map(self.of_node.count, self.of_node)) if self.nodes > 1 else None


def _described(text: str, stages: int, link_gbit_per_s: float | None = None) -> _There:
    named = devices.parse(text)
    if len(named) != stages:
        replicas = len(named) // stages
        more = f"; {replicas} replicas are planned as one, over {stages}" if len(named) == replicas * stages else ""
        raise UserError(
            f"--devices '{text}' names {len(named)} GPU(s), but pipeline_stages = {stages}: give one for each stage{more}, "
            f"or --set pipeline_stages={len(named)}"
        )
    usable, names = [d.usable_bytes for d in named], [d.name for d in named]
    nodes, rate = [d.node for d in named], devices.published_rates(named)
    gbit = link_gbit_per_s or devices.NETWORK_GBIT_PER_S
    source = f"{gbit:g} Gbit/s, " + ("as link_gbit_per_s says" if link_gbit_per_s else "assumed: set link_gbit_per_s")
    between = devices.links_between([a != b for a, b in pairwise(nodes)], rate, gbit * 1e9 / 8, source)
    return _There(usable, names, rate, ASSUMED_HOST_BYTES, True, between, nodes)


def _devices_here(plan: Resolved) -> _There:
    n, host = plan.layout.stages, int(psutil.virtual_memory().available * HOST_SHARE)
    if not torch.cuda.is_available():
        rate = _measured(plan, _products(plan), torch.device("cpu"))
        return _There([host // n] * n, ["main memory"] * n, rate, 0, False, _within(rate, n), [0] * n)
    if (found := torch.cuda.device_count()) < n:
        raise UserError(
            f"pipeline_stages = {n}, but there are {found} GPUs here; plan for others with --devices 2x48GiB"
        )
    gpus = [torch.cuda.get_device_properties(i) for i in range(n)]
    usable = [devices.usable(gpu.total_memory) for gpu in gpus]
    rate = _measured(plan, _products(plan), torch.device("cuda", 0))
    return _There(usable, [gpu.name for gpu in gpus], rate, host, True, _within(rate, n), [0] * n)


def _within(rate: Rates, stages: int) -> list[Link]:
    return devices.links_between([False] * (stages - 1), rate, 0.0, "")


def _usable_here(place: Place) -> int:
    """Bytes of this process's device that a plan may fill."""
    if place.device.type == "cuda":
        return devices.usable(torch.cuda.mem_get_info(place.device)[0])
    return int(psutil.virtual_memory().available * HOST_SHARE) // place.here
