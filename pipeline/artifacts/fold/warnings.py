"""Warnings about a fold that is possible but suspicious.

Takes a `FoldPlan`; gives warnings: an adapter of another base than this one, one that is in it already, one that is undone but
by the model's own fold report was not what was folded, a rank above a weight's width, a change that a tensor trained in full
takes the place of, and 4 bits of weights that are not those an adapter was trained over, or perhaps not.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.artifacts.adapter.adapter import Adapter
from pipeline.artifacts.adapter.schema import TrainedOver
from pipeline.artifacts.fold.match import Part
from pipeline.artifacts.fold.plan import FoldPlan
from pipeline.artifacts.fold_history import REPORT_FILE, Folded, describe, earlier_folds, is_same, still_in
from pipeline.formats.base_model import Base
from pipeline.formats.dtypes import name_of
from pipeline.formats.fingerprint import fingerprint
from pipeline.names import public_name

NEW_EMBEDDINGS = "new_embeddings.safetensors"


def warnings_of(plan: FoldPlan) -> list[str]:
    """The warnings. `fold_report.json` in the input's folder tells what earlier folds made it from."""
    earlier = earlier_folds(plan.base.folder)
    now = fingerprint(plan.base) if any(part.adapter.base_fingerprint for part in plan.parts) else ""
    found: list[str | None] = []
    for part in plan.parts:
        found += [_other_base(plan, part.adapter, earlier, now), _too_wide(part), _left_beside(part.adapter)]
    found += [_other_fold(plan, earlier)] if plan.unmerge else _folded_before(plan, earlier)
    return [line for line in [*found, *_overwritten(plan), *_other_bits(plan), _held(plan)] if line]


def _other_base(plan: FoldPlan, adapter: Adapter, earlier: Sequence[dict[str, Any]], now: str) -> str | None:
    if plan.unmerge:  # what is undone is in the base, so its values are others
        return strange_base(plan.base, adapter, earlier)
    return other_base(plan.base, adapter, earlier, now)


def other_base(base: Base, adapter: Adapter, earlier: Sequence[dict[str, Any]], now: str) -> str | None:
    """A warning where the base is not the adapter's: by its fingerprint, or, where the adapter has none, by its name.

    `now`: the base's fingerprint. A fold's result counts as the base it was made from, which its report, `earlier`, says.
    """
    trained = adapter.base_fingerprint
    if trained is None:
        return strange_base(base, adapter, earlier)
    if trained in {now, *(fold.get("base_fingerprint") for fold in earlier)}:
        return None
    return (
        f"{adapter.folder} was trained on {adapter.base_model}, and the weights in {base.folder} are others, though "
        "names and shapes fit: another model (an instruct version of the base, say), or one that was changed since. The "
        "result is not what was trained."
    )


def _folded_before(plan: FoldPlan, earlier: Sequence[dict[str, Any]]) -> list[str]:
    """Adapters that are in the base already, or are asked for twice."""
    there, found = still_in(earlier), []
    for part in plan.parts:
        one = describe(part.adapter.folder, part.scale)
        if any(is_same(one, other) for other in there):
            found.append(
                f"{part.adapter.folder} is folded into {plan.base.folder} already, by its {REPORT_FILE} (or asked for twice): "
                "its change is made once more. For another strength, fold into the original with --scale."
            )
        there.append(one)
    return found


def _too_wide(part: Part) -> str | None:
    if not part.too_wide:
        return None
    return (
        f"{part.adapter.folder}: the rank is above the width of {len(part.too_wide)} weights, {part.too_wide[0]} first: their "
        "change cannot have so high a rank, and a lower one says the same."
    )


def _left_beside(adapter: Adapter) -> str | None:
    if not (adapter.folder / NEW_EMBEDDINGS).is_file():
        return None
    return (
        f"{adapter.folder} holds {NEW_EMBEDDINGS}, rows for tokens beyond the base's vocabulary: they are not folded, and the "
        "result does not know these tokens."
    )


