"""The model card of one folder: README.md, with loss.svg beside it.

Takes `Facts` and a folder that holds an adapter, a model or a GGUF adapter; writes the two files, each whole. The header
is what the Hub reads: a base model stands there only under an id of the Hub, since it refuses any other, and an
evaluation only where it is of the step that is published.
"""

import json
from pathlib import Path
from shlex import quote
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from pipeline.artifacts.adapter.adapter import CONFIG_FILE, OWN_TYPE
from pipeline.console import UserError
from pipeline.families import FAMILIES, LORA
from pipeline.files import atomic_file
from pipeline.foreign import printable, read_front_matter, read_object
from pipeline.publishing import card_text
from pipeline.publishing.facts import Facts
from pipeline.publishing.loss_curve import loss_curve

CARD, CURVE = "README.md", "loss.svg"
FILES = (CARD, CURVE)
TITLES = {
    "adapter": "`{base}` with {family}",
    "model": "`{base}` with {family}, folded into its weights",
    "gguf": "`{base}` with {family}, as a GGUF LoRA",
    "full": "`{base}`, fine-tuned in full",
}


def write_card(folder: Path, facts: Facts, *, repository: str | None) -> None:
    """Write the card of what lies in `folder`. `repository`: its OWNER/NAME on the Hub, if it is to have one."""
    with atomic_file(folder / CURVE, replace=True) as file:
        file.write_text(loss_curve(facts.training, facts.evaluation), encoding="utf-8")
    with atomic_file(folder / CARD, replace=True) as file:
        file.write_text(str(card(folder, facts, repository=repository)), encoding="utf-8")


def card(folder: Path, facts: Facts, *, repository: str | None) -> ModelCard:
    """The card, as `write_card` writes it."""
    what = contents(folder, facts)
    title = repository.rpartition("/")[2] if repository else f"{facts.base.rpartition('/')[2]}, {facts.name}"
    about = TITLES[what].format(base=card_text.in_code(facts.base), family=card_text.family(facts).split(",")[0])
    peft_type = _peft_type(folder)
    lora = FAMILIES[LORA].peft_type
    if peft_type == lora and facts.adapter.get("peft_type") != lora:
        about += ", in its exact additive form W' = W + s·B'·A' (an ordinary LoRA)"
    sections = {
        "Use": use(what, facts.base, repository or folder.name, peft_type),
        "What was trained": card_text.trained(facts),
        "Data": card_text.data(facts),
        "Losses": card_text.losses(facts),
        "Samples": card_text.samples(facts),
        "The run": card_text.run(facts),
        "Versions": card_text.versions(facts),
        "Configuration": card_text.configuration(facts),
    }
    text = "".join(f"\n## {name}\n\n{body.rstrip()}\n" for name, body in sections.items() if body)
    steps = f"after {facts.step:,} step{'s' * (facts.step != 1)} of training"
    head = header(what, facts, title, peft_type).to_yaml()
    return ModelCard(f"---\n{head}\n---\n\n# {card_text.in_prose(title)}\n\n{about}, {steps}.\n{text}")


def contents(folder: Path, facts: Facts) -> str:
    """Which of TITLES the folder holds."""
    if (folder / CONFIG_FILE).is_file():
        return "adapter"
    if any(folder.glob("*.gguf")):
        return "gguf"
    return "full" if facts.config.get("full_fine_tune") else "model"


def header(what: str, facts: Facts, title: str, peft_type: str | None) -> ModelCardData:
    """The YAML header."""
    relation = "adapter" if what in ("adapter", "gguf") else "finetune"
    library = {"adapter": "peft", "model": "transformers", "full": "transformers"}.get(what)
    kind = "full_fine_tune" if what == "full" else facts.config["adapter_type"]
    return ModelCardData(
        base_model=facts.base_id,
        base_model_relation=relation if facts.base_id else None,
        library_name=None if peft_type == OWN_TYPE else library,
        pipeline_tag="text-generation",
        tags=["mulora-pipe", kind.replace("_", "-")],
        model_name=title,
        eval_results=results(facts) or None,
        **licence(facts.base_folder, facts.base_id),
    )


def results(facts: Facts) -> list[EvalResult]:
    """The evaluations of the step that is published, as they were measured."""
    found = []
    for name, losses in facts.evaluation.items():
        last = losses[-1]
        measured = {"loss": last.loss, "perplexity": last.perplexity}
        found += [
            EvalResult(
                task_type="text-generation",
                dataset_type=name,
                dataset_name=name,
                metric_type=metric,
                metric_value=value,
            )
            for metric, value in measured.items()
            if value is not None and last.step == facts.step
        ]
    return found


def licence(base: Path, base_id: str | None) -> dict[str, Any]:
    """The base's licence as its own card declares it; nothing where it has no card, or that declares none."""
    if not (base / CARD).is_file():
        return {}
    try:
        data = read_front_matter(base / CARD)
    except UserError:
        return {}
    keys = ("license", "license_name", "license_link")
    found = {key: data[key] for key in keys if isinstance(data.get(key), str) and data[key]}
    link = found.get("license_link", "")
    if link and "://" not in link:  # a file of the base's own repository
        found["license_link"] = f"https://huggingface.co/{base_id}/blob/main/{link}" if base_id else None
    return found if "license" in found else {}


def use(what: str, base: str, here: str, peft_type: str | None) -> str:
    """How to load it."""
    if what == "gguf":
        return f"    llama-server -m {quote(printable(base.rpartition('/')[2] + '.gguf'))} --lora adapter.gguf"
    if peft_type == OWN_TYPE:
        return (
            "This adapter moves biases as well as weights, which no type of PEFT's does: fold it with mulora-pipe.\n\n"
            f"    python merge_lora.py --input {quote(printable(base))} --lora {quote(printable(here))} --output merged"
        )
    base, here = (json.dumps(printable(name), ensure_ascii=False) for name in (base, here))  # as Python writes a text
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    if what == "adapter":
        lines = [
            "from peft import PeftModel",
            *lines,
            f'base = AutoModelForCausalLM.from_pretrained({base}, dtype="auto")',
            f"model = PeftModel.from_pretrained(base, {here})",
            f"tokenizer = AutoTokenizer.from_pretrained({base})",
        ]
    else:
        lines += [
            f'model = AutoModelForCausalLM.from_pretrained({here}, dtype="auto")',
            f"tokenizer = AutoTokenizer.from_pretrained({here})",
        ]
    return "```python\n" + "\n".join(lines) + "\n```"


def _peft_type(folder: Path) -> str | None:
    file = folder / CONFIG_FILE
    return read_object(file, "the adapter").get("peft_type") if file.is_file() else None
