"""The plan of a fold and its result, as text and as JSON.

Takes the adapter, the `FoldPlan` and the `Survival` figures; gives lines for the terminal and the content of
`fold_report.json`. No path is in the JSON: it lies in a folder that gets shared.
"""

import math
from collections.abc import Sequence
from typing import Any

from pipeline.artifacts.adapter_files import Adapter, public_name
from pipeline.artifacts.fold_plan import LOGIT_KEYS, FoldPlan
from pipeline.artifacts.fold_rows import Survival
from pipeline.console import gib

# Below this gain the fold is weaker than the training by more than 5% of the adapter's strength: as if alpha had been
# lowered by as much, which is the size of step people choose on purpose (--scale 0.9). The noise of rounding is larger
# in size, but it has no direction and averages out over the thousands of terms of a product; the lost gain does not.
LEAST_GAIN = 0.95
ROWS_SHOWN = 48  # the whole of a 40-layer model with one target; of more, those that lost most


def plan_lines(adapter: Adapter, plan: FoldPlan, *, scale: float, keep_logit_scale: bool) -> list[str]:
    """What will be done, with the formula and its numbers."""
    rule = "W + s·B·(A·W)" if plan.kind == "multiplicative_lora" else "W + s·B·A"
    biases = sum(len(change.tensor.shape) == 1 for change in plan.changes.values())
    total = sum(len(specs) for specs in plan.files.values())
    lines = [
        f"base     {plan.base.folder}: {total} tensors in {len(plan.files)} file{'s' * (len(plan.files) != 1)}",
        f"adapter  {adapter.folder}: {plan.kind}, {len(adapter.pairs)} modules, "
        + _span([pair.A.shape[0] for pair in adapter.pairs.values()])
        + (f", trained on {adapter.base_model}" if adapter.base_model else ""),
        f"fold     W' = {rule} in fp32, {_strength(adapter, scale)}",
        f"changed  {len(plan.changes) - biases} weights"
        + (f" and {biases} biases (b' = b + s·B·A·b)" if biases else "")
        + f"; {total - len(plan.changes)} other tensors {_others(plan)}",
        f"dtypes   {_dtypes(plan)}; {gib(plan.weight_bytes)} of weights",
    ]
    if adapter.train_logit_scale != 1.0:
        lines.append(f"logits   {_logits(adapter, plan, keep_logit_scale)}")
    elif keep_logit_scale:
        lines.append("logits   trained without a scale: --keep-logit-scale has nothing to keep")
    return lines


def _strength(adapter: Adapter, scale: float) -> str:
    """`s = alpha / rank = 64 / 64 × 0.5 = 0.5`, for the first few distinct scalings of the adapter."""
    by_origin = {pair.origin: pair.scaling for pair in adapter.pairs.values()}
    factor = f" × {scale:g} (--scale)" if scale != 1.0 else ""
    shown = [f"s = {origin}{factor} = {s * scale:g}" for origin, s in by_origin.items()]
    return "; ".join(shown[:4]) + ("; ..." if len(shown) > 4 else "")


def _span(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if min(ranks) == max(ranks) else f"ranks {min(ranks)} to {max(ranks)}"


def _others(plan: FoldPlan) -> str:
    converted = sum(spec.dtype != plan.base.tensors[spec.name].dtype for specs in plan.files.values() for spec in specs)
    return "converted or copied" if converted else "copied byte for byte"


def _dtypes(plan: FoldPlan) -> str:
    pairs = {(plan.base.tensors[spec.name].dtype, spec.dtype) for specs in plan.files.values() for spec in specs}
    return ", ".join(old if old == new else f"{old} → {new}" for old, new in sorted(pairs))


def _logits(adapter: Adapter, plan: FoldPlan, keep: bool) -> str:
    trained = f"trained with the logits times {adapter.train_logit_scale:g}"
    key, exponent = LOGIT_KEYS.get(plan.base.config.get("model_type", ""), ("", 0))
    old = plan.base.config.get(key)
    if keep:
        return f"{trained}; kept: {key} {old:g} → {(plan.config or {})[key]:g}"
    offer = f"; --keep-logit-scale writes {key} = {old * adapter.train_logit_scale**exponent:g}" if old else ""
    return f"{trained}; dropped, the config stays as it is{offer}"


def result_lines(figures: Sequence[Survival], deviation: float) -> list[str]:
    """A table of what survived rounding, and how the check in fp64 went."""
    width = max(len(figure.name) for figure in figures)
    lines = [f"{'tensor':<{width}}  ‖ΔW‖/‖W‖     gain    error  unchanged"]
    shown = figures
    if len(figures) > ROWS_SHOWN:
        shown = sorted(figures, key=lambda figure: -math.inf if math.isnan(figure.gain) else figure.gain)[:ROWS_SHOWN]
    lines += [
        f"{f.name:<{width}}  {f.size:9.2e}  {f.gain:7.4f}  {f.error:7.4f}  {100 * f.unchanged:8.1f}%" for f in shown
    ]
    if len(shown) < len(figures):
        lines.append(f"... and {len(figures) - len(shown)} more that kept more of it: see fold_report.json")
    lines.append("gain = ⟨W'−W, ΔW⟩ / ‖ΔW‖²: the strength at which the change arrived. error = ‖(W'−W) − ΔW‖ / ‖ΔW‖.")
    lines.append(
        f"checked: every tensor read back; rows recomputed in fp64 deviate by {deviation:.2f} of what rounding allows."
    )
    return lines


def warnings(figures: Sequence[Survival], dtypes: dict[str, str]) -> list[str]:
    """What the user should know before using the result; `dtypes` by tensor name, as written."""
    found = []
    idle = [figure for figure in figures if math.isnan(figure.gain)]
    if idle:
        found.append(
            f"the adapter changes nothing in {len(idle)} of {len(figures)} tensors (B is zero): {idle[0].name}"
        )
    weak = [figure for figure in figures if figure.gain < LEAST_GAIN]
    if weak:
        worst = min(weak, key=lambda figure: figure.gain)
        narrow = {dtypes[figure.name] for figure in weak}
        remedy = "--dtype float16 or --dtype float32" if narrow == {"BF16"} else "--dtype float32"
        found.append(
            f"rounding ate part of the adapter in {len(weak)} of {len(figures)} tensors: only {100 * worst.gain:.0f}% "
            f"of it arrived in {worst.name}. Fold with {remedy} to keep it, or serve the adapter unmerged."
        )
    return found


def report_json(adapter: Adapter, plan: FoldPlan, figures: Sequence[Survival], *, scale: float) -> dict[str, Any]:
    """The content of `fold_report.json`."""
    return {
        "base": public_name(str(plan.base.folder)),
        "adapter": public_name(str(adapter.folder)),
        "kind": plan.kind,
        "scale": scale,
        "tensors": [
            {
                "name": figure.name,
                "scaling": plan.changes[figure.name].scaling,
                "relative_change": _number(figure.size),
                "gain": _number(figure.gain),
                "error": _number(figure.error),
                "unchanged": figure.unchanged,
            }
            for figure in figures
        ],
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
