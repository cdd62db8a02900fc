"""The adapter families: what each puts into a stage, does after an update, and writes.

Takes an `AdapterSpec`; gives plain values to pipeline/model and pipeline/artifacts, which know nothing of it.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pipeline.artifacts.adapter.adapter import adapter_norms
from pipeline.artifacts.adapter.parameters import per_expert
from pipeline.artifacts.adapter.schema import TrainedOver
from pipeline.artifacts.adapter.write import NOTHING, write_adapter, write_by_peft, write_family
from pipeline.console import UserError, warn
from pipeline.families import CONFIGURED, FAMILIES, LORA, MULTIPLICATIVE, settings
from pipeline.families import saved as saved_as
from pipeline.formats.base_model import read_base
from pipeline.formats.dtypes import dtype_name
from pipeline.formats.fingerprint import fingerprint
from pipeline.model.adapters import by_peft, control, lora, multiplicative, rotations
from pipeline.model.adapters.base import Injector, Settings, outputs_of, owned, sizes_of, written
from pipeline.model.quantized import Scheme
from pipeline.model.stage import Stage
from pipeline.names import holders
from pipeline.peft.types import LOCAL, Asked, is_shared
from pipeline.training.optim import adalora
from pipeline.training.optim.inner import add, value
from pipeline.training.optim.pipeline_optimizer import PipelineOptimizer
from pipeline.training.stage import initial_adapter, patterns
from pipeline.training.stage.spec import AdapterSpec, BaseModel, Size

# By a family's name, what puts it into a stage.
INJECTORS: dict[str, Injector] = {
    **multiplicative.INJECTORS,
    **control.INJECTORS,
    **lora.INJECTORS,
    **rotations.INJECTORS,
    **by_peft.INJECTORS,
}


# Families that train on a Conv1D: those whose pairs of A and B, with their own start, are all that is saved.
ON_CONV1D = tuple(name for name, row in CONFIGURED.items() if saved_as(row).is_pairs)


def default_targets(family: str) -> list[str] | str:
    """What target_modules is where the configuration does not say."""
    targets = FAMILIES[family].default_targets
    return targets if isinstance(targets, str) else list(targets)


def check_fits(adapter: AdapterSpec, model: PreTrainedModel) -> None:
    """UserError, before any weight is read, where the adapter does not fit a module's shape."""
    if adapter.by_peft is not None:
        by_peft.check_fits(model, adapter.targets, adapter.by_peft)
    row, block, too_wide = adapter.row, adapter.block_size, []
    pairs = saved_as(row).is_pairs and adapter.start is True and adapter.by_peft is None
    for name, size in adapter.sizes.items():
        rank = size.rank
        if name in adapter.parameters:
            inputs, outputs = adapter.parameters[name][-2:]
        else:
            module: Any = model.get_submodule(name)
            if isinstance(module, Conv1D) and not pairs:
                raise UserError(
                    f"target_modules: {name} is a Conv1D, whose weight is stored transposed; there train pairs of A and B: "
                    f"adapter_type = {', '.join(repr(family) for family in ON_CONV1D)}"
                )
            outputs = outputs_of(model, module)
            inputs = (sizes_of(module) or (outputs, outputs))[0]
        if block and inputs % block:
            raise UserError(f"{row.block_size} = {block} does not divide the {inputs} inputs of {name}")
        if row.not_above_outputs and rank > outputs:
            raise UserError(f"lora_rank = {rank}: {name} has {outputs} outputs, {row.not_above_outputs}")
        if adapter.start is not True and rank > min(inputs, outputs):
            key = "lora_rank" if rank == adapter.common.rank else "rank_pattern"
            raise UserError(f"{key} = {rank}: {name} has a weight of rank {min(inputs, outputs)} at most")
        too_wide += [(rank, name, min(inputs, outputs))] if rank > min(inputs, outputs) else []
    if too_wide:
        rank, name, width = max(too_wide)
        warn(
            f"lora_rank = {rank} is above the width of {len(too_wide)} of {len(adapter.sizes)} modules ({name}: {width}): their "
            f"change cannot have a higher rank than that; lora_rank = {width} says the same with fewer parameters"
        )


