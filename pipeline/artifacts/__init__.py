"""What a run leaves behind and what becomes of it: adapter files, and the fold into a base model.

Takes folders of safetensors; gives folders of safetensors. Needs torch and the standard library: neither
DeepSpeed nor transformers nor PEFT is imported here. In the order in which a fold walks through it:

    safetensors_stream   headers without data; reading and writing tensors piece by piece
    whole_folder         an output folder that appears whole or not at all
    adapter_files        what an adapter is, in memory and on disk; writing one
    adapter_reading      reading ours, PEFT's LoRA and PEANuT, and the founding method's hacked LoRA
    base_files           a base model's folder: its tensors, its config, and what else to copy
    nf4                  weights as 4-bit training sees them
    fold_match           exact matching of adapter and base, in both directions, or a refusal
    fold_inverse         the inverse of a multiplicative adapter, where rounding leaves one
    fold_plan            which steps change which tensor, in which order
    fold_doubts          what speaks against a fold that can be done
    fold_rows            the arithmetic, a block of rows at a time, and what survived rounding
    fold_check           the written result, read again and recomputed in fp64
    fold_report          the plan and the result as text
    merge                the fold itself
"""
