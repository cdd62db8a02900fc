"""Does the attention that a run asks for compute what transformers' plainest one does? Asked before a weight is read.

Takes the model's config and transformers' name of an attention; runs a tiny copy of the model's own class with it and with
'eager', forward and backward, on the device that the run would have. That the package or the class has it at all, `build` says.
UserError where it computes something else; a warning where it needs a GPU and there is none to try it on.
"""

from copy import deepcopy

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from pipeline.console import UserError, log, warn
from pipeline.model.structure.build import build
from pipeline.model.structure.parts import embedding_of_model, text_config
from pipeline.model.tiny_copy import NoCopyError, fill, tiny_copy, token_ids
from pipeline.model.unsupported import named

EAGER = "eager"
ON_ANY_DEVICE = (EAGER, "sdpa")  # the others are kernels for GPUs; torch's flex_attention has no backward on the CPU
ROUNDINGS = 4  # of every weight and product, that another attention may be off by
LEAST = 1e-5  # of what eager gives; a mask or a scale that is another's is off by percents


def check(config: PretrainedConfig, asked: str | None, dtype: torch.dtype) -> None:
    """Compare `asked`, in `dtype`, with eager attention; None is transformers' own choice, and not tried.

    How far it may be off is measured, too: by what one more rounding of every weight to `dtype` does to eager's logits and
    gradient, as a deep model amplifies it. UserError where it is off by more, or does not run.
    """
    if asked is None or asked == EAGER:
        return
    kind, on_gpu = config.model_type, torch.cuda.is_available()
    used = text_config(build(deepcopy(config), dtype, asked).config)._attn_implementation
    if used != asked:
        log(f"attention: transformers takes '{used}' for '{asked}' in model_type '{kind}'")
    if dtype == torch.float32 and "flash" in used:
        raise UserError(
            f"attn_implementation = '{asked}' computes in bfloat16 or float16, and model_weight_dtype is 'float32': change one "
            "of them"
        )
    if used not in ON_ANY_DEVICE and not on_gpu:
        warn(f"attn_implementation = '{asked}' needs a GPU, and there is none here to try it on")
        return
    try:
        whole, _ = tiny_copy(config)
    except NoCopyError as error:
        warn(f"attn_implementation = '{asked}': no tiny copy of the model can be run to try it out ({error})")
        return
    device = torch.device("cuda" if on_gpu else "cpu")
    right = _seen(whole.config, EAGER, torch.float32, device)
    rounded = _seen(whole.config, EAGER, dtype, device, moved=True)
    with named(kind, f"attention by '{asked}', tried on a tiny copy,"):
        found = _seen(whole.config, asked, dtype, device)
    for what, one, once, exact in zip(("logits", "gradient"), found, rounded, right, strict=True):
        if (off := _off(one, exact)) > max(LEAST, ROUNDINGS * _off(once, exact)):
            raise UserError(
                f"attn_implementation = '{asked}': on a tiny copy of model_type '{kind}' its {what} differ from eager "
                f"attention's by {off:.2g} of their size, where rounding makes {_off(once, exact):.1g}: set 'sdpa' or 'eager'"
            )


def check_device(asked: str | None, device: torch.device) -> None:
    """UserError for an attention that does not train on this device."""
    if device.type == "cpu" and asked is not None and asked not in ON_ANY_DEVICE:
        raise UserError(
            f"attn_implementation = '{asked}' trains on a GPU only, and this run is on the CPU: set 'sdpa' or 'eager'"
        )


def _seen(
    small: PretrainedConfig, attention: str, dtype: torch.dtype, device: torch.device, *, moved: bool = False
) -> tuple[Tensor, Tensor]:
    """Logits [T, V] and the gradient of the embedding's rows [T, D], fp32, of the copy of config `small`, its weights in
    `dtype`; `moved`: each by half its rounding or none, at random."""
    model = build(deepcopy(small), dtype, attention)
    fill(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if moved:
                up = torch.rand(parameter.shape, generator=generator) < 0.5
                parameter *= 1 + torch.finfo(dtype).eps * up
            parameter.data = parameter.data.to(dtype)
    model.tie_weights()
    return _run(model.to(device).eval(), token_ids().to(device))


def _run(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    rows = embedding_of_model(model).weight.requires_grad_()
    logits = model(input_ids=ids, use_cache=False).logits.float()
    weigh = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits.device)
    (logits * weigh).sum().backward()
    return logits.detach()[0], rows.grad[ids[0]].float()


def _off(found: Tensor, right: Tensor) -> float:
    """The difference as a share of what is right, in the median row: a router that chooses otherwise changes one token's."""
    share = (found - right).norm(dim=-1) / right.norm(dim=-1).clamp_min(1e-30)
    return float(share.median()) if bool(torch.isfinite(share).all()) else float("inf")
