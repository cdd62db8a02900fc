"""Every causal language model of transformers whose tiny copy can be built: trained rightly, or refused by its name.

What `--check` accepts is saved by transformers, read into stages as a run reads it, given adapters as a run does, and
compared with the uncut model; what it refuses must be in the table of what cannot be had. Nothing ends in a traceback.
What came out is noted for docs/models.md (`python -m docs.models` says how).
"""

from collections.abc import Callable
from copy import deepcopy
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pipeline.artifacts.fold.merge import merge
from pipeline.config import loading
from pipeline.config.schema import Config
from pipeline.console import UserError
from pipeline.formats.base_model import read_base
from pipeline.formats.stored_names import auto_class
from pipeline.model import tiny_copy, weights
from pipeline.model.adapters import experts
from pipeline.model.adapters.base import trainable, written
from pipeline.model.fusion import apply as fusion
from pipeline.model.stage import Stage
from pipeline.model.structure.build import logit_transform
from pipeline.training.stage import families, parts
from pipeline.training.start import resolve
from tests.helpers.configs import small
from tests.helpers.stages import CPU, build
from tests.helpers.what_works import note

LAYERS = 6  # so that patterns of three and four layers repeat
# What a family's own defaults lack for a model that can be built.
COMPLETED: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 8, "moe_topk": 2},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.95] * 3 + [0.0] * 3,
        "intermediate_size": 64,
    },
    "ministral": {"head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"] * 2},
    "nemotron": {"num_key_value_heads": 8},
}
# Refused: on any number of stages, or on more than one, with what is said.
NEVER: dict[str, str] = {
    "bart": "encoder_attn",  # decoders of a model with an encoder: what reads the encoder does not run
    "bigbird_pegasus": "encoder_attn",
    "blenderbot": "encoder_attn",
    "blenderbot-small": "encoder_attn",
    "marian": "encoder_attn",
    "mbart": "encoder_attn",
    "mvp": "encoder_attn",
    "pegasus": "encoder_attn",
    "plbart": "encoder_attn",
    "trocr": "encoder_attn",
    "whisper": "encoder_attn",
    "mllama": "transformers cannot build it",
    "dory": "linear output head",  # a learned scale for each token
    "emu3": "transformers cannot build it",
    "modernbert-decoder": "changes its logits in a way this program does not know",
    "inkling_text": "changes its logits in a way this program does not know",
}
NEVER_CUT: dict[str, str] = {
    "ctrl": "differ from the whole model's",
    "hy_v4": "a second tensor",
    "xlnet": "cutting it into",
    "zaya": "a second tensor",
}
UNFOLDED: dict[str, str] = {  # trained, and not folded, with what is said
    "inkling2_loop_text": "which is no weight's name",
    "inkling2_text": "which is no weight's name",
}
EXPERTS_UNFOLDED: dict[str, str] = {"inkling2_loop_text": "in a form that no fold can change"}
# Parts of these names compute nothing for a short text, or for tokens that no router sends there.
IDLE = (".experts.", ".compressor.")
ROUNDINGS, DRAWS = 2, 4  # of every weight, that a fold may be off by: see fold_against_the_live_model
QUICK = ("llama", "bloom", "zaya", "phimoe")


@lru_cache(maxsize=1)
def tiny(kind: str) -> tuple[PreTrainedModel, Tensor] | str:
    """The model and its logits, or why there is none."""
    try:
        config = AutoConfig.for_model(kind, **{"num_hidden_layers": LAYERS, **COMPLETED.get(kind, {})})
        return tiny_copy.tiny_copy(config)
    except Exception as error:
        return str(error)


def config_of(folder: Path, stages: int, **changes: Any) -> Config:
    raw = {
        "model": str(folder),
        "pipeline_stages": stages,
        "model_weight_dtype": "float32",
        "layers_to_transform": None,
        **changes,
    }
    return loading.validate({k: v for k, v in small(**raw).items() if v is not None}, "x.toml")


ADAPTERS: dict[str, dict[str, Any]] = {
    "multiplicative_lora": {"target_modules": "all-linear"},
    "lora": {"adapter_type": "lora", "target_modules": "all-linear"},
    "experts": {"target_modules": ["experts"]},
}
FOLDED = ("multiplicative_lora", "experts")


