"""A plan as a person reads it: a table of the stages, what each layer keeps in words, and the figures of a step.

Takes a `Plan` and what it was made of; gives text for the terminal, at most WIDTH wide. `compare` puts a real run's
measured memory and time beside the plan's. Nothing is printed here.
"""

import textwrap
from collections.abc import Sequence
from itertools import groupby

from pipeline.console import duration, gib
from pipeline.model.memory.levels import ActivationPolicy, RecomputeLevel
from pipeline.planning.quantities import Link, ModelCost, Plan, Rates, Shape, StagePlan

GIB = 2**30
WIDTH = 120

# What a layer at each level does, for one line.
WORDS = {
    RecomputeLevel.INPUT: "input kept, the whole layer recomputed",
    RecomputeLevel.ADAPTER: "input and adapter kept; attention, its projections, gate and up recomputed",
    RecomputeLevel.ATTENTION: "attention's output kept too; q, k, v, gate and up recomputed",
    RecomputeLevel.PROJECTIONS: "q, k, v kept too; gate and up recomputed",
    RecomputeLevel.EVERYTHING: "everything kept, nothing recomputed",
}


def describe(
    plan: Plan,
    model: ModelCost,
    shape: Shape,
    rates: Rates,
    *,
    device_names: Sequence[str],
    total_steps: int | None,
    replicas: int = 1,
    nearest: str | None = None,
    links: Sequence[Link] = (),
) -> str:
    """The plan in full.

    device_names: one for each stage. total_steps: optimizer steps of the run, None where that is not known. replicas:
    pipelines that share a step. nearest: the sentence of what would fit, where the plan does not. links: between the stages,
    said where one of them goes over the network.
    """
    parts = [_table(plan, device_names), _what_is_kept(plan, model), _figures(plan, shape, total_steps, replicas)]
    if any(link.over_network for link in links):
        parts += [_links(plan, model, shape, links, replicas)]
    parts += [_wrapped(f"Rates: {rates.source}.")]
    if not plan.fits:
        parts += [_wrapped(misfit(plan, nearest))]
    return "\n\n".join(parts)


def misfit(plan: Plan, nearest: str | None) -> str:
    """One sentence on where it does not fit, and what does."""
    short = [(s.headroom_bytes, stage) for stage, s in enumerate(plan.stages) if s.headroom_bytes < 0]
    if short:
        headroom, stage = min(short)
        text = f"This does not fit: stage {stage} needs {gib(-headroom)} more than its device has for the run."
    else:
        text = f"This does not fit: the stages keep {gib(sum(s.host_bytes for s in plan.stages))} on the host, more than it has."
    return f"{text} {nearest or 'Nothing near it fits either: use devices with more memory.'}"


def compare(plan: Plan, peak_bytes: Sequence[int], step_s: float) -> str:
    """Planned against measured: each stage's device memory at its peak, and a step's seconds.

    peak_bytes: measured on each stage, what the plan counts (weights, trained, activations, working memory), not what the
    allocator holds besides. step_s: the mean of the run's steps but the first, without evaluation and saving.
    """
    rows = [["", "planned", "measured", "measured / planned"]]
    for stage, (planned, measured) in enumerate(zip(plan.stages, peak_bytes, strict=True)):
        rows.append(
            [f"stage {stage}, memory", gib(planned.total_bytes), gib(measured), _ratio(measured, planned.total_bytes)]
        )
    rows.append(["a step", duration(plan.step_s), duration(step_s), _ratio(step_s, plan.step_s)])
    return _aligned(rows)


def _table(plan: Plan, device_names: Sequence[str]) -> str:
    rows = [
        [
            "stage",
            "layers",
            "device",
            "weights",
            "adapters + optimizer",
            "activations",
            "working",
            "update",
            "total",
            "free",
            "on host",
        ]
    ]
    for stage, (s, name) in enumerate(zip(plan.stages, device_names, strict=True)):
        rows.append(
            [
                str(stage),
                _span(s.first, s.end - 1),
                name,
                _in_gib(s.weight_bytes),
                _in_gib(s.trained_bytes),
                f"{_in_gib(s.activation_bytes)} ({s.in_flight} ×)",
                _in_gib(s.working_bytes),
                _in_gib(s.update_bytes),
                _in_gib(s.total_bytes),
                _in_gib(s.headroom_bytes),
                _in_gib(s.host_bytes),
            ]
        )
    note = (
        "GiB at the schedule's peak. Activations: kept tensors of the micro-batches in flight (×) and hidden states passed on. "
        "Working: the largest pass of a layer, or the head's block of logits, and buffers for what comes from the host. "
        "Update: what the optimizer needs when activations are gone; the total has the larger of the two."
    )
    return f"{_aligned(rows)}\n{_wrapped(note)}"


