"""What a run leaves behind and what becomes of it: adapter files, and the fold into a base model.

Takes folders of safetensors; gives folders of safetensors. Needs torch and the standard library: neither
DeepSpeed nor transformers nor PEFT is imported here. In the order in which a fold walks through it:

    adapter_files        what an adapter is, in memory and on disk; writing one
    full_tensors         what an adapter's files say of weights that were trained in full beside it
    weight_maps          what the families that are no pairs do to a weight, row by row, and what undoes it
    family_maps          DoRA, IA3, OFT, BOFT and HRA as such maps
    adapter_configs      which keys of a configuration change what an adapter computes
    full_reading         weights that were trained in full, among an adapter's tensors
    adapter_reading      reading ours, PEFT's, and the founding method's hacked LoRA
    nf4                  weights as 4-bit training sees them
    stored_form          an adapter by its base's own names: renamed, transposed, several weights in one tensor
    fold_ties            a head and an embedding that are one tensor, and adapters that change them apart
    fold_match           exact matching of adapter and base, in both directions, or a refusal
    fold_inverse         the inverse of an adapter, where there is one and rounding leaves it
    fold_config          the model's config after a fold
    fold_plan            which steps change which tensor, in which order
    fold_history         what was folded into the base before, by its fold report
    fold_doubts          what speaks against a fold that can be done
    fold_rows            the arithmetic, a block of rows at a time, and what survived rounding
    fold_reference       rows of the result in fp64, by a path of their own, and how far fp32 may be from them
    fold_check           the written result, read again and compared with these
    fold_report          the plan and the result as text
    merge                the fold itself
"""
