"""evaluate_lora.py as users start it: its records are plain transformers' log-probabilities; what it refuses."""

import csv
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pyarrow.parquet as pq
import pytest
import tomli_w
import torch

import evaluate_lora
from pipeline.commands.evaluate import names
from pipeline.console import UserError
from pipeline.model import weights
from tests.helpers.builders import BOOKS, launch, save_model
from tests.helpers.families import by_peft
from tests.helpers.paths import ROOT

MAIN = "pref_acc_mean"
SUMS = 1e-5  # fp32 sums of some twenty log-probabilities of about −6, in another order
LETTERS = ["yes", "no", "maybe", "never"]
PAIRS = [(f"Say {n}:", f" the number {n * 7}", f" a river {n % 5}") for n in range(24)]


class Place(NamedTuple):
    """A model with two adapters of it, of which 'idle' changes nothing, and rows to score."""

    root: Path
    base: Any
    adapted: Any
    config: dict[str, Any]

    def write(self, **changes: Any) -> Path:
        file = self.root / "eval.toml"
        file.write_text(tomli_w.dumps(self.config | changes))
        return file

    @property
    def adapters(self) -> list[str]:
        return ["base", str(self.root / "loud"), str(self.root / "idle")]


def preferred(model: Any, folder: Path) -> list[dict[str, str]]:
    """PAIRS with the answer as chosen whose tokens `model` finds likelier in the mean, as if it had been taught them."""
    from transformers import AutoTokenizer

    tokenizer, rows = AutoTokenizer.from_pretrained(folder), []
    for prompt, *answers in PAIRS:
        means = [oracle(model, tokenizer, prompt, a, eos=True) / (len(tokenizer(a)["input_ids"]) + 1) for a in answers]
        chosen, rejected = answers if means[0] > means[1] else answers[::-1]
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def made(root: Path) -> Place:
    base = save_model(root / "base", "qwen2", layers=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.helpers.families.load_model", lambda _: type(base).from_pretrained(root / "base"))
        by_peft(root / "base", root / "idle", "lora", size=0.0)
        adapted = by_peft(root / "base", root / "loud", "lora", size=0.3)
    spoken = [{"prompt": f"Say {n}:", "completion": f" the number {n * 7}"} for n in range(12)]
    asked = [{"prompt": f"Is it {n}?", "choices": LETTERS[: 2 + n % 3], "answer": 0} for n in range(8)]
    taught = preferred(adapted, root / "base")
    for name, rows in (("spoken", spoken), ("asked", asked), ("taught", taught)):
        (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    of_both = {"sequence_len": 96}
    datasets = [
        {"name": "spoken", "role": "in-sample", "dataset_type": "completion", **of_both},
        {"name": "asked", "role": "ood", "dataset_type": "multiple_choice", "permutations": 3, **of_both},
    ]
    pairs = {"role": "in-sample", "dataset_type": "preference", **of_both}
    datasets += [
        {"name": "taught", **pairs},
        {"name": "turned", **pairs, "field_chosen": "rejected", "field_rejected": "chosen"},
    ]
    for table in datasets:
        table["dataset_path"] = str(root / f"{table['name']}.jsonl".replace("turned", "taught"))
    book = {"name": "book", "dataset_type": "textfile", "dataset_path": str(BOOKS / "the_salt_ledger.md")}
    datasets.append({**book, "role": "unrelated", "sequence_len": 64, "subsample": 0.01})
    config = {
        "model": str(root / "base"),
        "output_dir": str(root / "out"),
        "model_weight_dtype": "float32",
        "micro_batch_size_per_gpu": 4,
        "bootstrap_resamples": 200,
        "datasets": datasets,
    }
    return Place(root, base, adapted, config)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return made(tmp_path_factory.mktemp("place"))


def run(place: Place, monkeypatch: pytest.MonkeyPatch, *arguments: object, **changes: Any) -> Path:
    """The folder that an evaluation leaves."""
    given = ["--config", place.write(**changes), *arguments]
    monkeypatch.setattr(sys, "argv", ["evaluate_lora.py", *map(str, given)])
    before = {p.name for p in place.root.glob("out/2*")}
    assert evaluate_lora.main() == 0
    (folder,) = (p for p in place.root.glob("out/2*") if p.name not in before)
    return folder


@pytest.fixture(scope="module")
def folder(place: Place) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        loads = mock.Mock(wraps=weights.load)
        patch.setattr(weights, "load", loads)
        made = run(place, patch, "--adapters", *place.adapters)
    assert loads.call_count == 1, "the base is loaded once, however many adapters there are"
    return made


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return pq.read_table(folder / "records.parquet").to_pylist()


def oracle(model: Any, tokenizer: Any, prompt: str, completion: str, eos: bool) -> float:
    """By transformers, a row at a time, from log_softmax over all logits."""
    before = tokenizer(prompt)["input_ids"]
    ids = torch.tensor([before + tokenizer(completion)["input_ids"] + [2] * eos])
    with torch.no_grad():
        logged = model(ids).logits.float().log_softmax(-1)
    places = range(len(before), ids.shape[1])
    return float(sum(logged[0, place - 1, ids[0, place]] for place in places))


def test_records_are_transformers_log_probabilities(place: Place, folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place.root / "base")
    found = [row for row in rows_of(folder) if row["dataset"] == "spoken"]
    assert [row["adapter"] for row in found] == ["base"] * 12 + ["loud"] * 12 + ["idle"] * 12
    for row in found:
        number = int(row["place"].rpartition(":")[2]) - 1
        model = place.adapted if row["adapter"] == "loud" else place.base
        text = f" the number {number * 7}"
        right = oracle(model, tokenizer, f"Say {number}:", text, eos=True)
        assert row["lp_w"] == pytest.approx(right, rel=SUMS)
        assert row["ref_w"] == pytest.approx(oracle(place.base, tokenizer, f"Say {number}:", text, eos=True), rel=SUMS)
        assert row["bytes_w"] == len(text)
        assert row["lp_l"] is None
    assert len({row["lp_w"] for row in found}) == 24  # loud's are its own


def test_pairs_are_transformers_log_probabilities(place: Place, folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place.root / "base")
    pairs = [json.loads(line) for line in (place.root / "taught.jsonl").read_text().splitlines()]
    found = [row for row in rows_of(folder) if row["dataset"] == "taught" and row["adapter"] == "loud"]
    assert len(found) == len(pairs) == 24
    for row, pair in zip(found, pairs, strict=True):
        for which, key in (("w", "chosen"), ("l", "rejected")):
            given = (tokenizer, pair["prompt"], pair[key], True)
            assert row[f"lp_{which}"] == pytest.approx(oracle(place.adapted, *given), rel=SUMS)
            assert row[f"ref_{which}"] == pytest.approx(oracle(place.base, *given), rel=SUMS)
            assert row[f"n_{which}"] == len(tokenizer(pair[key])["input_ids"]) + 1
            assert row[f"bytes_{which}"] == len(pair[key])


def test_what_was_taught_is_learnt_and_with_labels_turned_round_is_the_opposite(folder: Path) -> None:
    cells = {
        (c["dataset"], c["adapter"]): c for c in csv.DictReader((folder / "table.csv").open()) if c["measure"] == MAIN
    }
    assert float(cells["taught", "loud"]["value"]) == 1
    assert float(cells["turned", "loud"]["value"]) == 0
    assert float(cells["taught", "loud"]["delta_low"]) > 0
    lights = json.loads((folder / "evaluation.json").read_text())["lights"]
    of_loud = {(light["dataset"], light["what"]) for light in lights if light["adapter"] == "loud"}
    assert ("turned", "learned the opposite") in of_loud
    assert of_loud.isdisjoint({("taught", "learned the opposite"), ("taught", "did not learn")})


def test_options_are_scored_where_they_are_listed(place: Place, folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place.root / "base")
    found = [row for row in rows_of(folder) if row["dataset"] == "asked" and row["adapter"] == "loud"]
    assert len(found) == 8 * 3 - 3  # three questions have two options, and as many orders
    for row in found:
        number = int(row["place"].rpartition(":")[2]) - 1
        listed = "".join(f"{letter}. {LETTERS[o]}\n" for letter, o in zip("ABCD", row["order"], strict=False))
        right = [
            oracle(place.adapted, tokenizer, f"Is it {number}?\n{listed}Answer:", f" {letter}", eos=False)
            for letter in "ABCD"[: len(row["order"])]
        ]
        assert row["lp_options"] == pytest.approx(right, rel=SUMS)
        assert row["order"][row["right"]] == 0
        assert row["lp_w"] == row["lp_options"][row["right"]]
        assert row["lp_l"] == max(lp for place, lp in enumerate(row["lp_options"]) if place != row["right"])


def test_an_adapter_whose_B_is_zero_is_inactive(folder: Path) -> None:
    lights = json.loads((folder / "evaluation.json").read_text())["lights"]
    assert [light["what"] for light in lights if light["adapter"] == "idle"] == ["inactive"]
    assert "inactive" not in [light["what"] for light in lights if light["adapter"] == "loud"]


def test_the_base_is_what_it_was_after_every_adapter(folder: Path) -> None:
    """To the bit: 'idle' is measured after 'loud', whose modules were taken out again."""
    by_adapter = {
        name: [r["lp_w"] for r in rows_of(folder) if r["adapter"] == name] for name in ("base", "loud", "idle")
    }
    assert list(dict.fromkeys(r["adapter"] for r in rows_of(folder))) == ["base", "loud", "idle"]
    assert by_adapter["idle"] == by_adapter["base"]
    assert by_adapter["loud"] != by_adapter["base"]


def test_every_form_has_the_same_figures(folder: Path) -> None:
    cells = list(csv.DictReader((folder / "table.csv").open()))
    assert {(c["adapter"], c["dataset"]) for c in cells} == {
        (a, d) for a in ("base", "idle", "loud") for d in ("spoken", "asked", "book", "taught", "turned")
    }
    page = (folder / "table.md").read_text()
    for cell in cells:
        assert f"{float(cell['value']):.3f}" in page
    spoken = [row for row in rows_of(folder) if (row["adapter"], row["dataset"]) == ("loud", "spoken")]
    nll = -sum(row["lp_w"] for row in spoken) / sum(row["n_w"] for row in spoken)
    (cell,) = (c for c in cells if (c["adapter"], c["dataset"], c["measure"]) == ("loud", "spoken", "nll"))
    assert float(cell["value"]) == pytest.approx(nll, rel=1e-12)
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.parent.glob(".*partial*"))


@pytest.mark.parametrize(
    ("changes", "arguments", "said"),
    [
        ({"lora_rank": 4}, [], r"lora_rank: unknown key. It is a key of a training"),
        ({"adaptors": ["x"]}, [], r"adaptors: unknown key. Did you mean 'adapters'\?"),
        ({"adapters": ["x", "x"]}, [], r"'x' is named twice"),
        ({}, ["--adapters", "nowhere"], r"there is no folder nowhere"),
        ({}, ["--set", "datasets.0.role=train"], r"datasets.0.role = \"train\": input should be 'in-sample'"),
        (
            {},
            ["--set", "datasets.0.permutations=3"],
            r"datasets.0.permutations: has a meaning for 'multiple_choice' only",
        ),
        ({}, ["--set", "datasets.1.train_on=last"], r"datasets.1.train_on: has a meaning for rows that are trained on"),
        ({"batch_size_tokens": 8}, [], r"batch_size_tokens = 8 does not hold the longest row"),
        ({"datasets": []}, [], r"datasets: there is nothing to measure; give \[\[datasets\]\] or tasks"),
        ({"num_fewshot": 2}, [], r"num_fewshot: has a meaning with tasks only"),
        ({}, ["--tasks", "spoken"], r"datasets.name: 'spoken' is a task's name as well"),
        ({"pipeline_stages": 2}, [], r"pipeline_stages = 2 does not divide the number of processes, 1"),
        ({"model": "nowhere"}, [], r"model = 'nowhere': no such folder"),
        ({}, ["--set", "datasets.0.dataset_path=none.jsonl"], r"none.jsonl"),
    ],
)
def test_what_is_wrong_is_said(
    place: Place, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], arguments: list[str], said: str
) -> None:
    with pytest.raises(UserError, match=said) as raised:
        run(place, monkeypatch, *arguments, **changes)
    assert raised.value.exit_code == 2