def cases() -> list[Any]:
    """All families with each part, family by family, as one model serves all parts; those that are not quick are marked slow."""
    quick = {(kind, adapter) for kind in QUICK for adapter in ("multiplicative_lora", "lora")} | {("llama", "kernels")}
    every = [(kind, part) for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES for part in PARTS]
    return [pytest.param(*case, marks=() if case in quick else pytest.mark.slow) for case in every]


class Seen(NamedTuple):
    """What a family did on so many stages: it was refused, or was off by so much of the largest logit, and so was its fold."""

    refused: str | None
    off: float = 0.0
    folded: float | None = None


def accepted_and_right_or_refused_by_name(
    kind: str, tmp_path: Path, record_property: Callable[..., None], adapter: str
) -> None:
    whole, logits = tiny_or_skipped(kind, record_property)
    if adapter == "experts" and (not experts.has_experts(whole) or not experts.find(whole.config)):
        note(record_property, kind, "experts", None)
        pytest.skip("no experts that write together")
    folder = tmp_path / "base"
    whole.save_pretrained(folder)
    cuts = (1, 2, 3) if adapter == "multiplicative_lora" else (1,) if kind in NEVER_CUT else (2,)
    seen = {stages: outcome(whole, logits, folder, stages, adapter, fold=stages == folded_on(kind)) for stages in cuts}
    for stages, (said, *_) in seen.items():
        expected = NEVER.get(kind) or (NEVER_CUT.get(kind) if stages > 1 else None)
        assert (said is None) == (expected is None), said
        assert expected is None or (f"'{whole.config.model_type}'" in said and expected in said), said
    note_adapters(record_property, kind, adapter, seen)


def folded_on(kind: str) -> int:
    """The number of stages on which a family's fold is tried out."""
    return 1 if kind in NEVER_CUT else 2


def note_adapters(record_property: Callable[..., None], kind: str, adapter: str, seen: dict[int, Seen]) -> None:
    """The stages, the adapter and the fold, as docs/models.md has them."""
    refused = next((one.refused for one in seen.values() if one.refused), None)
    runs = any(one.refused is None for one in seen.values())
    note(record_property, kind, adapter, runs, "" if runs else refused)
    if adapter == "multiplicative_lora":
        off = max(one.off for one in seen.values())
        note(record_property, kind, "stages", not refused, refused or (f"{off:.0e}" if off else "0"))
    for one in seen.values():
        if one.folded is not None and adapter == "multiplicative_lora":
            note(record_property, kind, "fold", True, f"{one.folded:.0e}")
    if kind in UNFOLDED and adapter == "multiplicative_lora":
        note(record_property, kind, "fold", False, f"the folder stores a weight under a name {UNFOLDED[kind]}")


def tiny_or_skipped(kind: str, record_property: Callable[..., None]) -> tuple[PreTrainedModel, Tensor]:
    made = tiny(kind)
    if isinstance(made, str):
        note(record_property, kind, "untried", False, made)
        pytest.skip(made[:200])
    return made


def outcome(whole: PreTrainedModel, logits: Tensor, folder: Path, n_stages: int, adapter: str, *, fold: bool) -> Seen:
    """What `--check` refuses it with; or that it is trained, and rightly."""
    config = config_of(folder, n_stages, **ADAPTERS[adapter])
    try:
        plan = resolve.resolve(config)
    except UserError as error:
        return Seen(str(error))
    stages = [build(folder, first, end) for first, end in plan.ranges]
    for stage in stages:
        families.inject(stage, plan.trained.adapter)
    found = run(stages)
    # Most are equal to the bit. A mask that adds where transformers leaves out rounds otherwise: some tens of fp32's 2⁻²³.
    off = float((found.detach() - logits).abs().max() / logits.abs().max())
    assert off <= 2**-18
    found.square().sum().backward()
    trained = {name: p for stage in stages for name, p in trainable(stage).items()}
    assert {name.rpartition(".")[0] for name in trained} == set(plan.trained.targets)
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in trained.values())
    untrained = [n for n, p in trained.items() if p.grad is None and not any(idle in n for idle in IDLE)]
    assert not untrained
    why = (EXPERTS_UNFOLDED if adapter == "experts" else UNFOLDED).get(whole.config.model_type)
    folded = fold_against_the_live_model(plan, stages, folder, why) if fold and adapter in FOLDED else None
    return Seen(None, off, folded)


