"""What qlora-pipe's files say otherwise: its keys that are not built, each with the reason, and datasets by axolotl's YAML.

A table with dataset_type = 'axolotl' names a YAML file of axolotl's; what that says becomes tables of ours before anything is
validated, so that nothing else knows of it.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.console import UserError
from pipeline.foreign import printable, yaml_object

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

TYPE = "axolotl"
LIMIT_BYTES = 1_000_000  # of a file of axolotl's
_HUB = re.compile(r"[\w.-]+/[\w.-]+")
# Keys of the whole file beside `datasets` → values with which they ask for nothing that is not so here (None: any).
_BESIDE: dict[str, tuple[Any, ...] | None] = {
    "chat_template": None,
    "chat_template_jinja": None,
    "val_set_size": None,
    "sequence_len": None,  # qlora-pipe takes the table's
    "dataset_prepared_path": None,
    "dataset_processes": None,
    "shuffle_merged_datasets": None,
    "train_on_inputs": (False,),
}
# Keys of a dataset that are read, and those that may stand there with such a value.
_SOURCE = ("path", "data_files", "ds_type", "split", "name", "revision", "type")
_READ = {
    "doclist": ("field",),
    "chat": (
        "field_messages",
        "field_tools",
        "message_property_mappings",
        "message_field_role",
        "message_field_content",
        "roles",
        "chat_template",
        "chat_template_jinja",
        "train_on_eos",
    ),
    "completion": (),
    "pretokenized": (),
}
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "trust_remote_code": (False,),
    "drop_system_message": (False,),
    "split_thinking": (False,),
    "field_thinking": ("reasoning_content", "thinking", "reasoning"),
    "message_field_training": ("train", "weight"),
    "roles_to_train": (["assistant"], ["gpt"], ["gpt", "assistant"], ["assistant", "gpt"]),
    "shards": (1,),
}
_TYPES = {"completion": "doclist", "chat_template": "chat", "alpaca": "completion", "": "pretokenized"}
_TEMPLATES = ("chatml", "llama3", "gemma", "alpaca")  # by name as well as here
_ALPACA = (
    "type: alpaca: instruction and input are one turn of the built-in template 'alpaca', without the sentence that axolotl writes "
    "before it"
)


class Expanded(NamedTuple):
    """What a table of qlora-pipe's dataset_type = 'axolotl' stands for: tables of ours; or why not. `notes`: to warn with."""

    tables: list[dict[str, Any]]
    problems: list[str]
    notes: list[str]


def expanded(table: dict[str, Any], where: str) -> Expanded:
    """The datasets that axolotl's YAML file at `dataset_path` names, each with the table's other keys.

    `where`: the table, with which problems begin (`datasets.0`). What has no counterpart here is a problem, by its name.
    """
    file = table.get("dataset_path")
    try:
        if not isinstance(file, str):
            raise UserError("not given; it is the YAML file with axolotl's datasets")
        path = Path(file).expanduser()
        content = yaml_object(path, "axolotl's datasets", LIMIT_BYTES)
        sets = content.get("datasets")
        if not isinstance(sets, list) or not sets or not all(isinstance(one, dict) for one in sets):
            raise UserError(f"{printable(path)}: has no list of datasets")
    except UserError as error:
        return Expanded([], [f"{where}.dataset_path: {error}"], [])
    problems = [
        f"{where}.dataset_path: {printable(path)}: {printable(key)} = {printable(value)} is not read from this file; remove it"
        for key, value in content.items()
        if key != "datasets" and (key not in _BESIDE or value not in (_BESIDE[key] or (value,)))
    ]
    common = {key: value for key, value in table.items() if key not in ("dataset_type", "dataset_path", "name")}
    if "val_set_size" in content and where.startswith("datasets"):
        common["eval_size"] = content["val_set_size"]
    if len(sets) > 1 and type(common.get("eval_size")) is int and common["eval_size"]:
        problems.append(
            f"{where}.eval_size: {common['eval_size']} would be held out of each of the {len(sets)} datasets of {printable(path)}; "
            "give a fraction"
        )
    tables, notes = [], list[str]()
    for number, one in enumerate(sets):
        own, wrong, said = _table(one, content)
        at = f"{where}.dataset_path: {printable(path)}: datasets.{number}"
        problems += [f"{at}.{line}" for line in wrong]
        notes += [f"{at}.{line}" for line in said]
        name = table.get("name")
        called = {} if name is None else {"name": name if len(sets) == 1 else f"{name}.{number}"}
        tables.append({**common, **called, **own})
    return Expanded([] if problems else tables, problems, notes)