def test_without_the_harness_it_is_said_how_to_get_it(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.evaluation.harness.importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"^tasks: lm-evaluation-harness is not installed: pip install --no-deps 'lm_eval"
    ):
        run(place, monkeypatch, "--tasks", "hellaswag")


def test_weights_that_overflow_are_named(place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in (place.root / "loud").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file({name: t * 1e30 for name, t in tensors.items()}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(
        UserError, match=rf"adapter '{tmp_path.name}': the log-probability of row 0 of dataset 'spoken'"
    ):
        run(place, monkeypatch, "--adapters", tmp_path)


def test_names_are_the_shortest_ends_that_differ(tmp_path: Path) -> None:
    paths = [tmp_path / one for one in ("a/step10", "b/step10", "b/step20", "c/base")]
    assert names(paths) == ["a/step10", "b/step10", "step20", "c/base"]
    with pytest.raises(UserError, match="is named twice"):
        names([tmp_path / "a", tmp_path / "b/../a"])


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "changes"), [(2, {}), (4, {"pipeline_stages": 2})], ids=["stages", "replicas"])
def test_over_processes_the_records_are_the_same(
    place: Place, folder: Path, processes: int, changes: dict[str, Any]
) -> None:
    before = set(place.root.glob("out/2*"))
    config = place.write(**changes)
    said = launch(processes, ROOT / "evaluate_lora.py", "--config", str(config), "--adapters", *place.adapters)
    (made,) = set(place.root.glob("out/2*")) - before
    assert rows_of(made) == rows_of(folder)
    assert "STOP  idle: inactive" in said
    assert said.count("data:     spoken (in-sample)") == 1
