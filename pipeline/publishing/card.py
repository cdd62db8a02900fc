"""The model card of one folder: README.md, with loss.svg beside it.

Takes `Facts` and a folder that holds an adapter, a model or a GGUF adapter; writes the two files, each whole. The header
is what the Hub reads: a base model stands there only under an id of the Hub, since it refuses any other, and an
evaluation only where it is of the step that is published.
"""

from pathlib import Path
from typing import Any

import tomli_w
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from pipeline.artifacts.adapter.adapter import CONFIG_FILE, OWN_TYPE
from pipeline.console import UserError
from pipeline.families import FAMILIES, LORA
from pipeline.files import atomic_file
from pipeline.foreign import read_front_matter, read_object
from pipeline.pages import drawing
from pipeline.publishing import card_text
from pipeline.publishing.facts import Facts
from pipeline.publishing.markdown import environment
from pipeline.publishing.report import pictures
from pipeline.publishing.report.read import Value

CARD, CURVE = "README.md", "loss.svg"
FILES = (CARD, CURVE)


def write_card(folder: Path, facts: Facts, *, repository: str | None) -> None:
    """Write the card of what lies in `folder`. `repository`: its OWNER/NAME on the Hub, if it is to have one."""
    with atomic_file(folder / CURVE, replace=True) as file:
        file.write_bytes(curve(facts))
    with atomic_file(folder / CARD, replace=True) as file:
        file.write_text(str(card(folder, facts, repository=repository)), encoding="utf-8")


def card(folder: Path, facts: Facts, *, repository: str | None) -> ModelCard:
    """The card, as `write_card` writes it."""
    what, peft_type, lora = contents(folder, facts), _peft_type(folder), FAMILIES[LORA].peft_type
    base_name = facts.base.rpartition("/")[2]
    title = repository.rpartition("/")[2] if repository else f"{base_name}, {facts.name}"
    text = (
        environment()
        .get_template("card.md.j2")
        .render(
            header=header(what, facts, title, peft_type).to_yaml(),
            title=title,
            what=what,
            base=facts.base,
            base_name=base_name,
            here=repository or folder.name,
            family=card_text.family(facts).split(",")[0],
            additive=peft_type == lora and facts.adapter.get("peft_type") != lora,
            needs_our_fold=peft_type == OWN_TYPE,
            step=facts.step,
            trained=card_text.trained(facts),
            data=card_text.data(facts),
            curve=CURVE,
            losses=card_text.losses(facts),
            samples=facts.samples,
            samples_said=card_text.about_samples(facts),
            run=card_text.run(facts),
            versions=card_text.versions(facts),
            configuration=tomli_w.dumps(facts.config),
        )
    )
    return ModelCard(text)


def curve(facts: Facts) -> bytes:
    """The losses over the steps, as an SVG file."""
    found = {"training": facts.training, **facts.evaluation}
    series = {name: [Value(loss.step, loss.loss) for loss in losses] for name, losses in found.items() if losses}
    return drawing.alone(drawing.svg(pictures.lines(series, "loss"), "losses", "losses by step"))


def contents(folder: Path, facts: Facts) -> str:
    """What the folder holds: an adapter, a folded model, one trained in full, or a GGUF LoRA."""
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


def _peft_type(folder: Path) -> str | None:
    file = folder / CONFIG_FILE
    return read_object(file, "the adapter").get("peft_type") if file.is_file() else None
