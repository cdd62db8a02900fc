"""The model card: it reads back through huggingface_hub, its numbers are those of the run's files, and nothing private is
in it."""

import ast
import json
import re
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from pipeline.artifacts.saved_at import Saved
from pipeline.names import id_in_cache
from pipeline.publishing import card_text
from pipeline.publishing.after_training import FinishedRun, follow
from pipeline.publishing.card import curve, write_card
from pipeline.publishing.facts import read_facts, unrecorded
from tests.helpers.artifacts import make_base
from tests.helpers.publishing import METRICS, STEP, make_run

EVALUATED = [line for line in METRICS if "eval/held_out/loss" in line]
TRAINED = {line["step"]: line["train/loss"] for line in METRICS if "train/loss" in line}


def carded(run: FinishedRun) -> ModelCard:
    """The card of the folder that is published, written and loaded again."""
    write_card(run.made[0], read_facts(run.run_dir, Saved(run.saved, run.step)), repository=run.repository)
    return ModelCard.load(run.made[0] / "README.md")


def rows(text: str, heading: str) -> list[list[str]]:
    """The cells of the table in a section, without the rule below its head."""
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in [lines[0], *lines[2:]]]


def test_the_header_reads_back(tmp_path: Path) -> None:
    data = carded(make_run(tmp_path, ["card"], hub_base_model="org/a-base")).data
    assert (data.base_model, data.base_model_relation) == ("org/a-base", "adapter")
    assert (data.library_name, data.pipeline_tag) == ("peft", "text-generation")
    assert data.tags == ["mulora-pipe", "multiplicative-lora"]
    assert data.datasets is None
    assert data.license is None
    assert data.model_name == "a-style"
    measured = {(result.dataset_name, result.metric_type): result.metric_value for result in data.eval_results}
    last = EVALUATED[-1]
    assert measured == {
        ("held_out", "loss"): last["eval/held_out/loss"],
        ("held_out", "perplexity"): last["eval/held_out/perplexity"],
    }


def test_losses_are_those_of_the_metrics(tmp_path: Path) -> None:
    run = make_run(tmp_path, ["card"])
    head, *body = rows(carded(run).text, "Losses")
    assert head == ["step", "training loss", "held_out loss", "held_out perplexity"]
    assert [int(row[0]) for row in body] == [line["step"] for line in EVALUATED]
    for row, line in zip(body, EVALUATED, strict=True):
        step = line["step"]
        assert row[1] == (f"{TRAINED[step]:.4f}" if step in TRAINED else "")
        # Printed to four and two digits.
        assert abs(float(row[2]) - line["eval/held_out/loss"]) <= 0.5e-4 * 1.001
        assert abs(float(row[3]) - line["eval/held_out/perplexity"]) <= 0.5e-2 * 1.001


