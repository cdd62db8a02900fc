"""lm-evaluation-harness through the stages: the harness's own HFLM on the whole model is the oracle, on tasks of one's own."""

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml

import evaluate_lora
from pipeline.console import UserError
from pipeline.evaluation import harness
from pipeline.evaluation.scoring import Scorer
from tests.helpers.builders import launch, save_model
from tests.helpers.families import by_peft
from tests.helpers.paths import ROOT
from tests.helpers.stages import CPU, chain

pytest.importorskip("lm_eval", reason="an optional extra; docs/evaluation.md says how to install it")

OPTIONS = [" a gate", " a low dam", " a mill race", " a boat that waits"]
TASKS: dict[str, dict[str, Any]] = {
    "rivers": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "texts": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{prompt}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "next": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{choices[answer]}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "said": {"output_type": "generate_until", "doc_to_text": "{{prompt}}", "doc_to_target": "x"},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("harness")
    model = save_model(root / "base", "qwen2", layers=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.helpers.families.load_model", lambda _: type(model).from_pretrained(root / "base"))
        by_peft(root / "base", root / "idle", "lora", size=0.0)
        by_peft(root / "base", root / "loud", "lora", size=0.3)
    rows = [
        {"prompt": f"Number {n} of the river is" + " long" * (40 * n), "choices": OPTIONS[: 2 + n % 3], "answer": n % 2}
        for n in range(9)  # the last ones are longer than the model's 256 positions
    ]
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(root / "rows.jsonl")}}}
    (root / "tasks").mkdir()
    for name, task in TASKS.items():
        (root / "tasks" / f"{name}.yaml").write_text(
            yaml.safe_dump({"task": name, "test_split": "test", **data, **task})
        )
    (root / "eval.toml").write_text(
        f"model = '{root / 'base'}'\noutput_dir = '{root / 'out'}'\nmodel_weight_dtype = 'float32'\n"
        f"tasks = ['rivers', 'texts', 'next']\ntasks_folder = '{root / 'tasks'}'\nbootstrap_resamples = 200\n"
    )
    return root


def test_figures_are_those_of_the_harness_itself(place: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    tasks = harness.load(["rivers", "texts", "next"], place / "tasks")
    stages = chain(place / "base", [0, 1, 2])
    scorer = Scorer(
        stages, CPU, torch.float32, 2, micro_batch_size=1
    )  # as the harness's below, so that shapes are the same
    ours = harness.run("base", scorer, tokenizer, stages[0].model, tasks, None)
    whole = AutoModelForCausalLM.from_pretrained(place / "base").eval()
    hflm = HFLM(pretrained=whole, tokenizer=tokenizer, batch_size=1)
    theirs = simple_evaluate(hflm, tasks=list(tasks.values()), bootstrap_iters=0)
    for result in ours:
        samples = sorted(theirs["samples"][result.task], key=lambda sample: sample["doc_id"])
        assert len(samples) == len(result.documents) == 9
        for document, sample in zip(result.documents, samples, strict=True):
            right = [answer for of_request in sample["resps"] for answer in of_request]
            lps = [answer[0] if isinstance(answer, tuple | list) else answer for answer in right]
            assert document.logprobs == pytest.approx(lps, rel=2**-23), "a bit of fp32 at most"
        expected = {key.partition(",")[0]: v for key, v in theirs["results"][result.task].items()}
        for name, value in result.summary.items():
            # A perplexity is e to a power below 100, of which such sums are off by 2⁻²³.
            assert value == pytest.approx(expected[name], rel=100 * 2**-23), name


def test_a_task_is_a_column_of_the_table(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["--config", str(place / "eval.toml"), "--adapters", str(place / "loud"), str(place / "idle")]
    monkeypatch.setattr(sys, "argv", ["evaluate_lora.py", *given])
    assert evaluate_lora.main() == 0
    (folder,) = place.glob("out/2*")
    cells = list(csv.DictReader((folder / "table.csv").open()))
    facts = json.loads((folder / "evaluation.json").read_text())
    for told in facts["tasks"]:
        mine = {c["measure"]: c for c in cells if (c["adapter"], c["dataset"]) == (told["adapter"], told["task"])}
        for name in set(mine) & set(told):
            assert float(mine[name]["value"]) == pytest.approx(told[name], rel=1e-9), name
            assert mine[name]["role"] == "unrelated"
    assert {c["measure"] for c in cells} == {"acc", "acc_norm", "bits_per_byte"}
    assert [(light["adapter"], light["what"]) for light in facts["lights"]] == [("idle", "inactive")]
    assert len(pq.read_table(folder / "tasks.parquet")) == 3 * 3 * 9


@pytest.mark.parametrize(
    ("tasks", "folder", "said"),
    [
        (["rivrs"], "tasks", "lm-evaluation-harness knows no 'rivrs', nor in"),
        (["said"], "tasks", "'said' asks for generate_until; here run tasks of multiple_choice"),
        (["rivers"], "nowhere", "tasks_folder = .*: no such folder"),
    ],
)
def test_what_cannot_be_run_is_said(place: Path, tasks: list[str], folder: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        harness.load(tasks, place / folder)


@pytest.mark.slow
def test_over_processes_it_is_the_same(place: Path) -> None:
    """In no particular order with the test of one process: each is compared with itself, and both leave the same rows."""
    before = set(place.glob("out/2*"))
    arguments = ["--config", str(place / "eval.toml"), "--adapters", str(place / "loud"), str(place / "idle")]
    launch(2, ROOT / "evaluate_lora.py", *arguments)
    (two,) = set(place.glob("out/2*")) - before
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["evaluate_lora.py", *arguments])
        assert evaluate_lora.main() == 0
    (one,) = set(place.glob("out/2*")) - before - {two}
    assert pq.read_table(one / "tasks.parquet") == pq.read_table(two / "tasks.parquet")
