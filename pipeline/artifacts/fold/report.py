"""The plan of a fold and its result, as text and as JSON.

Takes the `FoldPlan` and the `Survival` figures; gives lines for the terminal and the content of
`fold_report.json`. No path is in the JSON: it lies in a folder that gets shared.
"""

import math
from collections.abc import Sequence
from typing import Any

from pipeline import version
from pipeline.artifacts.adapter.adapter import Pair
from pipeline.artifacts.adapter.maps import Added
from pipeline.artifacts.fold.config import LOGIT_KEYS, logit_factor
from pipeline.artifacts.fold.match import Part
from pipeline.artifacts.fold.plan import FoldPlan
from pipeline.artifacts.fold.rows import Survival
from pipeline.artifacts.fold_history import adapter_digest, earlier_folds
from pipeline.console import gib
from pipeline.families import FAMILIES, MULTIPLICATIVE
from pipeline.formats.base_model import WITH_STOPS
from pipeline.formats.fingerprint import fingerprint
from pipeline.names import public_name

# Below this gain the fold is weaker than the training by more than 5% of the adapter's strength: as if alpha had been
# lowered by as much, which is the size of step people choose on purpose (--scale 0.9). The noise of rounding is larger
# in size, but it has no direction and averages out over the thousands of terms of a product; the lost gain does not.
LEAST_GAIN = 0.95
SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
ROWS_SHOWN = 48  # the whole of a 40-layer model with one target; of more, those that lost most


def plan_lines(plan: FoldPlan, *, keep_logit_scale: bool) -> list[str]:
    """What will be done, with the formula and its numbers."""
    total = sum(len(specs) for specs in plan.files.values())
    lines = [f"base     {plan.base.folder}: {total} tensors in {len(plan.files)} file{'s' * (len(plan.files) != 1)}"]
    for number, part in enumerate(plan.parts):
        adapter = part.adapter
        lines.append(
            f"{'adapter' + _index(plan, number):<8} {adapter.folder}: {part.kind}, {len(part.modules)} modules"
            + _span([one.A.shape[-2] for one in _strong(part)])
            + (f", trained on {adapter.base_model}" if adapter.base_model else "")
            + (f", {_strength(part)}" if len(plan.parts) > 1 and _strength(part) else "")
        )
        if part.full:
            lines.append(f"         in full: {len(part.full)} tensors, {_named(tuple(part.full))}")
        if part.left_out:
            lines.append(f"         left out by --layers: {len(part.left_out)} modules, {_named(part.left_out)}")
    replaced = {name for part in plan.parts for name in part.full}
    of_experts = {name for part in plan.parts for stack in part.adapter.stacks.values() for name in stack.biases}
    biases = sum(name.endswith(".bias") or name in of_experts for name in plan.changes.keys() - replaced)
    strength = f", {_strength(plan.parts[0])}" if _strength(plan.parts[0]) else ""
    lines += [
        f"{'unmerge' if plan.unmerge else 'fold':<9}{formula(plan)}"
        + (strength if len(plan.parts) == 1 else ", rounded once at the end"),
        f"changed  {len(plan.changes) - biases - len(replaced)} weights"
        + (f" and {biases} biases ({_bias_rules(plan)})" if biases else "")
        + (f"; {len(replaced)} tensors take the base's place" if replaced else "")
        + f"; {total - len(plan.changes.keys() | plan.quantised)} other tensors {_others(plan)}",
        f"dtypes   {_dtypes(plan)}; {gib(plan.weight_bytes)} of weights",
    ]
    if plan.untied:
        lines.append(
            "head     head and embedding were one tensor and come out as two: tie_word_embeddings = false in the result"
        )
    if plan.stops:
        ids = ", ".join(map(str, plan.stops))
        lines.append(f"stops    eos_token_id in {WITH_STOPS[0]} gets {ids} too: the training's turns end there")
    if plan.base_quant:
        lines.append(
            f"4 bits   {len(plan.quantised)} weights of the base are rounded to "
            + (f"{plan.base_dtype}, to " if plan.base_dtype else "")
            + f"{plan.base_quant} and back first"
        )
    if plan.conditions:
        (number, module), worst = max(plan.conditions.items(), key=lambda item: item[1])
        lines.append(
            f"inverse  condition number at most {worst:.3g} ({module}, adapter {number + 1}): what rounding changed in the "
            "merged weights comes back at most so many times as large; of several adapters, the product counts"
        )
    return lines + _logits(plan, keep_logit_scale)