@torch.no_grad()
def fold_against_the_live_model(plan: Any, stages: list[Any], folder: Path, why: str | None) -> float | None:
    """The adapter a step on, saved as a run saves it and folded: transformers' logits of the fold are the stages'.

    How far they may be off is what rounding the weights once does to them, found by trying: deep random layers amplify it from
    token to token, and a router may choose otherwise in a late one, so it is the median of the tokens that counts. The fold
    rounds each weight that it changes to nearest: by u·|W| at most, u = 2⁻²⁴, and u·|W|/√3 in the mean of squares. Beside it
    each weight of the folded model is moved by 2u·|W| or not at all, by chance: √2·u·|W| in the mean of squares, √6 times that.
    Products are rounded otherwise in both, once each. So the fold may be off by as much as the most of DRAWS such moves, and, as
    it is one draw itself, by ROUNDINGS = 2 times as much. `why`: the fold is refused, with these words.
    Gives by how much of the largest logit it was off; None where it is refused.
    """
    tensors = {}
    before = run(stages)
    for stage in stages:
        for parameter in trainable(stage).values():
            if parameter.grad is not None:
                parameter -= 0.02 * parameter.grad / parameter.grad.abs().max().clamp_min(1e-30)
        tensors |= written(stage)
    live = run(stages)
    assert (live - before).abs().max() > 2**-12 * before.abs().max()
    (folder.parent / "adapter").mkdir()
    families.writer(plan.trained.adapter, plan.base)(folder.parent / "adapter", tensors)
    if why:
        with pytest.raises(UserError, match=why):
            merge(folder, folder.parent / "adapter", folder.parent / "folded")
        return None
    merge(folder, folder.parent / "adapter", folder.parent / "folded")
    config = AutoConfig.from_pretrained(folder.parent / "folded")
    theirs = auto_class(config).from_pretrained(folder.parent / "folded", dtype=torch.float32).eval()
    ids = tiny_copy.token_ids()
    found = theirs(input_ids=ids, use_cache=False).logits
    off, once = (found - live).abs().amax(dim=-1).median(), one_rounding(theirs, found)
    did = (live - before).abs().amax(dim=-1).median()
    print(f"fold: off {float(off):.2g}, one rounding {float(once):.2g}, the adapter {float(did):.2g}")
    print(f"FOLDRATIO {float(off / once):.3f}")
    if off > ROUNDINGS * once and not reads_as_saved(folder, before):
        off = (run([build(folder.parent / "folded", 0, plan.ranges[-1][1])]) - live).abs().amax(dim=-1).median()
    assert off <= ROUNDINGS * once, f"{float(off / once):.2f} roundings"
    assert once < 0.01 * did
    return float(off / live.abs().max())


def one_rounding(model: Any, logits: Tensor, scale: float = 1.0) -> Tensor:
    """By how much the most of DRAWS moves changes a median token's `logits`. `scale`: of the model's own to these."""
    return torch.stack(
        [(logits - scale * moved(model, seed)).abs().amax(dim=-1).median() for seed in range(DRAWS)]
    ).max()


@torch.no_grad()
def moved(model: Any, seed: int) -> Tensor:
    """The logits with every second weight, by chance, moved by 2⁻²³ of it; the model stays as it was."""
    generator = torch.Generator().manual_seed(seed)
    there = [parameter.clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter *= 1 + 2**-23 * (torch.rand(parameter.shape, generator=generator) < 0.5)
    logits = model(input_ids=tiny_copy.token_ids(), use_cache=False).logits
    for parameter, was in zip(model.parameters(), there, strict=True):
        parameter.copy_(was)
    return logits  # type: ignore[no-any-return]


def reads_as_saved(folder: Path, logits: Tensor) -> bool:
    """Whether transformers computes with what it saved in `folder` what it did before (zaya, in 5.24, does not)."""
    model = auto_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder, dtype=torch.float32).eval()
    found = model(input_ids=tiny_copy.token_ids(), use_cache=False).logits
    return bool((found - logits).abs().amax(dim=-1).median() <= 1e-3 * logits.abs().max())


