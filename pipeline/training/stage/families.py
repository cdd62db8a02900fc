"""The adapter families: what each puts into a stage, does after an update, and writes.

Takes an `AdapterSpec`; gives plain values to pipeline/model and pipeline/artifacts, which know nothing of it.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from pipeline.artifacts.adapter.peft import write_peft_adapter
from pipeline.artifacts.adapter.write import NOTHING, adapter_norms, write_adapter
from pipeline.console import UserError, warn
from pipeline.formats.base_model import read_base
from pipeline.formats.dtypes import dtype_name
from pipeline.formats.fingerprint import fingerprint
from pipeline.model.adapters import base as adapters
from pipeline.model.adapters import control, lora, rotations
from pipeline.model.quantized import Scheme
from pipeline.model.stage import Stage
from pipeline.training.optim.inner import add, value
from pipeline.training.stage import initial_adapter, patterns
from pipeline.training.stage.spec import AdapterSpec, BaseModel, Size

ON_THE_OUTPUT = ("multiplicative_lora", "control_adapter")
WITH_ALPHA = ("multiplicative_lora", "lora", "moslora")
IA3_TARGETS, IA3_FEEDFORWARD = ["k_proj", "v_proj", "down_proj"], ["down_proj"]
BOFT_WIDEST = 4096  # inputs: 64 MiB for each of PEFT's permutations, one a module


def default_targets(family: str) -> list[str] | str:
    """What target_modules is where the configuration does not say."""
    if family in ON_THE_OUTPUT:
        return ["down_proj"]
    return IA3_TARGETS if family == "ia3" else "all-linear"


def check_fits(adapter: AdapterSpec, model: PreTrainedModel) -> None:
    """UserError, before any weight is read, where the adapter does not fit a module's shape."""
    family, block, too_wide = adapter.family, adapter.block_size, []
    for name, size in adapter.sizes.items():
        module: Any = model.get_submodule(name)
        inputs, outputs, rank = module.in_features, module.out_features, size.rank
        if family == "boft" and inputs > BOFT_WIDEST:
            raise UserError(f"adapter_type = 'boft': PEFT makes {inputs} × {inputs} matrices for {name}; use 'oft'")
        if block and inputs % block:
            raise UserError(f"{family}_block_size = {block} does not divide the {inputs} inputs of {name}")
        if family == "control_adapter" and rank > outputs:
            raise UserError(f"lora_rank = {rank}: {name} has {outputs} outputs, which are all the directions there are")
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
    if adapter.family in WITH_ALPHA:
        root = "√" if adapter.use_rslora else ""
        special = " (DoRA)" if adapter.use_dora else ""
        special += f" (starts as {adapter.start})" if adapter.start is not True else ""
        differ = set(adapter.sizes.values()) != {adapter.common}
        special += " (of some modules others, by rank_pattern and alpha_pattern)" if differ else ""
        return f"rank {rank}, s = alpha/{root}rank = {alpha:g}/{root}{rank} = {s:g}{special}, {dtype}"
    if adapter.block_size:
        return f"blocks of {adapter.block_size} inputs, {dtype}"
    return dtype if adapter.family == "ia3" else f"rank {rank}, {dtype}"


def inject(stage: Stage, adapter: AdapterSpec) -> None:
    """The adapter on those of its modules that the stage owns, of each module's own size."""
    for size, members in patterns.groups(adapter.sizes).items():
        _inject(stage, adapter, size, members)


def _inject(stage: Stage, adapter: AdapterSpec, size: Size, targets: list[str]) -> None:
    (rank, alpha, s), dropout, dtype, seed = size, adapter.dropout, adapter.dtype, adapter.seed
    match adapter.family:
        case "multiplicative_lora":
            adapters.inject_multiplicative(stage, targets, rank, alpha, dropout, dtype, seed)
        case "control_adapter":
            control.inject_control(stage, targets, rank, dropout, dtype, seed)
        case "moslora":
            lora.inject_moslora(stage, targets, rank, s, dropout, dtype, seed)
        case "lora" if adapter.use_dora:
            lora.inject_dora(stage, targets, rank, s, dropout, dtype, seed)
        case "lora" if adapter.start is not True:
            lora.inject_from_weight(stage, targets, str(adapter.start), rank, s, dropout, dtype, seed)
        case "lora":
            adapters.inject_lora(stage, targets, rank, alpha, dropout, dtype, seed, adapter.use_rslora)
        case "ia3":
            rotations.inject_ia3(stage, targets, list(adapter.feedforward), dtype)
        case "oft":
            rotations.inject_oft(stage, targets, adapter.block_size or 1, dtype)
        case "boft":
            rotations.inject_boft(stage, targets, adapter.block_size or 1, dtype)
        case "hra":
            rotations.inject_hra(stage, targets, rank, dtype, seed)


def inject_for_trial(stage: Stage, adapter: AdapterSpec) -> None:
    """On those of its modules that the stage owns, the smallest adapter that meets them as this one will.

    PEFT's layers show the base layer's weight to a model that reads it; ours, which stand around a module, do not.
    """
    plain = not adapter.use_dora and adapter.start is True
    by_peft = adapter.family in ("ia3", "oft", "boft") or (adapter.family == "lora" and plain)
    put = adapters.inject_lora if by_peft else adapters.inject_multiplicative
    put(stage, adapter.targets, 1, 1.0, 0.0, torch.float32, adapter.seed)


