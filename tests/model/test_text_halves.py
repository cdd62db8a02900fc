"""The language model within a model for text and images: trained on stages, folded, and the rest of the model as it was."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from pipeline.artifacts.fold.merge import merge
from pipeline.commands.known_models import TEXT_HALF
from pipeline.console import UserError
from pipeline.formats.base_model import read_base
from pipeline.formats.safetensors import read_tensor
from pipeline.formats.stored_names import auto_class
from pipeline.model import tiny_copy
from pipeline.model.adapters.base import trainable, written
from pipeline.model.stage import empty_model, read_model_config
from pipeline.training.stage import families
from pipeline.training.start import resolve
from tests.helpers.stages import build
from tests.helpers.what_works import note
from tests.model.test_every_family import ROUNDINGS, config_of, one_rounding, run

LAYERS = 4
KINDS = (
    "gemma3",
    "gemma4",
    "mistral3",
    "qwen2_5_vl",
    "qwen3_vl",
    "llava",
    "internvl",
    "llama4",
    "cohere2_vision",
    "aya_vision",
    "smolvlm",
    "idefics3",
    "got_ocr2",
    "lfm2_vl",
)
QUICK = ("llava",)
# Sizes of single layers go by the number of layers.
COMPLETED: dict[str, dict[str, Any]] = {
    "gemma4": {
        "text_config": {"num_hidden_layers": LAYERS, "layer_types": ["sliding_attention", "full_attention"] * 2},
        "vision_config": {"model_type": "gemma4_vision"},
    }
}
UNSCALED = ("aya_vision", "cohere2_vision")  # transformers' model leaves out logit_scale, by which the text half goes


def small_config(kind: str) -> Any:
    """A family's own sizes made small, the parts for images too, of one layer."""
    config = AutoConfig.for_model(kind, **COMPLETED.get(kind, {}))
    text = config.get_text_config(decoder=True)
    text.num_hidden_layers = LAYERS
    for name in ("layer_types", "no_rope_layers"):
        if getattr(text, name, None) is not None:
            setattr(text, name, getattr(text, name)[:LAYERS])
    for name in ("num_hidden_layers", "depth", "num_layers"):
        if hasattr(config.vision_config, name):
            setattr(config.vision_config, name, 1)
    if hasattr(config.vision_config, "fullatt_block_indexes"):
        config.vision_config.fullatt_block_indexes = [0]
    if hasattr(config.vision_config, "deepstack_visual_indexes"):
        config.vision_config.deepstack_visual_indexes = [0]
    return tiny_copy.shrunk(config, ("hidden", "heads", "widths", "experts"))


@torch.no_grad()
def saved(kind: str, folder: Path) -> None:
    """A random model, the part for images included, as transformers saves it."""
    config = small_config(kind)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        parameter += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(folder)


@torch.no_grad()
def logits_of(folder: Path) -> tuple[Tensor, Tensor]:
    """[1, T, V] of the model in `folder`, with what its config says of the text half's; and what rounding changes of them."""
    config = AutoConfig.from_pretrained(folder)
    model = auto_class(config).from_pretrained(folder, dtype=torch.float32).eval()
    scale = config.text_config.logit_scale if config.model_type in UNSCALED else 1.0
    logits = model(input_ids=tiny_copy.token_ids(), use_cache=False).logits * scale
    return logits, one_rounding(model, logits, scale)


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k in QUICK else pytest.mark.slow) for k in KINDS])
def test_trained_folded_and_the_rest_as_it_was(kind: str, tmp_path: Path, record_property: Callable[..., None]) -> None:
    base, adapter, folded = tmp_path / "base", tmp_path / "adapter", tmp_path / "folded"
    saved(kind, base)
    (right, _), off = logits_of(base), 0.0
    for n_stages in (3, 2):
        plan = resolve.resolve(config_of(base, n_stages, target_modules="all-linear"))
        stages = [build(base, first, end) for first, end in plan.ranges]
        names = {name for stage in stages for name, _ in stage.model.named_parameters()}
        assert not [name for name in names if "vision" in name or "visual" in name or "projector" in name]
        for stage in stages:
            families.inject(stage, plan.trained.adapter)
        logits = run(stages)
        off = max(off, float((logits.detach() - right).abs().max() / right.abs().max()))
        assert off <= 2**-18
    logits.square().mean().backward()
    tensors = {}
    with torch.no_grad():
        for stage in stages:
            for parameter in trainable(stage).values():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad / parameter.grad.abs().max().clamp_min(1e-30)
            tensors |= written(stage)
        live = run(stages)
    assert (live - right).abs().max() > 1e-3 * right.abs().max()
    adapter.mkdir()
    families.writer(plan.trained.adapter, plan.base)(adapter, tensors)
    merge(base, adapter, folded)
    found, once = logits_of(folded)
    assert (found - live).abs().amax(dim=-1).median() <= ROUNDINGS * once
    fold = float((found - live).abs().amax(dim=-1).median() / live.abs().max())
    before, after = read_base(base).tensors, read_base(folded).tensors
    assert before.keys() == after.keys()
    of_images = [name for name in before if "vision" in name or "visual" in name]
    assert of_images
    assert all(torch.equal(read_tensor(before[name]), read_tensor(after[name])) for name in of_images)
    note(record_property, f"{kind}{TEXT_HALF}", "stages", True, f"{off:.0e}" if off else "0")
    note(record_property, f"{kind}{TEXT_HALF}", "multiplicative_lora", True)
    note(record_property, f"{kind}{TEXT_HALF}", "fold", True, f"{fold:.0e}")


def test_the_whole_model_of_text_and_images_is_not_trained_in_full(tmp_path: Path) -> None:
    saved("gemma3", tmp_path)
    adapterless = dict.fromkeys(("adapter_type", "target_modules", "lora_rank", "lora_alpha"))
    raw = config_of(tmp_path, 1, full_fine_tune=True, **adapterless)
    with pytest.raises(UserError, match=r"full_fine_tune.*text half"):
        resolve.resolve(raw)


def test_a_text_half_has_no_weights_of_images(tmp_path: Path) -> None:
    small_config("gemma3").save_pretrained(tmp_path)
    model = empty_model(read_model_config(str(tmp_path)), torch.bfloat16, None)
    assert {name.split(".")[1] for name, _ in model.named_parameters() if name.startswith("model.")} == {
        "language_model"
    }