def _what_is_kept(plan: Plan, model: ModelCost) -> str:
    lines = []
    for stage, s in enumerate(plan.stages):
        lines.append(f"stage {stage}")
        lines += [f"  {line}" for line in kept_in_words(s, model)]
    return "\n".join(lines)


def kept_in_words(stage: StagePlan, model: ModelCost) -> list[str]:
    """A line for each run of layers with the same keeping: 'layers 0–12: everything kept …'; then those on the host."""
    indices = range(stage.first, stage.end)
    of: dict[int, ActivationPolicy | None] = {
        i: keeping if model.layers[i].levels else None for i, keeping in zip(indices, stage.keeping, strict=True)
    }
    lines = []
    for level, run in groupby(indices, key=lambda i: k.level if (k := of[i]) else None):
        same = list(run)
        words = "forward only, nothing kept" if level is None else WORDS[level]
        lines.append(f"{_layers(same[0], same[-1])}: {words}")
    hosted = [i for i in indices if (k := of[i]) and k.on_host]
    if hosted:
        lines.append(f"on host: {_layers(hosted[0], hosted[-1])}, {gib(stage.host_bytes)}")
    return lines


def _figures(plan: Plan, shape: Shape, total_steps: int | None, replicas: int) -> str:
    tokens = shape.tokens * shape.micro_batches * replicas
    rows = [
        ["a step", f"{duration(plan.step_s)} for {tokens:,} tokens".replace(",", " ")],
        ["tokens per second", f"{plan.tokens_per_s * replicas:.4g}"],
        ["bubble", f"{plan.bubble:.1%} of the stages' time is waiting"],
        [
            "a micro-batch",
            "; ".join(
                f"stage {i}: {s.forward_s:.3g} s forward, {s.backward_s:.3g} s backward"
                for i, s in enumerate(plan.stages)
            ),
        ],
        [
            "GFLOP per token",
            f"{plan.flops / 1e9:.4g}, {plan.flops / plan.least_flops:.2f} × the exact minimum of "
            f"{plan.least_flops / 1e9:.4g}",
        ],
    ]
    if total_steps is not None:
        whole = f"{duration(plan.step_s * total_steps)} ({plan.step_s * total_steps / 3600:.3g} h)"
        rows.append(["the run", f"{whole} for {total_steps} steps, without evaluation and saving"])
    left = max(len(name) for name, _ in rows)
    return "\n".join(
        textwrap.fill(value, WIDTH, initial_indent=f"{name:{left}}  ", subsequent_indent=" " * (left + 2))
        for name, value in rows
    )


def _links(plan: Plan, model: ModelCost, shape: Shape, links: Sequence[Link], replicas: int) -> str:
    n_bytes = model.hidden_bytes * shape.tokens
    rows = [["link", "", "Gbit/s", "forward", "backward", "a transfer"]]
    for stage, link in enumerate(links):
        rows.append(
            [
                f"stage {stage} to {stage + 1}",
                "between nodes" if link.over_network else "within a node",
                f"{link.bytes_per_s * 8 / 1e9:.3g}",
                gib(n_bytes),
                gib(n_bytes) if model.first_trained < plan.stages[stage].end else "nothing",
                f"{n_bytes / link.bytes_per_s:.3g} s",
            ]
        )
    network = next(link.source for link in links if link.over_network)
    note = (
        "For each micro-batch: a hidden state forward, and its gradient back where a layer below is trained. "
        f"Between nodes: {network}."
    )
    if replicas > 1:
        note += f" Between the {replicas} replicas, once a step: the gradients of what is trained, in fp32."
    return f"{_aligned(rows)}\n{_wrapped(note)}"


def _layers(first: int, last: int) -> str:
    return f"layer {first}" if first == last else f"layers {first}–{last}"


def _span(first: int, last: int) -> str:
    return f"{first}–{last}" if last > first else f"{first}"


def _in_gib(n_bytes: float) -> str:
    """Always GiB, so that a column adds up by eye."""
    return f"{n_bytes / GIB:.2f}"


def _ratio(measured: float, planned: float) -> str:
    return f"{measured / planned:.2f}" if planned else "–"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH)


def _aligned(rows: list[list[str]]) -> str:
    """Columns two spaces apart, the first to the left, figures to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row: list[str]) -> str:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        return "  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip()

    return "\n".join(line(row) for row in rows)
