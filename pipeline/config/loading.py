"""From the command line to one validated `Config`: the TOML, a DeepSpeed JSON, `--set`.

Takes paths and `key=value` strings; gives a `Config`. Raises `UserError` with every problem at once, each with the key,
the value, the rule and, for an unknown key, the nearest valid one.
"""

import copy
import difflib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import tomli
import tomli_w
from pydantic import ValidationError

from pipeline.config import peers, toml
from pipeline.config.data_tables import Dataset, EvalDataset
from pipeline.config.qlora_pipe import REFUSED
from pipeline.config.qlora_pipe import TYPE as AXOLOTL
from pipeline.config.qlora_pipe import expanded as expand
from pipeline.config.schema import Config
from pipeline.config.tables import Bnb, Optimizer, ParameterGroup, Peft, Quantization, Samples, Sampling, Section
from pipeline.config.warnings import warnings_of
from pipeline.console import UserError, warn
from pipeline.foreign import DEPTH_LIMIT, printable, read_object, toml_value
from pipeline.formats.hub import model_folder

# DeepSpeed JSON key → our key. Everything else DeepSpeed could be told is decided by the trainer.
JSON_KEYS = {
    "train_micro_batch_size_per_gpu": "micro_batch_size_per_gpu",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "gradient_clipping",
    "steps_per_print": "steps_per_print",
}
SECTIONS: dict[str, type[Section]] = {
    "optimizer": Optimizer,
    "datasets": Dataset,
    "eval_datasets": EvalDataset,
    "quantization": Quantization,
    "quantization.bnb": Bnb,
    "optimizer.groups": ParameterGroup,
    "samples": Samples,
    "sampling": Sampling,
    "peft": Peft,
}
UNKNOWN = "unknown key."
# What pydantic puts into the place of an error to say which member of a union it tried.
BRANCHES = {"function-after", "bool", "str", "float", "int", "list[str]", "literal['all-linear']", "literal['unsloth']"}
# Stands in for a required key that is wrong or missing, so that the rules between the other keys are still checked.
STAND_INS: dict[str, Any] = {
    "model": "-",
    "output_dir": "-",
    "pipeline_stages": 1,
    "optimizer": {"type": "adamw", "lr": 1.0},
    "datasets": [{"dataset_type": "textfile", "dataset_path": "-", "sequence_len": 2}],
}


class Vocabulary(NamedTuple):
    """What a file may say: its keys at the top level, those of its tables by their names, and what stands in (STAND_INS)."""

    root: type[Section]
    sections: dict[str, type[Section]]
    stand_ins: dict[str, Any]


RUN = Vocabulary(Config, SECTIONS, STAND_INS)


def load(path: str, deepspeed_json: str | None = None, overrides: list[str] | None = None) -> Config:
    """The validated configuration in `path`, with a DeepSpeed JSON and `key=value` overrides applied."""
    source = find(path)
    raw = toml.read(source)
    problems = _merge_json(raw, deepspeed_json) if deepspeed_json else []
    for override in overrides or []:
        _apply_override(raw, override)
    config = validate(raw, str(source), problems)
    for line in warnings_of(config):
        warn(line)
    return config


def with_model_here(config: Config, *, weights: bool) -> Config:
    """`config` with the folder of its model, which is downloaded where it is on the Hub; without `weights` they are not."""
    if (folder := model_folder(config.model, "model", weights=weights)) == config.model:
        return config
    return Config.model_validate({**config.model_dump(exclude_unset=True), "model": folder})


def find(path: str) -> Path:
    """`path` in the current folder, else in configs/ beside the program."""
    configs = Path(__file__).resolve().parents[2] / "configs"
    for candidate in (Path(path), configs / path):
        if candidate.is_file():
            return candidate
    near = ", ".join(sorted(p.name for p in configs.glob("*.toml")))
    raise UserError(f"--config {path}: no such file, neither here nor in {configs.name}/ (which has: {near})")


def validate(raw: dict[str, Any], where: str, problems: list[str] | None = None) -> Config:
    """`raw` as a `Config`; one `UserError` naming every problem otherwise."""
    problems = list(problems or [])
    kept = _without_refused(raw, problems)
    for key in ("datasets", "eval_datasets"):
        _expand_axolotl(kept, key, problems)
    config: Config = validate_as(RUN, kept, where, problems)
    return config


