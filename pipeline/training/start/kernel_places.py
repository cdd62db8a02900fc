"""Our kernels in a run: puts them into a stage and says how many modules of the whole model took each, and which none did.

A kernel that was asked for and found no place is said with the reason: the model keeps more than the user counts on.
"""

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from pipeline.console import log
from pipeline.kernels import dispatch
from pipeline.model.fusion import apply as fusion
from pipeline.model.stage import Stage
from pipeline.training.stage import parts
from pipeline.training.stage.meta_model import MetaModel
from pipeline.training.stage.spec import Trained

if TYPE_CHECKING:  # it imports DeepSpeed, which `--check` has no use for
    from pipeline.training.engine.engine import Place

NOWHERE = {  # why, where a model has no module that a kernel might serve
    "norm": "no module has an epsilon, as norms have",
    "rope": "no attention receives tables of a rotary embedding (position_embeddings)",
    "swiglu": "no module has gate_proj, up_proj, down_proj and act_fn",
    "multiplicative": "no module has gate_proj, up_proj, down_proj and act_fn",
    "parallel_block": "no layer has a part named mlp",
    "shared_input": "no module has q_proj, k_proj and v_proj, or gate_proj and up_proj",
}


def put(stage: Stage, wanted: str | list[Any], place: "Place") -> None:
    """Put the kernels into `stage`; the first process says what became of each in the whole model."""
    wanted = choose(wanted, place.device.type == "cuda")
    everyone: list[Counter[str]] = [Counter()] * place.world
    dist.all_gather_object(everyone, parts.put_kernels(stage, wanted) if place.replica == 0 else Counter())
    taken = sum(everyone, Counter[str]())
    reasons: list[dict[str, Counter[str]]] = [{}] * place.world
    own = {name: fusion.why_not(stage, name) for name in missing(wanted, taken)} if place.replica == 0 else {}
    dist.all_gather_object(reasons, own)
    say_places(wanted, taken, reasons)


def foresee(wanted: str | list[Any], meta_model: MetaModel, trained: Trained) -> None:
    """Say what `put` will say, from the model's structure alone."""
    wanted = choose(wanted, torch.cuda.is_available())
    if wanted in ("none", []):
        return
    stage = parts.whole_on_meta(meta_model, trained)
    taken = parts.put_kernels(stage, wanted)
    say_places(wanted, taken, [{name: fusion.why_not(stage, name) for name in missing(wanted, taken)}])


def choose(wanted: str | list[Any], on_gpu: bool) -> str | list[Any]:
    """`parts.chosen_kernels`; says what 'auto' has chosen, and why."""
    chosen = parts.chosen_kernels(wanted, on_gpu)
    if wanted == "auto":
        kinds = dispatch.kinds(on_gpu)
        unchecked = [kind for kind in kinds if kind not in dispatch.CHECKED]
        why = (
            f"not checked on {', '.join(unchecked)} yet: run `make gpu-check`, or set kernels = 'all'"
            if unchecked
            else f"checked on {', '.join(kinds)} by {', '.join(dispatch.CHECKED[kind] for kind in kinds)}"
        )
        log(f"kernels:  '{chosen}', {why}")
    return chosen


def missing(wanted: str | list[Any], taken: Counter[str]) -> list[str]:
    """The kernels asked for that no module took. The product of an MLP with an adapter is SwiGLU too."""
    within = {"swiglu"} if taken["multiplicative"] else set()
    return [name for name in parts.kernel_names(wanted) if not taken[name] and name not in within]


def say_places(wanted: str | list[Any], taken: Counter[str], reasons: list[dict[str, Counter[str]]]) -> None:
    """`reasons`: of each stage, by kernel."""
    if taken:
        log("kernels:  " + ", ".join(f"{name} in {n} modules" for name, n in taken.items()))
    for name in missing(wanted, taken):
        why = sum((of_stage.get(name, Counter()) for of_stage in reasons), Counter[str]())
        said = "; ".join(f"{reason} ({n} of them)" for reason, n in why.most_common()) or NOWHERE[name]
        log(f"kernels:  no place for {name}: {said}")
