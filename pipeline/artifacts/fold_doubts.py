"""What speaks against a fold that can be done: the user is warned, not refused.

Takes a `FoldPlan`; gives warnings: an adapter that names another base than this one, an adapter that is undone but
by the model's own fold report was not what was folded, a change that a tensor trained in full takes the place of, and
4 bits of weights that are not those an adapter was trained over, or perhaps not.
"""

from pathlib import Path
from typing import Any

from pipeline.artifacts.adapter_files import Adapter, public_name
from pipeline.artifacts.fold_plan import FoldPlan
from pipeline.foreign import read_object
from pipeline.formats.base_model import Base

REPORT_FILE = "fold_report.json"


def doubts(plan: FoldPlan) -> list[str]:
    """The warnings. `fold_report.json` in the input's folder tells what an earlier fold made it from."""
    file = plan.base.folder / REPORT_FILE
    report = read_object(file, "the report of an earlier fold") if file.is_file() else {}
    found = [strange_base(plan.base, part.adapter, report) for part in plan.parts]
    if plan.unmerge:
        found.append(_other_fold(plan, report))
    return [line for line in [*found, *_overwritten(plan), *_other_bits(plan), _held(plan)] if line]


def _other_bits(plan: FoldPlan) -> list[str]:
    """With --base-quant: adapters that say that they were trained over other weights than these will be."""
    stored = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
    now = {plan.base_dtype or stored[plan.base.tensors[name].dtype] for name in plan.quantised}
    found = []
    for part in plan.parts:
        if (over := part.adapter.trained_over) is None or plan.base_quant is None:
            continue
        was = over["quant_type"] + ("-double" if over["double_quant"] else "") if over["bits"] == 4 else "8 bits"
        others = [f"over {was}"] if was != plan.base_quant else []
        others += [f"from weights in {over['dtype']} (--base-dtype {over['dtype']})"] if now != {over["dtype"]} else []
        others += [f"with {', '.join(over['skip'])} left alone"] if over["skip"] else []
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


def strange_base(base: Base, adapter: Adapter, report: dict[str, Any]) -> str | None:
    """A warning where the adapter names another base than this one; None where a name agrees, or it names none.

    A base goes by its folder's name, by its folder in a Hub cache (models--OWNER--NAME/snapshots/...), by `_name_or_path`
    of its config, and, where it is the result of a fold, by the base in that fold's report.
    """
    if not adapter.base_model:
        return None
    folder = base.folder.resolve()
    names = [folder.name, str(base.config.get("_name_or_path") or ""), str(report.get("base") or "")]
    names += [part.split("--")[-1] for part in folder.parts if part.startswith("models--")]
    known = sorted({Path(name).name for name in names if name})
    if Path(public_name(adapter.base_model)).name.casefold() in {name.casefold() for name in known}:
        return None
    return (
        f"{adapter.folder} was trained on {adapter.base_model}; {base.folder} goes by {' and '.join(known)}. Names and "
        "shapes of the tensors fit. If it is another model (an instruct version of the base, say), the result is not "
        "what was trained."
    )


def _other_fold(plan: FoldPlan, report: dict[str, Any]) -> str | None:
    """A warning where --unmerge names other adapters or scales than the model's fold report."""
    folded = [(entry.get("adapter"), entry.get("scale")) for entry in report.get("adapters", ())]
    undone = [(public_name(str(part.adapter.folder)), part.scale) for part in plan.parts]
    if report.get("unmerge") or not folded or folded == undone:
        return None

    def shown(entries: list[tuple[Any, Any]]) -> str:
        return ", ".join(f"{name} × {scale:g}" for name, scale in entries)

    return (
        f"{plan.base.folder} is by its {REPORT_FILE} a fold of {shown(folded)}; what is taken out is {shown(undone)}. "
        "Unless these are the same adapters, the result is not the base."
    )
