"""The adapter families, as the configuration names them: what each puts into a stage, does after an update, and writes.

Takes the config; gives plain values to pipeline/model and pipeline/artifacts, which know nothing of it.
"""

import math
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
from pipeline.config.schema import Config
from pipeline.console import UserError, warn
from pipeline.formats.base_model import read_base
from pipeline.formats.dtypes import DTYPES
from pipeline.formats.fingerprint import fingerprint
from pipeline.model.adapters import base as adapters
from pipeline.model.adapters import control, lora, rotations
from pipeline.model.stage import Stage
from pipeline.names import id_in_cache
from pipeline.training.optim.inner import add, value
from pipeline.training.stage import initial_adapter, patterns

ON_THE_OUTPUT = ("multiplicative_lora", "control_adapter")
IA3_TARGETS, IA3_FEEDFORWARD = ["k_proj", "v_proj", "down_proj"], ["down_proj"]
BOFT_WIDEST = 4096  # inputs: 64 MiB for each of PEFT's permutations, one a module


def default_targets(config: Config) -> list[str] | str:
    """What target_modules is where the configuration does not say."""
    if config.adapter_type in ON_THE_OUTPUT:
        return ["down_proj"]
    return IA3_TARGETS if config.adapter_type == "ia3" else "all-linear"


def check_fits(config: Config, shell: PreTrainedModel, targets: list[str]) -> None:
    """UserError, before any weight is read, where a family does not fit a module's shape, or a key names no module."""
    size = config.oft_block_size or config.boft_block_size
    patterns.check({"rank_pattern": config.rank_pattern, "alpha_pattern": config.alpha_pattern}, targets)
    if unknown := set(config.feedforward_modules or ()) - {name.rpartition(".")[2] for name in targets}:
        raise UserError(f"feedforward_modules: {', '.join(sorted(unknown))} is none of target_modules")
    too_wide = []
    for name in targets:
        module: Any = shell.get_submodule(name)
        inputs, outputs = module.in_features, module.out_features
        rank, _ = patterns.resolve(name, config.lora_rank or 0, 1.0, config.rank_pattern, {})
        if config.adapter_type == "boft" and inputs > BOFT_WIDEST:
            raise UserError(f"adapter_type = 'boft': PEFT makes {inputs} × {inputs} matrices for {name}; use 'oft'")
        if size and inputs % size:
            raise UserError(f"{config.adapter_type}_block_size = {size} does not divide the {inputs} inputs of {name}")
        if config.adapter_type == "control_adapter" and rank > outputs:
            raise UserError(f"lora_rank = {rank}: {name} has {outputs} outputs, which are all the directions there are")
        if config.init_lora_weights is not True and rank > min(inputs, outputs):
            key = "lora_rank" if rank == config.lora_rank else "rank_pattern"
            raise UserError(f"{key} = {rank}: {name} has a weight of rank {min(inputs, outputs)} at most")
        too_wide += [(rank, name, min(inputs, outputs))] if rank > min(inputs, outputs) else []
    if too_wide:
        rank, name, width = max(too_wide)
        warn(
            f"lora_rank = {rank} is above the width of {len(too_wide)} of {len(targets)} modules ({name}: {width}): their change "
            f"cannot have a higher rank than that; lora_rank = {width} says the same with fewer parameters"
        )


def describe(config: Config) -> str:
    """Rank, scaling and what is special, in words."""
    rank, alpha, dtype = config.lora_rank, config.lora_alpha, config.lora_weight_dtype
    if alpha is not None and rank is not None:
        root = "√" if config.use_rslora else ""
        s = f"s = alpha/{root}rank = {alpha:g}/{root}{rank} = {scaling(config):g}"
        special = " (DoRA)" if config.use_dora else ""
        special += f" (starts as {config.init_lora_weights})" if config.init_lora_weights is not True else ""
        special += " (of some modules others, by rank_pattern and alpha_pattern)" if _patterned(config) else ""
        return f"rank {rank}, {s}{special}, {dtype}"
    size = config.oft_block_size or config.boft_block_size
    return f"rank {rank}, {dtype}" if rank else f"blocks of {size} inputs, {dtype}" if size else dtype


def scaling(config: Config) -> float:
    """s of the family: alpha / rank, alpha / √rank with use_rslora, and 1 for a family without."""
    if config.lora_rank is None or config.lora_alpha is None:
        return 1.0
    return config.lora_alpha / (math.sqrt(config.lora_rank) if config.use_rslora else config.lora_rank)


def inject(stage: Stage, config: Config, targets: list[str]) -> None:
    """The configured adapter on those of `targets` that the stage owns, of each module's own rank and alpha."""
    if not _patterned(config):
        _inject(stage, config, targets)
        return
    for (rank, alpha), members in patterns.groups(_sizes(config, targets)).items():
        _inject(stage, config.model_copy(update={"lora_rank": rank, "lora_alpha": alpha}), members)