def _other_bits(plan: FoldPlan) -> list[str]:
    """With --base-quant: adapters that say that they were trained over other weights than these will be."""
    now = {plan.base_dtype or name_of(plan.base.tensors[name].dtype) for name in plan.quantised}
    found = []
    for part in plan.parts:
        if part.adapter.trained_over is None or plan.base_quant is None:
            continue
        over = TrainedOver.model_validate(part.adapter.trained_over)
        others = [f"over {over}"] if str(over) != plan.base_quant else []
        others += [f"from weights in {over.dtype} (--base-dtype {over.dtype})"] if now != {over.dtype} else []
        others += [f"with {', '.join(over.skip)} left alone"] if over.skip else []
        if others:
            found.append(
                f"{part.adapter.folder} was trained {' and '.join(others)}: with --base-quant {plan.base_quant} as asked "
                "for it is folded into other weights than it was trained over."
            )
    return found


def _held(plan: FoldPlan) -> str | None:
    """A warning where weights are rounded to 4 bits from a dtype that is not bf16, and nobody said it is the run's."""
    dtypes = sorted({plan.base.tensors[name].dtype for name in plan.quantised} - {"BF16"})
    if not dtypes or plan.base_dtype or all(part.adapter.trained_over for part in plan.parts):
        return None
    return (
        f"--base-quant {plan.base_quant} rounds weights as they are stored here, in {' and '.join(dtypes)}. A run that held "
        "them in another dtype (model_weight_dtype, bfloat16 where it was not set) saw other 4-bit values: give --base-dtype."
    )


def _overwritten(plan: FoldPlan) -> list[str]:
    """Tensors of which a later adapter brings its own, so that nothing is left of an earlier one's change."""
    lost = []
    for number, part in enumerate(plan.parts):
        earlier = {name: plan.changes[name].steps[0].part for name in part.full}
        names = [name for name, first in earlier.items() if first != number]
        lost += [
            f"{part.adapter.folder} has {name}, trained in full, which takes the place of what "
            f"{plan.parts[earlier[name]].adapter.folder} made of it. In the other order both count."
            for name in names
        ]
    return lost


def strange_base(base: Base, adapter: Adapter, earlier: Sequence[dict[str, Any]]) -> str | None:
    """A warning where the adapter names another base than this one; None where a name agrees, or it names none.

    A base goes by its folder's name, by its folder in a Hub cache (models--OWNER--NAME/snapshots/...), by `_name_or_path`
    of its config, and, where it is the result of folds, by the bases in their reports.
    """
    if not adapter.base_model:
        return None
    folder = base.folder.resolve()
    names = [folder.name, str(base.config.get("_name_or_path") or "")]
    names += [str(fold.get("base") or "") for fold in earlier]
    names += [part.split("--")[-1] for part in folder.parts if part.startswith("models--")]
    known = sorted({Path(name).name for name in names if name})
    if Path(public_name(adapter.base_model)).name.casefold() in {name.casefold() for name in known}:
        return None
    return (
        f"{adapter.folder} was trained on {adapter.base_model}; {base.folder} goes by {' and '.join(known)}. Names and "
        "shapes of the tensors fit. If it is another model (an instruct version of the base, say), the result is not "
        "what was trained."
    )


def _other_fold(plan: FoldPlan, earlier: Sequence[dict[str, Any]]) -> str | None:
    """A warning where --unmerge names other adapters or scales than the last that are in the model by its fold report."""
    there = still_in(earlier)
    undone = [describe(part.adapter.folder, part.scale) for part in plan.parts]
    last = there[-len(undone) :]
    same = len(last) == len(undone) and all(
        is_same(one, other) and one[2] == other[2] for one, other in zip(last, undone, strict=True)
    )
    if not there or same:
        return None

    def shown(entries: Sequence[Folded]) -> str:
        return ", ".join(f"{name} × {scale:g}" for name, _, scale in entries)

    return (
        f"{plan.base.folder} is by its {REPORT_FILE} a fold of {shown(there)}; what is taken out is {shown(undone)}. "
        "Unless these are the same adapters, the last ones first, the result is not the base."
    )
