"""A chosen configuration as a commented TOML file.

Takes keys and reasons; gives text that `config/loading.load` reads back. Each group of keys has a heading, and the plan
stands at the top.
"""

from collections.abc import Iterator
from typing import Any

import tomli_w

from pipeline.recipes.choose import Chosen

# The keys in groups, each with what a reader wants to know of them.
GROUPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("The base model, and where runs are written", ("model", "output_dir")),
    (
        "What is trained (docs/families.md has the other families)",
        ("adapter_type", "lora_rank", "lora_alpha", "target_modules"),
    ),
    (
        "Steps; a step has micro_batch_size_per_gpu × gradient_accumulation_steps × replicas rows",
        (
            "epochs",
            "lr_scheduler",
            "warmup_steps",
            "micro_batch_size_per_gpu",
            "gradient_accumulation_steps",
        ),
    ),
    (
        "The layout: as the planner chose it",
        ("pipeline_stages", "activation_checkpointing", "host_memory_gib", "model_weight_dtype", "lora_weight_dtype"),
    ),
    (
        "What is measured and saved",
        (
            "eval_steps",
            "eval_before_first_step",
            "eval_after_last_step",
            "save_steps",
            "keep_states",
            "checkpoint_every_n_minutes",
        ),
    ),
)


def as_toml(chosen: Chosen, heading: str, command: str, schema: str) -> str:
    """The file. `heading`: what it is; `command`: by which it is made again; `schema`: where an editor finds schema.json."""
    return "\n".join(_lines(chosen, heading, command, schema))


def _lines(chosen: Chosen, heading: str, command: str, schema: str) -> Iterator[str]:
    yield f"#:schema {schema}"
    yield f"# {heading}"
    yield f"# Made by: {command}"
    yield from (f"# {reason}" for reason in chosen.reasons)
    yield "#"
    yield from (f"#   {line}".rstrip() for line in chosen.plan.splitlines())
    left = dict(chosen.raw)
    for title, names in GROUPS:
        yield f"\n# {title}"
        yield tomli_w.dumps({name: left.pop(name) for name in names if name in left}).rstrip()
    tables: dict[str, Any] = {name: left[name] for name in left if isinstance(left[name], dict)}
    yield "\n" + tomli_w.dumps(tables).rstrip()
    for dataset in left["datasets"]:
        yield "\n[[datasets]]\n" + tomli_w.dumps(dataset).rstrip()
    yield ""