def describe(adapter: AdapterSpec) -> str:
    """Rank, scaling and what is special, in words."""
    (rank, alpha, s), dtype = adapter.common, dtype_name(adapter.dtype)
    if adapter.by_peft is not None:
        given = ", ".join(f"{key} = {value}" for key, value in adapter.by_peft.settings.items())
        return f"PEFT's {adapter.by_peft.type}" + (f" with {given}" if given else "") + f", {dtype}"
    required = CONFIGURED[adapter.family].required
    if "lora_alpha" in required:
        root = "√" if adapter.use_rslora else ""
        special = " (DoRA)" if adapter.use_dora else ""
        special += f" (starts as {adapter.start})" if adapter.start is not True else ""
        differ = set(adapter.sizes.values()) != {adapter.common}
        special += " (of some modules others, by rank_pattern and alpha_pattern)" if differ else ""
        return f"rank {rank}, s = alpha/{root}rank = {alpha:g}/{root}{rank} = {s:g}{special}, {dtype}"
    if adapter.block_size:
        return f"blocks of {adapter.block_size} inputs, {dtype}"
    return f"rank {rank}, {dtype}" if "lora_rank" in required else dtype


def inject(stage: Stage, adapter: AdapterSpec) -> None:
    """The adapter on those of its modules that the stage owns, of each module's own size."""
    for size, members in patterns.groups(adapter.sizes).items():
        _inject(stage, adapter, size, members)


def _inject(stage: Stage, adapter: AdapterSpec, size: Size, targets: list[str]) -> None:
    made_with = Settings(
        *size,
        adapter.dropout,
        adapter.dtype,
        adapter.seed,
        adapter.use_rslora,
        adapter.start,
        adapter.block_size or 1,
        list(adapter.feedforward),
        adapter.by_peft,
    )
    INJECTORS[adapter.row.name](stage, targets, made_with)


def inject_for_trial(stage: Stage, adapter: AdapterSpec) -> None:
    """On those of its modules that the stage owns, the smallest adapter that meets them as this one will.

    PEFT's layers show the base layer's weight to a model that reads it; ours, which stand around a module, do not.
    """
    by_peft = adapter.row.by_peft and adapter.start is True
    inject_one = lora.inject_lora if by_peft else multiplicative.inject_multiplicative
    inject_one(stage, adapter.targets, 1, 1.0, 0.0, torch.float32, adapter.seed)


def saved(adapter: AdapterSpec, folder: str) -> dict[str, Tensor]:
    """The tensors of the adapter in `folder`, by global name. UserError where it is not what this run trains."""
    form = saved_as(adapter.row)
    if adapter.by_peft is not None:
        return initial_adapter.read_by_peft(folder, adapter.targets, adapter.by_peft)
    if not form.is_pairs:
        tensors = initial_adapter.read_family(folder, adapter.targets, form.name, _peft_settings(adapter))
        if not {"A", "B"} <= set(form.tensors):
            return tensors
        ranks = {module: size.rank for module, size in adapter.sizes.items()}
        return patterns.from_one_rank(tensors, ranks, adapter.factors, adapter.matrices)
    return initial_adapter.read_pairs(
        folder,
        {module: (size.rank, size.s) for module, size in adapter.sizes.items()},
        uniform=(adapter.saved_size.rank, adapter.saved_size.s),
        on_the_output=form.on_output,
        biased_targets=adapter.biased_targets,
        parameters=adapter.parameters,
    )


def saved_kind(adapter: AdapterSpec) -> str:
    """What pipeline/artifacts calls the form in which the family is saved."""
    return saved_as(adapter.row).name


def feedforward(family: str, named: list[str] | None, targets: list[str]) -> list[str]:
    """Those of `targets` to which the family gives a factor for each input: those `named`, or its paper's."""
    wanted = FAMILIES[family].default_input_factors if named is None else named
    return [name for name in targets if name.rpartition(".")[2] in wanted]


def after_updates(stage: Stage, optimizer: Optimizer) -> None:
    """Have `optimizer`, the stage's own, follow each update with what the family needs: Q orthonormal again."""
    directions = [m.Q for m in stage.modules() if isinstance(m, control.ControlAdapter)]
    if directions:
        optimizer.register_step_post_hook(lambda *_: orthonormalise(directions, optimizer))


@torch.no_grad()
def orthonormalise(directions: list[nn.Parameter], optimizer: Optimizer) -> None:
    """A Newton step on each Q, in fp32; through the optimizer's compensated sum where it has one."""
    for Q in directions:
        add(optimizer, Q, control.newton_step(value(optimizer, Q)))


def share_ranks(stage: Stage, optimizer: PipelineOptimizer, adapter: AdapterSpec | None) -> None:
    """Have `optimizer` share out the ranks of all stages' modules, where the family does."""
    if adapter is None or adapter.by_peft is None or not LOCAL[adapter.by_peft.type].ranked:
        return
    layers = {name: stage.model.get_submodule(name) for name in owned(stage, adapter.targets)}
    places = {name: place for place, name in enumerate(adapter.targets)}
    adalora.attach(optimizer, layers, places, _peft_config(adapter.by_peft))