def formula(plan: FoldPlan) -> str:
    """The composition rule with the adapters' places as indices, in the order of its effect."""
    several = len(plan.parts) > 1
    steps = []
    order = range(len(plan.parts))
    for place, number in enumerate(reversed(order) if plan.unmerge else order):
        i = str(number + 1).translate(SUBSCRIPTS) if several else ""
        W = f"W{str(place).translate(SUBSCRIPTS)}" if several and place else "W"
        family = FAMILIES[plan.parts[number].kind]
        rule = family.undoing if plan.unmerge else family.rule
        last = place == len(plan.parts) - 1
        left = "W" + chr(39) if last else "W" + str(place + 1).translate(SUBSCRIPTS)
        steps.append(f"{left} = {rule.replace('W', W).replace('#', i)}")
    inverted = plan.unmerge and any(part.kind == MULTIPLICATIVE for part in plan.parts)
    return "; ".join(steps) + " in fp32" + (", B̃ = -B·(I + s·A·B)⁻¹" if inverted else "")


def _bias_rules(plan: FoldPlan) -> str:
    """What happens to biases, of the kinds of adapter that move one."""
    families = [FAMILIES[part.kind] for part in plan.parts]
    used = [rule for row in families if (rule := row.bias_undoing if plan.unmerge else row.bias_rule)]
    if any(pair.bias is not None for part in plan.parts for pair in part.pairs.values()):
        used.append(f"b' = b {'-' if plan.unmerge else '+'} s·(the bias of lora_B)")
    return "; ".join(dict.fromkeys(used))


def _strong(part: Part) -> list[Pair | Added]:
    """The pairs of an adapter, of a DoRA one too; none of the other families."""
    maps = [one for module in part.modules for one in part.adapter.maps.get(module, ())]
    return [*part.pairs.values(), *(one for one in maps if isinstance(one, Added))]


def _index(plan: FoldPlan, number: int) -> str:
    return f" {number + 1}" if len(plan.parts) > 1 else ""


def _named(modules: Sequence[str]) -> str:
    return ", ".join(modules[:3]) + (" ..." if len(modules) > 3 else "")


def _strength(part: Part) -> str:
    """`s = alpha / rank = 64 / 64 × 0.5 = 0.5`, for the first few distinct scalings of the adapter; empty without one."""
    by_origin = {one.origin: one.scaling for one in _strong(part)}
    factor = f" × {part.scale:g} (--scale)" if part.scale != 1.0 else ""
    shown = [f"s = {origin}{factor} = {s * part.scale:g}" for origin, s in by_origin.items()]
    return "; ".join(shown[:4]) + ("; ..." if len(shown) > 4 else "")


def _span(ranks: Sequence[int]) -> str:
    if not ranks:
        return ""
    return f", rank {ranks[0]}" if min(ranks) == max(ranks) else f", ranks {min(ranks)} to {max(ranks)}"


def _others(plan: FoldPlan) -> str:
    converted = sum(spec.dtype != plan.base.tensors[spec.name].dtype for specs in plan.files.values() for spec in specs)
    return "converted or copied" if converted else "copied byte for byte"


def _dtypes(plan: FoldPlan) -> str:
    pairs = {(plan.base.tensors[spec.name].dtype, spec.dtype) for specs in plan.files.values() for spec in specs}
    return ", ".join(old if old == new else f"{old} → {new}" for old, new in sorted(pairs))