def test_the_last_samples_are_shown_and_nothing_in_them_is_markup(tmp_path: Path) -> None:
    run = make_run(tmp_path, ["card"], samples={"prompts_file": str(tmp_path / "secret place" / "prompts.txt")})
    said = {"tokens": 57, "stopped": True}
    lines = [
        {"step": 4, "prompt": "Why?", "text": "early", **said},
        {"step": 6, "prompt": "Why?", "text": "```\n## Not a heading\n<script>\n\n![](http://x)", **said},
        {"step": 9, "prompt": "Why?", "text": "later", **said},
    ]
    lines[1]["base"] = {"text": "Salt.", "tokens": 200, "stopped": False}
    (run.run_dir / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = carded(run).text
    section = text.split("\n## Samples\n")[1].split("\n## ")[0]
    assert "After 6 steps, at temperature 1, 200 tokens at most" in section
    assert "1 of 1 stopped by themselves" in section
    assert "Answer (stopped after 57 tokens):" in section
    assert "The base's answer (reached the limit):" in section
    tokens = MarkdownIt().parse(section)
    blocks = [token.content for token in tokens if token.type == "code_block"]
    assert blocks == ["Why?\n", "```\n## Not a heading\n<script>\n\n![](http://x)\n", "Salt.\n"]
    assert not [token for token in tokens if token.type in ("heading_open", "html_block", "fence")]
    assert "secret" not in text


def test_data_time_memory_and_versions_are_those_of_run_json(tmp_path: Path) -> None:
    text = carded(make_run(tmp_path, ["card"])).text
    _, book, held_out = rows(text, "Data")
    assert book == ["book", "training", "3", "12,345", "196 × 64", "372 an epoch, 186 different"]
    assert held_out == ["held_out", "evaluation", "1", "700", "11 × 64", "11"]
    assert "The run read 2 times what is used for training." in text
    _, first, second = rows(text, "The run")
    assert first == ["1 to 4", "2 × 1", "2 × NVIDIA A6000", "3 GiB, 5 GiB", "1 min 40 s"]
    assert second[0] == "5 to 6"
    assert second[-1] == "50.0 s"
    assert "In all 2 min 30 s." in text
    assert "1,004 tokens/s (the median of 6 logged steps)." in text
    assert "\n## Versions\n\nmulora-pipe 0.2.0+g0123456789ab, torch 2.13.0, peft 0.21.2\n" in text


def test_rows_of_conversations_say_how_many_are_trained_and_how_they_were_packed(tmp_path: Path) -> None:
    run = make_run(tmp_path, ["card"])
    content = json.loads((run.run_dir / "run.json").read_text())
    talks = {"use": "training", "name": "talks", "documents": 4000, "made": 4100, "tokens": 99000, "targets": 31000}
    talks |= {"longest": 700, "rows": 4100, "different": 4100}
    packed = {**talks, "name": "packed", "packed": {"rows": 60, "sequence_len": 2048}, "rows": 60, "different": 60}
    content["data"] = [talks, packed, *content["data"]]
    (run.run_dir / "run.json").write_text(json.dumps(content))
    head, first, second, book, _ = rows(carded(run).text, "Data")
    assert head == ["data", "for", "documents or conversations", "tokens", "rows × tokens", "rows used"]
    assert first == ["talks", "training", "4,000", "99,000", "4,100 × ≤ 700, 31,000 tokens trained", "4,100"]
    assert second[4:] == ["4,100 × ≤ 700, 31,000 tokens trained, packed into 60 × 2,048", "60"]
    assert book[4] == "196 × 64"


def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path, ["card"])
    (run.run_dir / "run.json").unlink()
    (run.run_dir / "metrics.jsonl").write_text(json.dumps({"step": 3, "eval/held_out/loss": 4.5}) + "\n")
    card = carded(run)
    assert card.data.eval_results is None, "an evaluation of another step is none of this adapter"
    headings = re.findall(r"(?m)^## (.*)$", card.text)
    assert headings == ["Use", "What was trained", "Losses", "Configuration"]
    assert "nan" not in card.text.lower().replace("finance", "")
    assert "None" not in card.text
    (run.run_dir / "metrics.jsonl").write_text("")
    assert "## Losses" not in carded(run).text
    assert "nothing yet" in (run.saved / "loss.svg").read_text()


def test_a_killed_part_of_the_run_is_said_and_not_guessed(tmp_path: Path) -> None:
    run = make_run(tmp_path, ["card"])
    record = json.loads((run.run_dir / "run.json").read_text())
    record["parts"] = record["parts"][1:]
    (run.run_dir / "run.json").write_text(json.dumps(record))
    text = carded(run).text
    assert "Of the steps 1 to 4 time and memory were not recorded." in text
    assert "In all" not in text


def test_steps_without_a_record() -> None:
    parts = [{"from_step": a, "to_step": b} for a, b in ((5, 9), (0, 3), (7, 12))]
    assert unrecorded(parts, 15) == [(4, 5), (13, 15)]
    assert unrecorded([{"from_step": 0, "to_step": 6}], 6) == []


def test_nothing_private_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_do_not_tell")
    run = make_run(
        tmp_path, ["card"], resume_from_checkpoint=str(tmp_path / "secret place/x"), init_adapter=str(tmp_path / "y")
    )
    text = str(carded(run)) + (run.saved / "loss.svg").read_text()
    for private in (str(tmp_path), "secret place", "hf_do_not_tell", str(Path.home()) + "/"):
        assert private not in text
    for public in ('model = "a-base"', 'dataset_path = "*.md"', 'init_adapter = "y"', 'resume_from_checkpoint = "x"'):
        assert public in text


