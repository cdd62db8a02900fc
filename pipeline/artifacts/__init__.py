"""What a run leaves behind and what becomes of it: adapter files, and the fold into a base model.

Takes folders of safetensors; gives folders of safetensors. Needs torch and the standard library: neither
DeepSpeed nor transformers nor PEFT is imported here. In the order in which a fold walks through it:

    adapter/adapter       what an adapter is: its tensors, configuration and norms
    adapter/write         writing one
    adapter/full          weights that were trained in full beside an adapter: written among its tensors, and read
    adapter/maps          what the families that are no pairs do to a weight, row by row, and what undoes it
    adapter/family_maps   DoRA, IA3, OFT, BOFT and HRA as such maps
    adapter/keys          which keys of a configuration change what an adapter computes
    adapter/schema        the types that an adapter's files must have
    adapter/read          reading ours, PEFT's, and the founding method's hacked LoRA
    adapter/stored_form   an adapter by its base's own names: renamed, transposed, several weights in one tensor
    fold/ties             a head and an embedding that are one tensor, and adapters that change them apart
    fold/match            exact matching of adapter and base, in both directions, or a refusal
    fold/inverse          the inverse of an adapter, where there is one and rounding leaves it
    fold/config           the model's config after a fold
    fold/plan             which steps change which tensor, in which order
    fold_history          what was folded into the base before, by its fold report
    fold/warnings         warnings about a fold that is possible but suspicious
    fold/rows             the arithmetic, a block of rows at a time, and what survived rounding
    fold/reference        rows of the result in fp64, by a path of their own, and how far fp32 may be from them
    fold/check            the written result, read again and compared with these
    fold/report           the plan and the result as text
    fold/merge            the fold itself
    export/               the additive form of an adapter, for the programs that serve it
    saved_at              the step at which a folder of a run was saved
"""