def _logits(plan: FoldPlan, keep: bool) -> list[str]:
    trained = [part.adapter.train_logit_scale for part in plan.parts]
    factor = logit_factor(plan.parts, plan.unmerge)
    if all(scale == 1.0 for scale in trained):
        return ["logits   trained without a scale: --keep-logit-scale has nothing to keep"] if keep else []
    said = f"logits   trained with the logits times {' · '.join(f'{scale:g}' for scale in trained)}"
    key, exponent = LOGIT_KEYS.get(plan.base.config.get("model_type", ""), ("", 0))
    old = plan.base.config.get(key)
    if keep:
        return [f"{said}; kept: {key} {old:g} → {(plan.config or plan.base.config)[key]:g}"]
    offer = f"; --keep-logit-scale writes {key} = {old * factor**exponent:g}" if old else ""
    return [f"{said}; dropped, the config stays as it is{offer}"]


def result_lines(plan: FoldPlan, figures: Sequence[Survival], deviation: float) -> list[str]:
    """A table of what survived rounding, each adapter's part in it, and how the check in fp64 went."""
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
    if len(plan.parts) > 1:
        for number, part in enumerate(plan.parts):
            shares = sorted(f.share(number) for f in figures if number in f.parts)
            lines.append(
                f"adapter{_index(plan, number)} {part.adapter.folder.name}: {len(shares)} tensors, alone "
                f"‖ΔW‖/‖W‖ = {shares[len(shares) // 2]:.2e} in the middle, {shares[-1]:.2e} at most"
            )
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
            f"the fold changes nothing in {len(idle)} of {len(figures)} tensors (what was trained "
            f"is there as it began: B is zero): {idle[0].name}"
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


def verdict(figures: Sequence[Survival]) -> str:
    """In one sentence, whether the adapter is in the weights now."""
    moved = [figure for figure in figures if not math.isnan(figure.gain)]
    if not moved:
        return "Verdict: the model is its base; the adapter changes nothing."
    weak = sum(figure.gain < LEAST_GAIN for figure in moved)
    least = 100 * min(figure.gain for figure in moved)
    if weak:
        kept = f"of {weak} of {len(moved)} tensors less than {100 * LEAST_GAIN:.0f}% of the change arrived"
        return f"Verdict: the adapter is in the weights in part: {kept}, of the worst {least:.0f}%."
    return f"Verdict: the adapter is in the weights: of each of {len(moved)} tensors {least:.1f}% of the change or more arrived."


def report_json(plan: FoldPlan, figures: Sequence[Survival]) -> dict[str, Any]:
    """The content of `fold_report.json`; `earlier`: of the folds that made the base, oldest first."""
    return {
        "version": version.full(),
        "base": public_name(str(plan.base.folder)),
        "base_fingerprint": fingerprint(plan.base),
        "unmerge": plan.unmerge,
        "base_quant": plan.base_quant,
        "base_dtype": plan.base_dtype,
        "adapters": [
            {
                "adapter": public_name(str(part.adapter.folder)),
                "digest": adapter_digest(part.adapter.folder),
                "kind": part.kind,
                "scale": part.scale,
                "modules": len(part.modules),
                "full": list(part.full),
                "left_out": list(part.left_out),
            }
            for part in plan.parts
        ],
        "earlier": earlier_folds(plan.base.folder),
        "tensors": [
            {
                "name": figure.name,
                "steps": [
                    {"adapter": step.part, "scaling": step.scaling, "relative_change": _number(figure.share(step.part))}
                    for step in plan.changes[figure.name].steps
                ],
                "relative_change": _number(figure.size),
                "gain": _number(figure.gain),
                "error": _number(figure.error),
                "unchanged": figure.unchanged,
            }
            for figure in figures
        ],
    }


def _number(value: float) -> float | None:
    """JSON has no NaN, and no infinity: a change whose square overflows."""
    return value if math.isfinite(value) else None
