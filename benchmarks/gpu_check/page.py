"""The results as one page of Markdown, which a terminal shows too."""

import json
from typing import Any


def page(machine: dict[str, Any], settings: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Takes what the JSON has."""
    verdict = "all passed" if all(row["passed"] for row in rows) else "FAILED: " + ", ".join(failures(rows))
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items() if number)
    lines = [
        f"# gpu-check on {settings['device_name']}: {verdict}",
        "",
        f"{machine['when']}, {settings['seconds']:.0f} s; {versions}; Python {machine['python']}; {machine['cpu']}, "
        f"{machine['cores']} cores.",
        "",
        "| check | passed | seconds | compared | tolerance |",
        "|---|---|---|---|---|",
        *(
            f"| {row['name']} | {'yes' if row['passed'] else '**NO**'} | {row['seconds']:.1f} | {row['compared']} | "
            f"{row['tolerance']} |"
            for row in rows
        ),
    ]
    for row in rows:
        lines += ["", f"## {row['name']}", "", *figures(row["figures"])]
        if problem := row.get("problem"):
            lines += ["```", problem.rstrip(), "```"]
    return "\n".join(lines) + "\n"


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """The names of the checks that failed."""
    return [row["name"] for row in rows if not row["passed"]]


def figures(found: dict[str, Any]) -> list[str]:
    """A list of single figures, and a table for each list of rows."""
    lines: list[str] = []
    for name, value in found.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            lines += ["", f"{name}:", "", *table(value), ""]
        else:
            lines.append(f"- {name}: {text(value)}")
    return lines


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Columns are the first row's keys."""
    names = list(rows[0])
    body = ["| " + " | ".join(text(row.get(name)) for name in names) + " |" for row in rows]
    return ["| " + " | ".join(names) + " |", "|" + "---|" * len(names), *body]


def text(value: Any) -> str:
    """Numbers to four digits."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