def test_a_base_without_an_id_is_named_in_the_text_alone(tmp_path: Path) -> None:
    card = carded(make_run(tmp_path, ["card"]))
    header = yaml.safe_load(str(card).split("---\n")[1])
    assert "base_model" not in header
    assert "base_model_relation" not in header
    assert "- base: a-base\n" in card.text


def test_a_base_in_a_hub_cache_has_its_id(tmp_path: Path) -> None:
    snapshot = tmp_path / "hub/models--org--a-base/snapshots/0123abcd"
    base = make_base(snapshot)
    assert id_in_cache(base) == "org/a-base"
    assert id_in_cache(tmp_path) is None
    card = carded(make_run(tmp_path, ["card"], base=base))
    assert card.data.base_model == "org/a-base"
    assert "- base: org/a-base\n" in card.text


def test_the_licence_is_the_base_s(tmp_path: Path) -> None:
    base = make_base(tmp_path / "b")
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: terms\nlicense_link: LICENSE\n---\n# x\n")
    data = carded(make_run(tmp_path / "1", ["card"], base=base)).data
    assert (data.license, data.license_name, data.license_link) == ("other", "terms", None)
    data = carded(make_run(tmp_path / "2", ["card"], base=base, hub_base_model="org/b")).data
    assert data.license_link == "https://huggingface.co/org/b/blob/main/LICENSE"
    (base / "README.md").write_text("---\nlicense: [broken\n---\n# x\n")
    assert carded(make_run(tmp_path / "3", ["card"], base=base)).data.license is None


@pytest.mark.parametrize(
    ("asked", "library", "relation", "said"),
    [
        (["card", "merge"], "transformers", "finetune", "folded into its weights"),
        (["card", "export:peft"], "peft", "adapter", "in its exact additive form"),
        (["card", "export:gguf"], None, "adapter", "llama-server -m a-base.gguf --lora adapter.gguf"),
    ],
)
def test_each_folder_has_the_card_of_what_is_in_it(
    tmp_path: Path, asked: list[str], library: str | None, relation: str, said: str
) -> None:
    run = make_run(tmp_path, asked, hub_base_model="org/a-base")
    follow(run)
    card = ModelCard.load(run.made[0] / "README.md")
    assert (card.data.library_name, card.data.base_model_relation) == (library, relation)
    assert said in card.text
    assert f"after {STEP} steps" in card.text
    assert not (run.saved / "README.md").exists()


def test_a_model_that_was_trained_in_full(tmp_path: Path) -> None:
    run = make_run(
        tmp_path, ["card"], full_fine_tune=True, lora_rank=None, lora_alpha=None, hub_base_model="org/a-base"
    )
    shutil.rmtree(run.saved)
    shutil.copytree(run.base, run.saved)
    (run.saved / "README.md").write_text("# the base's own")
    card = carded(run)
    assert (card.data.library_name, card.data.base_model_relation) == ("transformers", "finetune")
    assert card.data.tags == ["mulora-pipe", "full-fine-tune"]
    assert "`org/a-base`, fine-tuned in full, after 6 steps of training." in card.text
    assert "base's own" not in card.text
    assert "- trained: the model's own weights\n" in card.text
    assert "- rank" not in card.text


def test_an_adapter_that_peft_cannot_load_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path, ["card"])
    config = run.saved / "adapter_config.json"
    config.write_text(config.read_text().replace("PEANUT", "MULTIPLICATIVE_LORA"))
    card = carded(run)
    assert card.data.library_name is None
    assert "python merge_lora.py --input a-base" in card.text


