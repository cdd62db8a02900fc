"""Keys of qlora-pipe that are not built, or have no sound meaning here, each with the reason."""

from typing import Any

# Key → (values that ask for nothing and pass, what to say for the others).
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "load_in_4bit": ((False,), "never had an effect in qlora-pipe; 4-bit bases are not built yet"),
    "quantization": ((), "4-bit and 8-bit bases are not built yet"),
    "modules_to_save": (([],), "training further modules in full beside an adapter is not built yet"),
    "use_dora": ((False,), "DoRA is not built yet"),
    "scale_weight_norms": ((), "clamping adapter norms is not built yet; the norms are logged at every step"),
    "load_balancing_loss_coef": ((), "a router loss is not built (it was broken in qlora-pipe)"),
    "loss_type": (("cross_entropy_loss",), "only 'cross_entropy_loss' is built"),
    "focal_loss_gamma": ((0, 0.0), "focal losses are not built"),
    "offload_mlp_to_cpu": ((False, 0), "not built; use more stages or activation_checkpointing = 'unsloth'"),
    "rejected_sampling": ((False,), "preference training is not built yet"),
    "rejected_sampling_max_new_tokens": ((), "preference training is not built yet"),
    "rl": ((), "preference training is not built yet"),
    "sampling": ((), "preference training is not built yet"),
    "optimizer.kahan_sum": (
        (True,),
        "adamw_kahan always sums with compensation; use type = 'AdamW' for an optimizer without",
    ),
    "optimizer.use_loraplus": ((False,), "LoRA+ is not built yet"),
    "optimizer.loraplus_lr_ratio": ((), "LoRA+ is not built yet"),
}