def _expand_axolotl(raw: dict[str, Any], key: str, problems: list[str]) -> None:
    """Put what their files name in the place of tables with qlora-pipe's dataset_type = 'axolotl'."""
    tables = raw.get(key)
    if not isinstance(tables, list):
        return
    found: list[Any] = []
    for number, table in enumerate(tables):
        if not isinstance(table, dict) or table.get("dataset_type") != AXOLOTL:
            found.append(table)
            continue
        expanded = expand(table, f"{key}.{number}")
        problems += expanded.problems
        for line in expanded.notes:
            warn(line)
        if len(expanded.tables) > 1 and raw.get("dataset_combination_mode") == "interleave":
            problems.append(
                f"{key}.{number}.dataset_path: has {len(expanded.tables)} datasets, which interleaving would weigh one by one; give "
                "each a file and a table of its own"
            )
        found += expanded.tables or [{**table, "dataset_type": "chat"}]  # so that its other keys are looked at
    raw[key] = found


def validate_as(words: Vocabulary, raw: dict[str, Any], where: str, problems: list[str]) -> Any:
    """`raw` as a `words.root`; one `UserError` naming every problem, those already known too, otherwise."""
    problems = list(problems)
    try:
        config = words.root.model_validate(raw)
    except ValidationError as error:
        problems += _explain(error, words) + _explain_rest(error, raw, words)
    if problems:
        lines = [*problems, *_valid_keys(problems, words)]
        raise UserError(f"{where} has {len(problems)} problem(s):\n" + "\n".join(f"  {line}" for line in lines))
    return config