def test_the_curve_is_the_losses(tmp_path: Path) -> None:
    """Well-formed by itself; pixels are an affine map of steps and losses, found from two points and true of the others."""
    run = make_run(tmp_path, ["card"])
    facts = read_facts(run.run_dir, Saved(run.saved, run.step))
    svg = "{http://www.w3.org/2000/svg}"
    root = ElementTree.fromstring(curve(facts).decode())
    assert root.tag == f"{svg}svg"
    lines = {
        e.attrib["id"]: e.find(f"{svg}path") for e in root.iter(f"{svg}g") if e.get("id", "").startswith("losses-line")
    }
    drawn = []
    for number in range(2):
        path = lines[f"losses-line{number}"]
        assert path is not None
        drawn.append([tuple(map(float, point)) for point in re.findall(r"[ML] (\S+) (\S+)", path.attrib["d"])])
    a, b = facts.training[0], facts.training[-1]
    (x0, y0), (x1, y1) = drawn[0][0], drawn[0][-1]
    for points, losses in zip(drawn, (facts.training, facts.evaluation["held_out"]), strict=True):
        for (x, y), loss in zip(points, losses, strict=True):
            # Coordinates have six digits after the point; the two that fix the map are stretched by at most ten.
            assert abs(x - (x0 + (loss.step - a.step) * (x1 - x0) / (b.step - a.step))) <= 1e-5
            assert abs(y - (y0 + (loss.loss - a.loss) * (y1 - y0) / (b.loss - a.loss))) <= 1e-5
    texts = [e.text for e in root.iter(f"{svg}text")]
    assert {"training", "held_out"} <= set(texts)


def test_long_tables_are_thinned() -> None:
    assert card_text.thinned(range(100))[::11] == [0, 99]
    assert len(card_text.thinned(range(100))) == 12


def test_modules_in_words() -> None:
    layers = [0, 1, 2, 5, 7, 8]
    modules = [f"model.layers.{n}.mlp.{name}" for n in layers for name in ("down_proj", "up_proj")]
    assert card_text.modules_in_words(modules) == "down_proj, up_proj of layers 0 to 2, 5, 7 to 8 (12 modules)"
    assert card_text.modules_in_words(["model.layers.3.o_proj"]) == "o_proj of layer 3 (1 module)"


HOSTILE = '</code><img src=x onerror=alert(1)>`<script>"; import os #|[a](http://x)\n```\n# b'


@pytest.mark.parametrize("what", ["adapter", "model", "gguf"])
def test_names_of_others_are_text_in_the_card(tmp_path: Path, what: str) -> None:
    """By another reader of Markdown: no HTML but the folding of the configuration, no link, no picture but the curve."""
    run = make_run(tmp_path, ["card"])
    facts = read_facts(run.run_dir, Saved(run.saved, run.step))
    parts = [part | {"devices": [HOSTILE], "versions": {"torch": HOSTILE}} for part in facts.parts]
    facts = replace(
        facts,
        base_id=None,
        name=HOSTILE,
        parts=parts,
        config=facts.config | {"model": HOSTILE, "trainable_modules": [HOSTILE]},
        adapter=facts.adapter | {"target_modules": [f"model.layers.0.{HOSTILE}"]},
    )
    folder = tmp_path / "published"
    folder.mkdir()
    if what == "adapter":
        shutil.copy(run.saved / "adapter_config.json", folder)
    elif what == "gguf":
        (folder / "adapter.gguf").write_bytes(b"")
    write_card(folder, facts, repository=None)
    card = ModelCard.load(folder / "README.md")
    assert card.data.tags == ["mulora-pipe", "multiplicative-lora"]
    blocks = MarkdownIt("commonmark").enable("table").parse(card.text)
    every = [token for block in blocks for token in (block, *(block.children or ()))]
    html = "".join(token.content for token in every if token.type in ("html_block", "html_inline"))
    assert re.findall(r"<[^>]*>", html) == ["<details>", "<summary>", "</summary>", "</details>"]
    assert not [token for token in every if token.type == "link_open"]
    assert [token.attrs["src"] for token in every if token.type == "image"] == ["loss.svg"]
    headings = [
        after.content for token, after in pairwise(blocks) if token.type == "heading_open" and token.tag == "h1"
    ]
    assert len(headings) == 1, "no name begins a part of its own"
    fences = [token for token in every if token.type == "fence"]
    assert [token.info for token in fences] == (["toml"] if what == "gguf" else ["python", "toml"])
    if what != "gguf":
        called = [
            node for node in ast.walk(ast.parse(fences[0].content)) if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        assert {node.module for node in called if isinstance(node, ast.ImportFrom)} <= {"peft", "transformers"}
        assert all(isinstance(node, ast.ImportFrom) for node in called)
