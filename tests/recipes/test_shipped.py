"""configs/recipes/ and docs/recipes.md: each recipe is valid, the page has every cell, and the planner says the same again."""

import math
import re
from collections.abc import Iterator

import pytest
import torch
from transformers import AutoModelForCausalLM

from docs import recipes
from docs.recipes import FOLDER, KINDS, MACHINES, MODELS, Model
from pipeline.config import loading

FILES = sorted(FOLDER.rglob("*.toml"))
PAGE = recipes.PAGE.read_text(encoding="utf-8")
ROW = re.compile(r"^\| (\d+x\d+) \| (?:\[(\w+)\]\(\.\./(\S+)\)|(\w+)) \|(.*)\|$", re.M)


def rows() -> Iterator[tuple[Model, str, str, str | None, list[str]]]:
    """Of the page: model, machine, kind, the recipe's file where there is one, and the other cells."""
    for model, section in zip(MODELS, PAGE.split("\n## ")[1:], strict=True):
        assert section.startswith(f"{model.label.upper()}: {model.name}\n")
        for machine, linked, file, plain, rest in ROW.findall(section):
            yield model, machine, linked or plain, file or None, [cell.strip() for cell in rest.split("|")]


def test_the_page_has_every_machine_model_and_kind_and_the_folder_what_fits() -> None:
    found = list(rows())
    cells = [(machine, model.label, kind) for model in MODELS for machine in MACHINES for kind in KINDS]
    assert [(machine, model.label, kind) for model, machine, kind, *_ in found] == cells
    assert len(cells) == 6 * 7 * 3
    linked = [file for *_, file, _ in found if file is not None]
    assert sorted(linked) == [str(file.relative_to(recipes.ROOT)) for file in FILES]
    for _, _, _, file, rest in found:
        assert (rest[0] == "does not fit") == (file is None)
        if file is None:
            assert re.search(r"too much on a GPU|more than all GPUs have", " ".join(rest)), "what is lacking is said"


def test_every_recipe_is_valid_and_says_what_the_page_says() -> None:
    for model, machine, kind, file, (weights, stages, context, gas, host, memory, *_) in rows():
        if file is None:
            continue
        config = loading.load(file.removeprefix("configs/"))  # as --config finds it
        count, replicas = map(int, stages.split(" × "))
        assert (config.model, config.datasets[0].name) == (model.name, kind), file
        assert config.pipeline_stages == count, file
        assert count * replicas == int(machine.partition("x")[0]), file
        assert config.eval_after_last_step, file
        assert ("bnb" in str(config.quantization)) == (weights == "4 bits"), file
        assert config.datasets[0].sequence_len == int(context.replace(",", "")), file
        assert config.gradient_accumulation_steps == int(gas), file
        assert config.host_memory_gib == (0 if host == "–" else float(host)), file
        held, room = map(float, memory.split(" of "))
        assert held <= room < float(machine.partition("x")[2]), file


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.label)
def test_the_dimensions_come_to_the_weights_that_are_published(model: Model) -> None:
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(model.of(**model.dimensions))
    counted, digits = sum(p.numel() for p in made.parameters()) / 1e9, len(str(model.weights).partition(".")[2])
    assert model.weights in (round(counted, digits), math.floor(counted * 10**digits) / 10**digits)
    assert not made.config.tie_word_embeddings


@pytest.mark.parametrize(("machine", "label", "kind"), [("1x24", "7b", "chat"), ("2x24", "7b", "preference")])
def test_two_are_planned_anew(machine: str, label: str, kind: recipes.Kind) -> None:
    (model,) = (model for model in MODELS if model.label == label)
    again = recipes.cell(machine, model, kind)
    assert again.file.read_text(encoding="utf-8") == again.text


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("label", [model.label for model in MODELS])
def test_every_recipe_is_what_the_planner_says(label: str) -> None:
    """All machines and kinds of a model, those that do not fit among them."""
    (model,) = (model for model in MODELS if model.label == label)
    found = recipes.cells(model)
    assert [str(file) for file, _ in recipes.stale([found], with_page=False)] == []
    section = next(part for part in PAGE.split("\n## ") if part.startswith(f"{label.upper()}: "))
    assert f"## {section.rstrip()}" == recipes._section(found).rstrip()
