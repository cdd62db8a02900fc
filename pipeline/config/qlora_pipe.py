"""Keys of qlora-pipe that are not built or have no sound meaning here, each with the reason, and what others of its keys mean here."""

from typing import Any

# Key → (values that ask for nothing and pass, what to say for the others).
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "load_in_4bit": ((False,), "never had an effect in qlora-pipe; [quantization.bnb] load_in_4bit = true quantises"),
    "quantization.hqq": ((), "HQQ is not built; use [quantization.bnb]"),
    "quantization.bnb.bnb_4bit_quant_storage": (("uint8",), "only FSDP needs another storage than 'uint8'"),
    "quantization.bnb.llm_int8_has_fp16_weight": ((False,), "16-bit weights beside the 8-bit ones would save nothing"),
    "quantization.bnb.llm_int8_enable_fp32_cpu_offload": ((False,), "no part of a stage is kept off its device"),
    "modules_to_save": (([],), "modules trained in full beside the adapter are named in trainable_modules"),
    "loss_type": (("cross_entropy_loss",), "only 'cross_entropy_loss' is built"),
    "focal_loss_gamma": ((0, 0.0), "focal losses are not built"),
    "offload_mlp_to_cpu": ((False, 0), "not built; use more stages or activation_checkpointing = 'unsloth'"),
    "optimizer.kahan_sum": (
        (True,),
        "adamw_kahan always sums with compensation; use type = 'AdamW' for an optimizer without",
    ),
}


def with_rejected_sampling(raw: dict[str, Any]) -> dict[str, Any]:
    """`raw` with what rejected_sampling and its number of tokens mean in this project's keys, where those say nothing else."""
    found = dict(raw)
    datasets = raw.get("datasets")
    if raw.get("rejected_sampling") is True and isinstance(datasets, list):
        found["datasets"] = [
            {"rejected": "generate", **one}
            if isinstance(one, dict) and one.get("dataset_type") == "preference"
            else one
            for one in datasets
        ]
    most, sampling = raw.get("rejected_sampling_max_new_tokens"), raw.get("sampling") or {}
    if most is not None and isinstance(sampling, dict):
        found["sampling"] = {"max_new_tokens": most, **sampling}
    return found