def saved(adapter: AdapterSpec, folder: str) -> dict[str, Tensor]:
    """The tensors of the adapter in `folder`, by global name. UserError where it is not what this run trains."""
    if family := _family_of_peft(adapter):
        tensors = initial_adapter.read_family(folder, adapter.targets, family, _peft_settings(adapter))
        if family != "dora":
            return tensors
        ranks = {module: size.rank for module, size in adapter.sizes.items()}
        return patterns.from_one_rank(tensors, ranks, adapter.factors)
    return initial_adapter.read_pairs(
        folder,
        {module: (size.rank, size.s) for module, size in adapter.sizes.items()},
        uniform=(adapter.saved_size.rank, adapter.saved_size.s),
        on_the_output=adapter.family in ON_THE_OUTPUT,
        biased_targets=adapter.biased_targets,
    )


def saved_kind(adapter: AdapterSpec) -> str:
    """What pipeline/artifacts calls the form in which the family is saved."""
    return _family_of_peft(adapter) or ("multiplicative_lora" if adapter.family in ON_THE_OUTPUT else "lora")


def feedforward(named: list[str] | None, targets: list[str]) -> list[str]:
    """Those of `targets` to which IA³ gives a factor for each input: those `named`, or its paper's."""
    wanted = IA3_FEEDFORWARD if named is None else named
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


def norms(stage: Stage, adapter: AdapterSpec) -> dict[str, float]:
    """‖s·B·A‖_F of every module of the stage; nothing for families that are no pair of A and B."""
    pairs = {name: t for name, t in adapters.written(stage).items() if name.endswith((".A", ".B"))}
    return {module: norm * abs(adapter.sizes[module].s) for module, norm in adapter_norms(pairs, 1.0).items()}


def writer(
    adapter: AdapterSpec, base: BaseModel, train_logit_scale: float = 1.0, tied: Mapping[str, str] = NOTHING
) -> Callable[[Path, dict[str, Tensor]], None]:
    """What writes `adapters.written` of all stages into a folder: the adapter in the form of its family, and what is
    trained in full beside it. `tied`: names under which a stage has another one's weight, from `stage.tied_head`.
    """
    write, adapted = _writer(adapter, base, train_logit_scale), set(adapter.targets)

    def write_all(folder: Path, tensors: dict[str, Tensor]) -> None:
        full = {n: t for n, t in tensors.items() if n.rpartition(".")[0] not in adapted}
        own = {name: tensor for name, tensor in tensors.items() if name not in full}
        write(folder, _of_one_size(adapter, own), full={n: t for n, t in full.items() if n not in tied}, tied=tied)

    return write_all


def _writer(adapter: AdapterSpec, base: BaseModel, train_logit_scale: float) -> Callable[..., None]:
    common: dict[str, Any] = {
        "base_model": base.name,
        "train_logit_scale": train_logit_scale,
        "trained_over": trained_over(base.scheme, base.dtype),
        "base_fingerprint": _fingerprint(Path(base.folder)),
    }
    if family := _family_of_peft(adapter):
        return partial(write_peft_adapter, family=family, settings=_peft_settings(adapter), **common)
    kind: Any = "multiplicative_lora" if adapter.family in ON_THE_OUTPUT else "lora"
    rank, alpha, s = adapter.saved_size
    started = adapter.start is not True  # then of twice the rank, with the s of the rank it was trained with
    rslora = adapter.use_rslora and not started
    return partial(
        write_adapter,
        kind=kind,
        rank=rank * (2 if started else 1),
        alpha=alpha if rslora else s * rank * (2 if started else 1),
        use_rslora=rslora,
        dropout=adapter.dropout,
        biased_targets=adapter.biased_targets,
        facts={"family": adapter.family, "init_lora_weights": adapter.start},
        **common,
    )


def _of_one_size(adapter: AdapterSpec, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As all modules are saved: with the largest rank and one s."""
    if set(adapter.sizes.values()) == {adapter.common}:
        return tensors
    return patterns.to_one_rank(
        tensors, adapter.saved_size.rank * (2 if adapter.start is not True else 1), adapter.factors
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
    return {
        "bits": scheme.bits,
        "quant_type": scheme.quant_type if in_4_bits else None,
        "double_quant": in_4_bits and scheme.double_quant,
        "skip": list(scheme.skip),
        "dtype": dtype_name(dtype),
    }


def _family_of_peft(adapter: AdapterSpec) -> Any:
    """The family's name in artifacts/adapter/peft.py, or None for one that is pairs of A and B."""
    if adapter.use_dora:
        return "dora"
    return adapter.family if adapter.family in ("ia3", "oft", "boft", "hra") else None


def _peft_settings(adapter: AdapterSpec) -> dict[str, Any]:
    """The family's own keys of PEFT's config."""
    rank, alpha, _ = adapter.saved_size
    if adapter.use_dora:
        return {
            "r": rank,
            "lora_alpha": alpha,
            "lora_dropout": adapter.dropout,
            "bias": "none",
            "use_rslora": adapter.use_rslora,
            "use_dora": True,
            "fan_in_fan_out": False,
            "init_lora_weights": True,
        }
    if adapter.family == "ia3":
        return {"feedforward_modules": list(adapter.feedforward), "fan_in_fan_out": False}
    if adapter.family == "hra":
        return {"r": rank, "apply_GS": False, "bias": "none"}
    if adapter.family == "boft":
        return {
            "boft_block_size": adapter.block_size,
            "boft_block_num": 0,
            "boft_n_butterfly_factor": 1,
            "boft_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
        }
    return {
        "r": 0,
        "oft_block_size": adapter.block_size,
        "module_dropout": 0.0,
        "bias": "none",
        "coft": False,
        "block_share": False,
        "use_cayley_neumann": True,
        "num_cayley_neumann_terms": 5,
        "fan_in_fan_out": False,
        "peft_version": "0.18.0",  # the first with this form of the series; PEFT warns without it
    }
