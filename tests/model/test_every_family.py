"""Every causal language model of transformers whose tiny copy can be built: trained rightly, or refused by its name.

What `--check` accepts is saved by transformers, read into stages as a run reads it, given adapters as a run does, and
compared with the uncut model; what it refuses must be in the table of what cannot be had. Nothing ends in a traceback.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pipeline.artifacts.fold.merge import merge
from pipeline.config import loading
from pipeline.config.schema import Config
from pipeline.console import UserError
from pipeline.formats.stored_names import auto_class
from pipeline.model import tiny_copy
from pipeline.model.adapters.base import trainable, written
from pipeline.model.structure.build import logit_transform
from pipeline.training.stage import families
from pipeline.training.start import resolve
from tests.helpers.configs import small
from tests.helpers.stages import build

LAYERS = 6  # so that patterns of three and four layers repeat
# What a family's own defaults lack for a model that can be built.
COMPLETED: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 8, "moe_topk": 2},
    "ministral": {"head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"] * 2},
    "nemotron": {"num_key_value_heads": 8},
}
# Refused: on any number of stages, or on more than one, with what is said.
NEVER: dict[str, str] = {
    "gpt-sw3": "no linear module",
    "gpt2": "no linear module",
    "openai-gpt": "no linear module",
    "bart": "encoder_attn",  # decoders of a model with an encoder: what reads the encoder does not run
    "bigbird_pegasus": "encoder_attn",
    "blenderbot": "encoder_attn",
    "blenderbot-small": "encoder_attn",
    "marian": "encoder_attn",
    "mbart": "encoder_attn",
    "mvp": "encoder_attn",
    "pegasus": "encoder_attn",
    "plbart": "encoder_attn",
    "mllama": "transformers cannot build it",
    "dory": "linear output head",  # a learned scale for each token
    "emu3": "transformers cannot build it",
    "modernbert-decoder": "changes its logits in a way this program does not know",
    "inkling_text": "changes its logits in a way this program does not know",
}
NEVER_CUT: dict[str, str] = {
    "ctrl": "differ from the whole model's",
    "deepseek_v4": "cutting it into 2 stages",  # four streams go from layer to layer
    "gemma4": "'PassThrough' object has no attribute",
    "gemma4_text": "'PassThrough' object has no attribute",  # each layer is given something made of the token ids
    "hy_v4": "cutting it into 2 stages",
    "inkling2_loop_text": "cutting it into 2 stages",
    "inkling2_text": "cutting it into 2 stages",
    "zaya": "cutting it into 2 stages",  # a second tensor goes from layer to layer
}
# Parts of these names compute nothing for a short text, or for tokens that no router sends there.
IDLE = (".experts.", ".compressor.")
QUICK = (
    "llama",
    "nanochat",
    "bloom",
    "mamba",
    "zaya",
    "phimoe",
)


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
}
FAMILIES = [
    pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
]


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("kind", FAMILIES)
def test_accepted_and_right_or_refused_by_name(kind: str, adapter: str, tmp_path: Path) -> None:
    made = tiny(kind)
    if isinstance(made, str):
        pytest.skip(made[:200])
    whole, logits = made
    folder = tmp_path / "base"
    whole.save_pretrained(folder)
    refused = {stages: outcome(whole, logits, folder, stages, adapter) for stages in (1, 2)}
    print(kind, adapter, refused)
    for stages, said in refused.items():
        expected = NEVER.get(kind) or (NEVER_CUT.get(kind) if stages > 1 else None)
        assert (said is None) == (expected is None), said
        assert expected is None or (f"'{whole.config.model_type}'" in said and expected in said), said


def outcome(whole: PreTrainedModel, logits: Tensor, folder: Path, n_stages: int, adapter: str) -> str | None:
    """What `--check` refuses it with; None where it is trained, and rightly."""
    config = config_of(folder, n_stages, **ADAPTERS[adapter])
    try:
        plan = resolve.resolve(config)
    except UserError as error:
        return str(error)
    stages = [build(folder, first, end) for first, end in plan.ranges]
    for stage in stages:
        families.inject(stage, plan.trained.adapter)
    found = run(stages)
    # Most are equal to the bit. A mask that adds where transformers leaves out rounds otherwise: some tens of fp32's 2⁻²³.
    assert (found.detach() - logits).abs().max() <= 2**-18 * logits.abs().max()
    found.square().sum().backward()
    trained = {name: p for stage in stages for name, p in trainable(stage).items()}
    assert {name.rpartition(".")[0] for name in trained} == set(plan.trained.targets)
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in trained.values())
    untrained = [n for n, p in trained.items() if p.grad is None and not any(idle in n for idle in IDLE)]
    assert not untrained
    if (adapter, n_stages) == ("multiplicative_lora", 2):
        fold_equals_the_live_model(plan, stages, folder)
    return None


@torch.no_grad()
def fold_equals_the_live_model(plan: Any, stages: list[Any], folder: Path) -> None:
    """The adapter a step on, saved as a run saves it and folded: transformers' logits of the fold are the stages'."""
    tensors = {}
    before = run(stages)
    for stage in stages:
        for parameter in trainable(stage).values():
            if parameter.grad is not None:
                parameter -= 0.02 * parameter.grad / parameter.grad.abs().max().clamp_min(1e-30)
        tensors |= written(stage)
    live = run(stages)
    assert (live - before).abs().max() > 1e-3 * before.abs().max()
    (folder.parent / "adapter").mkdir()
    families.writer(plan.trained.adapter, plan.base)(folder.parent / "adapter", tensors)
    merge(folder, folder.parent / "adapter", folder.parent / "folded")
    config = AutoConfig.from_pretrained(folder.parent / "folded")
    theirs = auto_class(config).from_pretrained(folder.parent / "folded", dtype=torch.float32).eval()
    found = theirs(input_ids=tiny_copy.token_ids(), use_cache=False).logits
    # Deep random layers amplify rounding from token to token, and a router may choose otherwise in a late one: in most tokens
    # the fold is a hundred times nearer than what the adapter did.
    off, did = ((found - live).abs().amax(dim=-1).median(), (live - before).abs().amax(dim=-1).median())
    assert off <= max(1e-4 * float(live.abs().max()), 0.01 * float(did))


def run(stages: list[Any]) -> Tensor:
    ids = tiny_copy.token_ids()
    carried: Any = (ids, torch.arange(ids.shape[1]).expand_as(ids))
    for stage in stages:
        carried = stage(carried)
    return logit_transform(stages[-1].model.config).apply(stages[-1].head(carried))