def _table(one: dict[str, Any], content: dict[str, Any]) -> tuple[dict[str, Any], list[str], list[str]]:
    """(Our keys for a dataset of axolotl's, what of it has no counterpart, what is another than there)."""
    kind = one.get("type") or ""
    if not isinstance(kind, str) or kind not in _TYPES:
        shown = kind if isinstance(kind, str) else "(a format of its own)"
        known = ", ".join(f"'{name}'" for name in _TYPES if name)
        return {}, [f"type: {printable(shown)} has no counterpart; {known} and none (token ids) have"], []
    ours = _TYPES[kind]
    problems = [
        f"{printable(key)}: {printable(value)} has no counterpart; remove it"
        for key, value in one.items()
        if value is not None
        and key not in (*_SOURCE, *_READ[ours])
        and not any(value == harmless and type(value) is type(harmless) for harmless in _HARMLESS.get(key, ()))
    ]
    found: dict[str, Any] = {"dataset_type": ours}
    try:
        found["dataset_path"] = _path(one)
        if ours == "chat":
            found |= _chat(one, content)
    except ValueError as error:
        problems.append(str(error))
    if ours == "doclist" and one.get("field"):
        found["field_text"] = one["field"]
    if kind == "alpaca":
        found["chat_template"] = "alpaca"
    return found, problems, [_ALPACA] if kind == "alpaca" else []


def _path(one: dict[str, Any]) -> str:
    """`dataset_path` for a dataset of axolotl's. ValueError where there is none."""
    path, files, split = one.get("path"), one.get("data_files"), one.get("split") or "train"
    if not isinstance(path, str):
        raise ValueError("path: not given")
    if path in ("json", "csv", "parquet", "arrow", "text") and not Path(path).exists():
        path, files = files, None
        if isinstance(path, list) and len(path) == 1:
            (path,) = path
        if not isinstance(path, str):
            raise ValueError(f"data_files: {printable(path)}: give one file, or a glob")
    if files:
        raise ValueError(
            f"data_files: {printable(files)}: only with path: json, csv, parquet or arrow; give its path instead"
        )
    if Path(path).expanduser().exists() or not _HUB.fullmatch(path):
        if split != "train":
            raise ValueError(f"split: {printable(split)}: files have none; name the file")
        return path
    revision = f"@{one['revision']}" if one.get("revision") else ""
    config = f"{one['name']}/" if one.get("name") else ""
    return f"hub:{path}{revision}" + (f":{config}{split}" if config or one.get("split") else "")


def _chat(one: dict[str, Any], content: dict[str, Any]) -> dict[str, Any]:
    """Our keys for a dataset of `type: chat_template`. ValueError for a template or mapping that has no counterpart."""
    found = {key: one[key] for key in ("field_messages", "field_tools", "roles", "train_on_eos") if one.get(key)}
    named = {"role": one.get("message_field_role"), "content": one.get("message_field_content")}
    given = one.get("message_property_mappings") or {}
    if others := sorted(set(given) - set(named)):
        raise ValueError(
            f"message_property_mappings: only role and content have a counterpart, not {', '.join(map(printable, others))}"
        )
    if mappings := {key: value for key, value in (named | given).items() if value and value != key}:
        found["message_property_mappings"] = mappings
    if found.get("train_on_eos") == "all":
        raise ValueError(
            "train_on_eos: 'all' would train the ends of turns that are not trained; 'turn' and 'last' have a counterpart"
        )
    for of in (one, content):
        jinja, name = of.get("chat_template_jinja"), of.get("chat_template")
        if jinja:
            return found | {"chat_template": jinja}
        if name in _TEMPLATES:
            return found | {"chat_template": name}
        if name not in (None, "tokenizer_default"):
            has = ", ".join(f"'{template}'" for template in _TEMPLATES)
            raise ValueError(
                f"chat_template: {printable(name)} has no counterpart by name; 'tokenizer_default', {has} and chat_template_jinja have"
            )
        if name:
            break
    return found


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