def norms(stage: Stage, adapter: AdapterSpec) -> dict[str, float]:
    """‖s·B·A‖_F of every module of the stage; nothing for families that are no pair of A and B."""
    pairs = {name: t for name, t in written(stage).items() if name.endswith((".A", ".B"))}
    for name, experts in adapter.matrices.items():
        if f"{name}.A" in pairs:
            pairs |= zip(
                (f"{name}.A", f"{name}.B"), per_expert(pairs[f"{name}.A"], pairs[f"{name}.B"], experts), strict=True
            )
    return {module: norm * abs(adapter.sizes[module].s) for module, norm in adapter_norms(pairs, 1.0).items()}


def writer(
    adapter: AdapterSpec,
    base: BaseModel,
    train_logit_scale: float = 1.0,
    tied: Mapping[str, str] = NOTHING,
    stops: Sequence[int] = (),
) -> Callable[[Path, dict[str, Tensor]], None]:
    """What writes the saved tensors of all stages (`written`) into a folder: the adapter in the form of its family, and what
    is trained in full beside it. `tied`: names under which a stage has another one's weight, from `stage.tied_head`.
    `stops`: ids at which it learns to stop.
    """
    write, adapted = _writer(adapter, base, train_logit_scale, stops), set(adapter.targets)

    def write_all(folder: Path, tensors: dict[str, Tensor]) -> None:
        full = {n: t for n, t in tensors.items() if adapted.isdisjoint(holders(n)) and not is_shared(n)}
        own = {name: tensor for name, tensor in tensors.items() if name not in full}
        write(folder, _of_one_size(adapter, own), full={n: t for n, t in full.items() if n not in tied}, tied=tied)

    return write_all


def _writer(
    adapter: AdapterSpec, base: BaseModel, train_logit_scale: float, stops: Sequence[int]
) -> Callable[..., None]:
    common: dict[str, Any] = {
        "base_model": base.name,
        "train_logit_scale": train_logit_scale,
        "trained_over": trained_over(base.scheme, base.dtype),
        "base_fingerprint": _fingerprint(Path(base.folder)),
        "stops": list(stops),
    }
    form = saved_as(adapter.row)
    if adapter.by_peft is not None:
        asked = adapter.by_peft
        return partial(write_by_peft, modules=adapter.targets, asked=asked, config=_peft_config(asked), **common)
    if not form.is_pairs:
        return partial(write_family, family=form.name, settings=_peft_settings(adapter), **common)
    rank, alpha, s = adapter.saved_size
    started = adapter.start is not True  # then of twice the rank, with the s of the rank it was trained with
    rslora = adapter.use_rslora and not started
    return partial(
        write_adapter,
        kind=MULTIPLICATIVE if form.on_output else LORA,
        rank=rank * (2 if started else 1),
        alpha=alpha if rslora else s * rank * (2 if started else 1),
        use_rslora=rslora,
        dropout=adapter.dropout,
        biased_targets=adapter.biased_targets,
        experts=adapter.experts,
        parameters=adapter.matrices,
        facts={"family": adapter.family, "init_lora_weights": adapter.start},
        **common,
    )


def _of_one_size(adapter: AdapterSpec, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As all modules are saved: with the largest rank and one s."""
    if set(adapter.sizes.values()) == {adapter.common}:
        return tensors
    return patterns.to_one_rank(
        tensors, adapter.saved_size.rank * (2 if adapter.start is not True else 1), adapter.factors, adapter.matrices
    )


def _fingerprint(model: Path) -> str | None:
    """By which the fold knows the base again. None for a folder that the fold cannot read either."""
    try:
        return fingerprint(read_base(model))
    except (UserError, OSError):
        return None


def trained_over(scheme: Scheme | None, dtype: torch.dtype) -> dict[str, Any] | None:
    """How the base is quantised, for the adapter to say; None where it is not. `dtype`: of its weights before."""
    if scheme is None:
        return None
    in_4_bits = scheme.bits == 4
    said = TrainedOver(
        bits=4 if in_4_bits else 8,
        quant_type=scheme.quant_type if in_4_bits else None,
        double_quant=in_4_bits and scheme.double_quant,
        skip=list(scheme.skip),
        dtype=dtype_name(dtype),
    )
    return said.model_dump()


def _peft_config(asked: Asked) -> dict[str, Any]:
    """All keys of PEFT's configuration: the defaults of another version may be others."""
    from pipeline.peft.layers import as_json

    return as_json(asked.type, asked.settings)


def _peft_settings(adapter: AdapterSpec) -> dict[str, Any]:
    """The family's own keys of PEFT's config."""
    rank, alpha, _ = adapter.saved_size
    values = {
        "lora_rank": rank,
        "lora_alpha": alpha,
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.use_rslora,
        "feedforward_modules": list(adapter.feedforward),
        adapter.row.block_size: adapter.block_size,
    }
    return settings(adapter.row, values)