def overridden(raw: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """`raw` with each `key=value` put in."""
    raw = copy.deepcopy(raw)
    for override in overrides:
        _apply_override(raw, override)
    return raw


def to_toml(config: Config) -> str:
    """The resolved configuration as TOML: every key that has a value, defaults included. `load` reads it back."""
    idle = {"adapter_type"} if config.full_fine_tune else set()
    if config.batch_size_tokens:
        idle.add("micro_batch_size_per_gpu")
    return tomli_w.dumps(config.model_dump(exclude_none=True, exclude=idle))


def schema() -> str:
    """configs/schema.json: the JSON Schema of a config file, for editors that complete and check TOML."""
    return json.dumps(Config.model_json_schema(), indent=1) + "\n"


def _without_refused(raw: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """`raw` without keys of qlora-pipe that are not built; those that ask for something become problems."""
    kept = copy.deepcopy(raw)
    for key, (harmless, why) in REFUSED.items():
        *tables, name = key.split(".")
        section: Any = kept
        for table in tables:
            section = section.get(table) if isinstance(section, dict) else None
        if isinstance(section, dict) and name in section:
            value = section.pop(name)
            if not any(value == h and type(value) is type(h) for h in harmless):
                problems.append(f"{key} = {_shown(value)}: {why}. Remove the key.")
    return kept


def _explain(error: ValidationError, words: Vocabulary) -> list[str]:
    lines: dict[str, list[str]] = {}  # what is wrong → the rules it breaks, of which one would do
    for e in error.errors():
        loc = [part for part in e["loc"] if part not in BRANCHES]
        key = _dotted(loc)
        if e["type"] == "extra_forbidden":
            lines[f"{key}: {UNKNOWN}{_nearest(loc, words)}"] = []
        elif e["type"] == "missing":
            lines[f"{key}: required, but not given"] = []
        elif not loc:
            lines |= {line: [] for line in str(e["ctx"]["error"]).split("\n")}
        else:
            message = e["msg"].removeprefix("Value error, ")
            lines.setdefault(f"{key} = {_shown(e['input'])}: ", []).append(message[0].lower() + message[1:])
    return [what + ", or ".join(rules) for what, rules in lines.items()]


def _explain_rest(error: ValidationError, raw: dict[str, Any], words: Vocabulary) -> list[str]:
    """Broken rules between keys, which pydantic checks only when every single key is right."""
    mended, wrong = copy.deepcopy(raw), set()
    for e in error.errors():
        if e["type"] == "extra_forbidden":
            table: Any = mended
            for part in e["loc"][:-1]:
                table = table[part]
            del table[e["loc"][-1]]
        elif e["loc"]:
            wrong.add(str(e["loc"][0]))
    mended = {key: value for key, value in mended.items() if key not in wrong}
    mended |= {key: value for key, value in words.stand_ins.items() if key in wrong}
    try:
        words.root.model_validate(mended)
    except ValidationError as rest:
        # A rule that speaks of a wrong key would be judging the stand-in.
        about_wrong = re.compile(rf"(?<![\w.])({'|'.join(map(re.escape, wrong))})\b") if wrong else None
        known = set(_explain(error, words))
        return [
            line
            for line in _explain(rest, words)
            if line not in known and not (about_wrong and about_wrong.search(line))
        ]
    return []


def _nearest(loc: list[Any], words: Vocabulary) -> str:
    """What to write instead of an unknown key; nothing where no good match is known."""
    table, key = ".".join(part for part in loc[:-1] if isinstance(part, str)), str(loc[-1])
    model: type[Section] = words.sections.get(table, words.root)
    if words is not RUN and key in (Config if not table else SECTIONS.get(table, Config)).model_fields:
        return " It is a key of a training, and says nothing here."
    if told := peers.in_table(table, key):
        return f" {told}"
    if elsewhere := [s for s, m in words.sections.items() if key in m.model_fields and m is not model]:
        brackets = "[[{}]]" if elsewhere[0].endswith(("datasets", "groups")) else "[{}]"
        return f" It belongs in {brackets.format(elsewhere[0])}."
    if table and key in words.root.model_fields:
        return " It belongs at the top level, above the first [table]."
    if told := peers.anywhere(key):
        return f" {told}"
    close = difflib.get_close_matches(key, list(model.model_fields), n=1, cutoff=0.75)
    return f" Did you mean '{close[0]}'?" if close else ""


def _valid_keys(problems: list[str], words: Vocabulary) -> Iterator[str]:
    """The keys of each table in which an unknown key has no suggestion, once."""
    tables = {
        re.sub(r"\.\d+", "", problem.partition(": ")[0]).rpartition(".")[0]
        for problem in problems
        if problem.endswith(UNKNOWN)
    }
    for table in sorted(tables):
        yield f"Valid keys {f'in [{table}]' if table else 'at the top level'}: {', '.join(words.sections.get(table, words.root).model_fields)}."


def _dotted(loc: list[Any]) -> str:
    """A key as --set takes it: `datasets.0.sequence_len`."""
    return printable(".".join(map(str, loc)))


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _merge_json(raw: dict[str, Any], path: str) -> list[str]:
    """Put a DeepSpeed JSON's keys into `raw`; returns what cannot be taken over."""
    given = read_object(Path(path), "what --deepspeed_config names")
    problems = []
    for key, value in given.items():
        ours = JSON_KEYS.get(key)
        if ours is None:
            problems.append(
                f"{path}: {printable(key)} is decided by the trainer and cannot be set; it takes {', '.join(JSON_KEYS)}"
            )
        elif ours in raw and raw[ours] != value:
            problems.append(
                f"{ours}: the TOML says {_shown(raw[ours])}, {path} says {key} = {_shown(value)}; make them agree or remove one"
            )
        else:
            raw[ours] = value
    return problems


def _apply_override(raw: dict[str, Any], override: str) -> None:
    """`optimizer.lr=1e-5`, `datasets.0.sequence_len=512`: the value is TOML; a bare word is a string."""
    key, equals, text = override.partition("=")
    if not equals or not all(part.strip() for part in key.split(".")):
        raise UserError(f"--set {override}: write key=value, for example --set optimizer.lr=1e-5")
    try:
        value = toml_value(f"v = {text}")["v"]
    except tomli.TOMLDecodeError:
        value = text
    except ValueError as error:
        raise UserError(f"--set {printable(override, 80)}: {error}") from None
    *path, last = key.strip().split(".")
    if len(path) > DEPTH_LIMIT:
        raise UserError(f"--set {printable(override, 80)}: a key of {len(path) + 1} parts; no key has so many")
    target: Any = raw
    for part in path:
        if isinstance(target, list):
            if part not in map(str, range(len(target))):
                raise UserError(
                    f"--set {override}: '{part}' is not one of the {len(target)} entries (0 to {len(target) - 1})"
                )
            target = target[int(part)]
        elif isinstance(target, dict):
            target = target.setdefault(part, {})
    if not isinstance(target, dict):
        raise UserError(f"--set {override}: '{'.'.join(path)}' has no keys of its own")
    target[last] = value