def _inject(stage: Stage, config: Config, targets: list[str]) -> None:
    rank, alpha, dropout, seed = config.lora_rank or 1, config.lora_alpha or 1.0, config.lora_dropout, config.seed
    dtype, s = DTYPES[config.lora_weight_dtype], scaling(config)
    match config.adapter_type:
        case "multiplicative_lora":
            adapters.inject_multiplicative(stage, targets, rank, alpha, dropout, dtype, seed)
        case "control_adapter":
            control.inject_control(stage, targets, rank, dropout, dtype, seed)
        case "moslora":
            lora.inject_moslora(stage, targets, rank, s, dropout, dtype, seed)
        case "lora" if config.use_dora:
            lora.inject_dora(stage, targets, rank, s, dropout, dtype, seed)
        case "lora" if config.init_lora_weights is not True:
            lora.inject_from_weight(stage, targets, str(config.init_lora_weights), rank, s, dropout, dtype, seed)
        case "lora":
            adapters.inject_lora(stage, targets, rank, alpha, dropout, dtype, seed, config.use_rslora)
        case "ia3":
            rotations.inject_ia3(stage, targets, feedforward(config, targets), dtype)
        case "oft":
            rotations.inject_oft(stage, targets, config.oft_block_size or 1, dtype)
        case "boft":
            rotations.inject_boft(stage, targets, config.boft_block_size or 1, dtype)
        case "hra":
            rotations.inject_hra(stage, targets, rank, dtype, seed)


def inject_for_trial(stage: Stage, config: Config, targets: list[str]) -> None:
    """On those of `targets` that the stage owns, the smallest adapter that meets them as the configured one will.

    PEFT's layers show the base layer's weight to a model that reads it; ours, which stand around a module, do not.
    """
    plain = not config.use_dora and config.init_lora_weights is True
    by_peft = config.adapter_type in ("ia3", "oft", "boft") or (config.adapter_type == "lora" and plain)
    put = adapters.inject_lora if by_peft else adapters.inject_multiplicative
    put(stage, targets, 1, 1.0, 0.0, torch.float32, config.seed)


def saved(config: Config, targets: list[str], biased_targets: bool) -> dict[str, Tensor]:
    """The tensors of init_adapter, by global name. UserError where it is not what this run trains."""
    folder, patterned = config.init_adapter or "", _patterned(config)
    one = _one_rank(config, targets) if patterned else config
    uniform = one.lora_rank or 1, scaling(one)
    ranks = {module: rank for module, (rank, _) in _sizes(config, targets).items()}
    factors = _factors(config, targets) if patterned else dict.fromkeys(targets, 1.0)
    if family := _family_of_peft(config):
        tensors = initial_adapter.read_family(folder, targets, family, _peft_settings(one, targets))
        return patterns.from_one_rank(tensors, ranks, factors) if patterned else tensors
    sizes = {module: (ranks[module], uniform[1] * factors[module]) for module in targets}
    on_the_output = config.adapter_type in ON_THE_OUTPUT
    return initial_adapter.read_pairs(
        folder, sizes, uniform=uniform, on_the_output=on_the_output, biased_targets=biased_targets
    )


def saved_kind(config: Config) -> str:
    """What pipeline/artifacts calls the form in which the family is saved."""
    return _family_of_peft(config) or ("multiplicative_lora" if config.adapter_type in ON_THE_OUTPUT else "lora")


def feedforward(config: Config, targets: list[str]) -> list[str]:
    """Those of `targets` to which IA³ gives a factor for each input."""
    named = IA3_FEEDFORWARD if config.feedforward_modules is None else config.feedforward_modules
    return [name for name in targets if name.rpartition(".")[2] in named]


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


def norms(stage: Stage, config: Config) -> dict[str, float]:
    """‖s·B·A‖_F of every module of the stage; nothing for families that are no pair of A and B."""
    pairs = {name: t for name, t in adapters.written(stage).items() if name.endswith((".A", ".B"))}
    if _patterned(config):
        modules = list(dict.fromkeys(name.rpartition(".")[0] for name in pairs))
        rank = max((t.shape[0] for name, t in pairs.items() if name.endswith(".A")), default=0)
        pairs = patterns.to_one_rank(pairs, rank, _factors(config, modules))
    return adapter_norms(pairs, scaling(config))


def writer(
    config: Config, targets: list[str], biased_targets: bool, tied: Mapping[str, str] = NOTHING
) -> Callable[[Path, dict[str, Tensor]], None]:
    """What writes `adapters.written` of all stages into a folder: the adapter in the form of its family, and what is
    trained in full beside it. `tied`: names under which a stage has another one's weight, from `stage.tied_head`.
    """
    write, adapted = _writer(config, targets, biased_targets), set(targets)

    def write_all(folder: Path, tensors: dict[str, Tensor]) -> None:
        full = {n: t for n, t in tensors.items() if n.rpartition(".")[0] not in adapted}
        own = {name: tensor for name, tensor in tensors.items() if name not in full}
        write(folder, own, full={n: t for n, t in full.items() if n not in tied}, tied=tied)

    return write_all


