"""Files as they lie on disk, ours and other people's: what is in them and where, before anything is computed.

Takes paths; gives headers, configurations and bytes in pieces, or one UserError with the file and the reason.

    safetensors   headers without data; reading and writing tensors piece by piece
    base_model    a base model's folder: its tensors, its config, whether head and embedding are one, what else belongs to it
    hub           a model named as on the Hub: downloaded, or taken from the cache
    stored_names  what a folder calls the weights that transformers runs under other names
    fingerprint   which model a folder holds, told by a few of its values
    links         where links in such a folder may lead
"""
