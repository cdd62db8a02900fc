"""Attention by other names: what is refused before anything is read, and that another result than eager's is seen."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pipeline.config import loading
from pipeline.console import UserError
from pipeline.model.trial import attention_check
from pipeline.training.start import resolve
from tests.helpers.builders import model_config, save_model
from tests.helpers.configs import small

FP32 = torch.float32


@pytest.mark.parametrize(
    ("kind", "asked"), [("llama", "sdpa"), ("granite", "sdpa"), ("llama", "eager"), ("llama", None)]
)
def test_what_computes_the_same_passes(kind: str, asked: str | None) -> None:
    attention_check.check(model_config(kind, layers=2), asked, FP32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_attention_that_computes_something_else_is_refused(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scale that is half as large again, as a kernel for other heads might have; and one that is right passes."""

    def off(module: nn.Module, query: Tensor, *given: Any, scaling: float = 1.0, **named: Any) -> Any:
        return sdpa_attention_forward(module, query, *given, scaling=factor * scaling, **named)

    AttentionInterface.register("by_another", off)
    AttentionMaskInterface.register("by_another", sdpa_mask)
    monkeypatch.setattr(attention_check, "ON_ANY_DEVICE", ("eager", "by_another"))
    factor = 1.0
    attention_check.check(model_config("llama", layers=2), "by_another", dtype)
    factor = 1.5
    with pytest.raises(
        UserError, match=r"attn_implementation = 'by_another': on a tiny copy of model_type 'llama' its logits"
    ):
        attention_check.check(model_config("llama", layers=2), "by_another", dtype)


@pytest.mark.parametrize(
    ("kind", "asked", "why"),
    [
        ("llama", "flash_attention_2", "the package for FlashAttention2"),
        ("llama", "flash_attention_3", "[Ff]lash.?[Aa]ttention.?3"),
        ("llama", "kernels-community/flash-attn2", "kernels"),
        ("llama", "flash", "'?flash'?.* is not supported"),
        ("gemma2", "sdpa", "scaled_dot_product_attention yet; install"),  # its class has none
    ],
)
def test_what_is_missing_is_one_error(kind: str, asked: str, why: str, tmp_path: Path) -> None:
    """From `--check`, with the key first and exit code 2."""
    save_model(tmp_path / "base", kind)
    raw = small(model=str(tmp_path / "base"), attn_implementation=asked, pipeline_stages=1)
    with pytest.raises(
        UserError, match=rf"attn_implementation = '{asked}': model_type '{kind}' cannot have it.*{why}"
    ) as caught:
        resolve.resolve(loading.validate(raw, "x.toml"))
    assert caught.value.exit_code == 2


def test_what_needs_a_gpu_is_not_tried_without_one_and_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    attention_check.check(model_config("llama", layers=2), "flex_attention", FP32)
    assert "needs a GPU, and there is none here to try it on" in capsys.readouterr().err
    attention_check.check_device("flex_attention", torch.device("cuda"))
    attention_check.check_device(None, torch.device("cpu"))
    with pytest.raises(UserError, match="'flex_attention' trains on a GPU only"):
        attention_check.check_device("flex_attention", torch.device("cpu"))


def test_flash_attention_in_fp32_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    built = SimpleNamespace(
        config=SimpleNamespace(
            get_text_config=lambda decoder: SimpleNamespace(_attn_implementation="flash_attention_2")
        )
    )
    monkeypatch.setattr(attention_check, "build", lambda *_: built)
    with pytest.raises(UserError, match="computes in bfloat16 or float16, and model_weight_dtype is 'float32'"):
        attention_check.check(model_config("llama", layers=2), "flash_attention_2", FP32)