def _writer(config: Config, targets: list[str], biased_targets: bool) -> Callable[..., None]:
    if _patterned(config):
        uniform, factors = _one_rank(config, targets), _factors(config, targets)
        rank = (uniform.lora_rank or 1) * (2 if config.init_lora_weights is not True else 1)
        write = _writer(uniform, targets, biased_targets)
        return lambda folder, own, **full: write(folder, patterns.to_one_rank(own, rank, factors), **full)
    base = config.hub_base_model or id_in_cache(Path(config.model)) or config.model
    common: dict[str, Any] = {
        "base_model": base,
        "train_logit_scale": config.train_logit_scale,
        "trained_over": trained_over(config),
        "base_fingerprint": _fingerprint(Path(config.model)),
    }
    if family := _family_of_peft(config):
        return partial(write_peft_adapter, family=family, settings=_peft_settings(config, targets), **common)
    kind: Any = "multiplicative_lora" if config.adapter_type in ON_THE_OUTPUT else "lora"
    facts = {"family": config.adapter_type, "init_lora_weights": config.init_lora_weights}
    started = config.init_lora_weights is not True  # then of twice the rank, with the s of the rank it was trained with
    s, rank = scaling(config), (config.lora_rank or 1) * (2 if started else 1)
    rslora = config.use_rslora and not started
    return partial(
        write_adapter,
        kind=kind,
        rank=rank,
        alpha=(config.lora_alpha or 1.0) if rslora else s * rank,
        use_rslora=rslora,
        dropout=config.lora_dropout,
        biased_targets=biased_targets,
        facts=facts,
        **common,
    )


def _fingerprint(model: Path) -> str | None:
    """By which the fold knows the base again. None for a folder that the fold cannot read either."""
    try:
        return fingerprint(read_base(model))
    except (UserError, OSError):
        return None


def trained_over(config: Config) -> dict[str, Any] | None:
    """How the base is quantised, for the adapter to say; None where it is not."""
    if config.quantization is None:
        return None
    b = config.quantization.bnb
    return {
        "bits": 4 if b.load_in_4bit else 8,
        "quant_type": b.bnb_4bit_quant_type if b.load_in_4bit else None,
        "double_quant": b.load_in_4bit and b.bnb_4bit_use_double_quant,
        "skip": b.llm_int8_skip_modules,
        "dtype": config.model_weight_dtype,
    }


def _patterned(config: Config) -> bool:
    return bool(config.rank_pattern or config.alpha_pattern)


def _sizes(config: Config, modules: list[str]) -> dict[str, patterns.Sizes]:
    """Each module's rank and alpha."""
    rank, alpha = config.lora_rank or 1, config.lora_alpha or 1.0
    return {m: patterns.resolve(m, rank, alpha, config.rank_pattern, config.alpha_pattern) for m in modules}


def _factors(config: Config, modules: list[str]) -> dict[str, float]:
    """Each module's s over the s of lora_rank and lora_alpha."""
    return {
        module: scaling(config.model_copy(update={"lora_rank": rank, "lora_alpha": alpha})) / scaling(config)
        for module, (rank, alpha) in _sizes(config, modules).items()
    }


def _one_rank(config: Config, modules: list[str]) -> Config:
    """The configuration that describes what is saved: without patterns, the largest rank, and the same s."""
    rank = max(rank for rank, _ in _sizes(config, modules).values())
    alpha = scaling(config) * (math.sqrt(rank) if config.use_rslora else rank)
    return config.model_copy(update={"lora_rank": rank, "lora_alpha": alpha, "rank_pattern": {}, "alpha_pattern": {}})


def _family_of_peft(config: Config) -> Any:
    """The family's name in artifacts/peft_files, or None for one that is pairs of A and B."""
    if config.use_dora:
        return "dora"
    return config.adapter_type if config.adapter_type in ("ia3", "oft", "boft", "hra") else None


def _peft_settings(config: Config, targets: list[str]) -> dict[str, Any]:
    """The family's own keys of PEFT's config."""
    if config.use_dora:
        return {
            "r": config.lora_rank,
            "lora_alpha": config.lora_alpha,
            "lora_dropout": config.lora_dropout,
            "bias": "none",
            "use_rslora": config.use_rslora,
            "use_dora": True,
            "fan_in_fan_out": False,
            "init_lora_weights": True,
        }
    if config.adapter_type == "ia3":
        return {"feedforward_modules": feedforward(config, targets), "fan_in_fan_out": False}
    if config.adapter_type == "hra":
        return {"r": config.lora_rank, "apply_GS": False, "bias": "none"}
    if config.adapter_type == "boft":
        return {
            "boft_block_size": config.boft_block_size,
            "boft_block_num": 0,
            "boft_n_butterfly_factor": 1,
            "boft_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
        }
    return {
        "r": 0,
        "oft_block_size": config.oft_block_size,
        "module_dropout": 0.0,
        "bias": "none",
        "coft": False,
        "block_share": False,
        "use_cayley_neumann": True,
        "num_cayley_neumann_terms": 5,
        "fan_in_fan_out": False,
        "peft_version": "0.18.0",  # the first with this form of the series; PEFT warns without it
    }
