"""Files of rows and the stores that are built of them: chat, completion and pretokenised data for the tests."""

import json
from pathlib import Path
from typing import Any

from pipeline.data.chat.derive import Rules
from pipeline.data.chat.messages import Fields
from pipeline.data.rows import build
from pipeline.data.rows.build import RowSpec
from pipeline.data.rows.store import UnequalRows
from tests.helpers import chat

TURNS = ("user", "assistant")


def talk(*texts: str, system: str | None = None) -> dict[str, Any]:
    """A conversation in which user and assistant take turns."""
    messages = [{"role": TURNS[place % 2], "content": text} for place, text in enumerate(texts)]
    return {"messages": ([{"role": "system", "content": system}] if system else []) + messages}


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    """A row a line; text stays as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def stored(
    path: Path,
    kind: Any = "chat",
    template: str = "qwen2_5",
    stop: str = "<|im_end|>",
    processes: int | None = None,
    **changes: Any,
) -> UnequalRows:
    """The store of the rows at `path`; `changes` are a `RowSpec`'s, a `Rules`' or a `Fields`'."""
    tokenizer = chat.tokenizer(template, stop)
    parts: dict[str, dict[str, Any]] = {"rules": {"limit": 512}, "fields": {}, "spec": {"most_bad": 1.0}}
    for key, value in changes.items():
        owners = [
            name for name, kind_of in (("rules", Rules), ("fields", Fields)) if key in kind_of.__dataclass_fields__
        ]
        parts[owners[0] if owners else "spec"][key] = value
    if kind == "chat":
        parts["spec"] = {"chat_template": chat.source(template)} | parts["spec"]
    spec = RowSpec("talks", kind, str(path), Rules(**parts["rules"]), Fields(**parts["fields"]), **parts["spec"])
    return build.build(spec, tokenizer, [], path.parent / "cache", processes)


def decoded(store: UnequalRows, template: str = "qwen2_5", stop: str = "<|im_end|>") -> list[tuple[str, list[str]]]:
    """The text of each row, and that of each run of its targets."""
    decode = chat.tokenizer(template, stop).decode
    return [
        (decode(store.ids(row)), [decode(store.ids(row)[start:end]) for start, end in store.spans(row)])
        for row in range(len(store))
    ]