def kernels_compute_what_the_model_does(kind: str, tmp_path: Path, record_property: Callable[..., None]) -> None:
    """All kernels, over adapters of all linear modules a step on: the logits and the gradients without them."""
    whole, _ = tiny_or_skipped(kind, record_property)
    if kind in NEVER:
        pytest.skip(NEVER[kind])
    whole.save_pretrained(tmp_path)
    plan = resolve.resolve(config_of(tmp_path, 1, target_modules="all-linear"))
    made, taken = [], {}
    for kernels in (frozenset(), frozenset(fusion.KERNELS)):
        stage = build(tmp_path, *plan.ranges[0])
        families.inject(stage, plan.trained.adapter)
        randomise_b(stage)
        taken = fusion.apply(stage, kernels)
        logits = run([stage])
        logits.square().sum().backward()
        made.append((logits.detach(), {n: p.grad for n, p in trainable(stage).items() if p.grad is not None}))
    (right, expected), (found, gradients) = made
    assert (found - right).abs().amax(dim=-1).median() <= 2**-15 * right.abs().max()
    assert gradients.keys() == expected.keys()
    off = sum(float((gradients[n] - g).square().sum()) for n, g in expected.items()) ** 0.5
    assert off <= 1e-3 * sum(float(g.square().sum()) for g in expected.values()) ** 0.5
    note(record_property, kind, "kernels", bool(taken) or None, ", ".join(sorted(taken)))


@torch.no_grad()
def randomise_b(stage: Stage) -> None:
    generator = torch.Generator().manual_seed(2)
    for name, parameter in trainable(stage).items():
        if name.endswith(".B"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)


def a_base_in_4_bits(kind: str, tmp_path: Path, record_property: Callable[..., None]) -> None:
    """What transformers' model computes with the weights that the packed ones stand for; and it trains."""
    from tests.helpers.quantization import dequantise_into  # bitsandbytes takes seconds to import

    whole, _ = tiny_or_skipped(kind, record_property)
    if kind in NEVER:
        pytest.skip(NEVER[kind])
    whole.save_pretrained(tmp_path)
    four = {"bnb": {"load_in_4bit": True}}
    try:
        plan = resolve.resolve(config_of(tmp_path, 1, target_modules="all-linear", quantization=four))
        weights.check_complete(plan.meta_model.shared, read_base(tmp_path, "model"))
    except UserError as error:
        note(record_property, kind, "4 bits", False, str(error))
        assert f"'{whole.config.model_type}'" in str(error)
        return
    stage = Stage(plan.meta_model.make(), *plan.ranges[0])
    parts.put_quantised(stage, plan.base.scheme)
    weights.load(stage, plan.base.folder, plan.base.dtype, CPU)
    theirs = dequantise_into(deepcopy(whole), [stage.eval()])
    with torch.no_grad():
        right = theirs(input_ids=tiny_copy.token_ids(), use_cache=False).logits
    families.inject(stage, plan.trained.adapter)
    found = run([stage])
    assert (found - right).abs().amax(dim=-1).median() <= 2**-15 * right.abs().max()
    found.square().sum().backward()
    gradients = [p.grad for p in trainable(stage).values() if p.grad is not None]
    assert gradients
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    note(record_property, kind, "4 bits", True)


def run(stages: list[Any]) -> Tensor:
    ids = tiny_copy.token_ids()
    carried: Any = (ids, torch.arange(ids.shape[1]).expand_as(ids))
    for stage in stages:
        carried = stage(carried)
    return logit_transform(stages[-1].model.config).apply(stages[-1].head(carried))


PARTS: dict[str, Callable[..., None]] = {
    **{name: partial(accepted_and_right_or_refused_by_name, adapter=name) for name in ADAPTERS},
    "kernels": kernels_compute_what_the_model_does,
    "4 bits": a_base_in_4_bits,
}


@pytest.mark.parametrize(("kind", "part"), cases())
def test_trained_rightly_or_refused(kind: str, part: str, tmp_path: Path, record_property: Callable[..., None]) -> None:
    PARTS[part](kind, tmp_path, record_property)
