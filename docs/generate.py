"""Writes what is generated from the code: configs/schema.json and docs/config.md.

    python -m docs.generate            writes both
    python -m docs.generate --check    exit code 1, naming the files that are not what would be written

Takes the pydantic models of pipeline/config/schema.py and pipeline/config/evaluation.py; gives text. Run it after changing a
key, its default or its meaning.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.config import loading
from pipeline.config.evaluation import Evaluation
from pipeline.config.qlora_pipe import REFUSED

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = ROOT / "configs" / "schema.json"
REFERENCE = ROOT / "docs" / "config.md"

INTRODUCTION = """\
# The configuration, key by key

Generated from `pipeline/config/schema.py` by `python -m docs.generate`; change it there. `configs/schema.json` says the same
to editors. Keys that are not in these tables are errors. Units and meaning follow qlora-pipe where it has the key.
"""
DEEPSPEED_JSON = """\
## The DeepSpeed JSON

`--deepspeed_config` takes these keys and no others. A key may stand in both files if the values agree.
"""
REFUSED_KEYS = """\
## Keys of qlora-pipe that are refused

A value that asks for nothing passes; any other is an error with the reason.
"""
AN_EVALUATION = """\
## An evaluation

The keys of `evaluate_lora.py --config` ([evaluation.md](evaluation.md)), generated from `pipeline/config/evaluation.py`.
Above the first `[table]` of the file:
"""
ITS_DATASETS = """\
### `[[datasets]]` of an evaluation

Once for each dataset, at least one. All keys of `[[eval_datasets]]`, and:
"""
TABLES = (
    ("Config", "Top level", "Above the first `[table]` of the file."),
    ("Optimizer", "`[optimizer]`", "Required."),
    (
        "ParameterGroup",
        "`[[optimizer.groups]]`",
        "None by default. The first group that names a parameter has it; what none names follows `[optimizer]`.",
    ),
    (
        "Bnb",
        "`[quantization.bnb]`",
        "None by default. Linear layers and experts of the base in 4 or 8 bits, by bitsandbytes.",
    ),
    (
        "Peft",
        "`[peft]`",
        "Required with `adapter_type = 'peft'`, and only there. Every other key of it is one of PEFT's own for the type, such as "
        "`r`, checked by PEFT's class of configuration. What each type is: docs/families.md.",
    ),
    (
        "Samples",
        "`[samples]`",
        "None by default. What the model says to prompts while it is trained (docs/samples.md).",
    ),
    (
        "Sampling",
        "`[sampling]`",
        "None by default. How the model draws answers that it is trained on, `rejected = 'generate'` (docs/preference.md).",
    ),
    (
        "Objective",
        "`[objective]`",
        "None by default: the next token is trained. Preference training, and what it takes, is docs/preference.md's.",
    ),
    ("Reference", "`[objective.reference]`", "What the losses compare with; the base by default."),
    (
        "Tap",
        "`[[objective.tap]]`",
        "One or more with type = 'representation' or 'circuit_breaker', and only there (docs/preference.md).",
    ),
    ("Rl", "`[rl]`", "None by default. qlora-pipe's name for `[objective]`; one of the two."),
    ("Dataset", "`[[datasets]]`", "Once for each dataset, at least one."),
    ("EvalDataset", "`[[eval_datasets]]`", "Once for each dataset that is held out as a whole; none by default."),
)


def schema() -> str:
    """The text of configs/schema.json: the JSON Schema of a config file."""
    return loading.schema()


def config_reference() -> str:
    """The text of docs/config.md: every key with type, default and meaning, and what is refused of qlora-pipe's."""
    parsed = json.loads(schema())
    parts = [INTRODUCTION]
    for definition, title, note in TABLES:
        body = parsed if definition == "Config" else parsed["$defs"][definition]
        parts.append(f"## {title}\n\n{note}\n\n" + _table(("key", "type", "default", "meaning"), _key_rows(body)))
    evaluation = json.loads(json.dumps(Evaluation.model_json_schema()))
    parts.append(f"{AN_EVALUATION}\n" + _table(("key", "type", "default", "meaning"), _key_rows(evaluation)))
    theirs, known = evaluation["$defs"]["EvaluatedDataset"], parsed["$defs"]["EvalDataset"]["properties"]
    own = {key: field for key, field in theirs["properties"].items() if field != known.get(key)}
    rows = _key_rows({**theirs, "properties": own})
    parts.append(f"{ITS_DATASETS}\n" + _table(("key", "type", "default", "meaning"), rows))
    json_rows = ((f"`{theirs}`", f"`{ours}`") for theirs, ours in loading.JSON_KEYS.items())
    parts.append(f"{DEEPSPEED_JSON}\n" + _table(("key in the JSON", "key here"), json_rows))
    refused_rows = (
        (f"`{key}`", ", ".join(f"`{json.dumps(value)}`" for value in harmless if type(value) is not float) or "–", why)
        for key, (harmless, why) in REFUSED.items()
    )
    parts.append(f"{REFUSED_KEYS}\n" + _table(("key", "passes", "reason"), refused_rows))
    return "\n".join(parts)


def _key_rows(body: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for key, field in body["properties"].items():
        if any("$ref" in part for part in (field, field.get("items", {}), *field.get("anyOf", []))):
            continue  # a table of its own
        if key in body.get("required", []):
            default = "**required**"
        else:
            default = "–" if field["default"] is None else f"`{json.dumps(field['default'])}`"
        yield f"`{key}`", _kind(field), default, _plain(field["description"])


def _kind(field: dict[str, Any]) -> str:
    """A JSON Schema type in words: 'integer > 0', '"a" or "b"', 'list of string'."""
    if "anyOf" in field:
        kinds = [_kind(option) for option in field["anyOf"] if option.get("type") != "null"]
        return " or ".join(kinds)
    values = field.get("enum") or ([field["const"]] if "const" in field else [])
    if values:
        return " or ".join(f"`{json.dumps(value)}`" for value in values)
    if field["type"] == "array":
        return f"list of {_kind(field['items'])}"
    if field["type"] == "object":
        within = field.get("additionalProperties", True)
        return f"table of {_kind(within)}" if isinstance(within, dict) else "table"
    bounds = (("exclusiveMinimum", ">"), ("minimum", "≥"), ("exclusiveMaximum", "<"), ("maximum", "≤"))
    limits = [f"{sign} {field[bound]:.12g}" for bound, sign in bounds if bound in field]
    pattern = f" matching `{field['pattern']}`" if "pattern" in field else ""
    return " ".join([field["type"] + pattern, " and ".join(limits)]).strip()


def _plain(text: str) -> str:
    """Text that Markdown leaves alone: no HTML tags, no emphasis."""
    return text.replace("<", "&lt;").replace("*", "\\*")


def _table(header: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def main() -> int:
    """Write, or with --check compare."""
    parser = argparse.ArgumentParser(description="Write configs/schema.json and docs/config.md from the code.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file is not up to date")
    check = parser.parse_args().check
    stale = []
    for path, text in ((SCHEMA, schema()), (REFERENCE, config_reference())):
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(path.relative_to(ROOT))
            if not check:
                path.write_text(text, encoding="utf-8")
    for path in stale:
        print(f"{path}: {'not up to date; run python -m docs.generate' if check else 'written'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
