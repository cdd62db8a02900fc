"""qlora-pipe's dataset_type = 'axolotl': what a YAML file of axolotl's stands for here, and what of it has no counterpart."""

import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import loading
from tests.helpers.configs import problems, small

# qlora-pipe's own two examples, and each kind that has a counterpart: the file, and our keys for its first dataset.
FILES: dict[str, tuple[str, dict[str, Any]]] = {
    "alpaca": (
        "datasets:\n  - path: vicgalle/alpaca-gpt4\n    type: alpaca\n",
        {"dataset_type": "completion", "dataset_path": "hub:vicgalle/alpaca-gpt4", "chat_template": "alpaca"},
    ),
    "capybara": (
        "chat_template: llama3\ndatasets:\n  - path: ssmi153/Capybara-ShareGPT\n    type: chat_template\n\n"
        "    field_messages: conversations\n    message_field_role: from\n    message_field_content: value\n",
        {
            "dataset_type": "chat",
            "dataset_path": "hub:ssmi153/Capybara-ShareGPT",
            "chat_template": "llama3",
            "field_messages": "conversations",
            "message_property_mappings": {"role": "from", "content": "value"},
        },
    ),
    "a split at a revision": (
        "datasets: [{path: a/b, type: completion, field: body, split: test, name: en, revision: v1}]",
        {"dataset_type": "doclist", "dataset_path": "hub:a/b@v1:en/test", "field_text": "body"},
    ),
    "files": (
        "datasets: [{path: json, data_files: [talks/*.jsonl], type: chat_template, ds_type: json, roles_to_train: [assistant], "
        "message_property_mappings: {role: role, content: text}, roles: {user: [customer]}, train_on_eos: last}]",
        {
            "dataset_type": "chat",
            "dataset_path": "talks/*.jsonl",
            "message_property_mappings": {"content": "text"},
            "roles": {"user": ["customer"]},
            "train_on_eos": "last",
            "chat_template": None,
        },
    ),
    "token ids": (
        "val_set_size: 0.1\ndatasets: [{path: ids/*.parquet, type: }]",
        {"dataset_type": "pretokenized", "dataset_path": "ids/*.parquet", "eval_size": 0.1},
    ),
    "a template of its own": (
        "chat_template: chatml\n"
        "datasets: [{path: a/b, type: chat_template, chat_template: jinja, chat_template_jinja: '{{ x }}'}]",
        {"dataset_type": "chat", "chat_template": "{{ x }}"},
    ),
    "the tokenizer's template": (
        "chat_template: chatml\ndatasets: [{path: a/b, type: chat_template, chat_template: tokenizer_default}]",
        {"dataset_type": "chat", "chat_template": None},
    ),
}
OTHERS = {
    "datasets: [{path: a/b, type: sharegpt}]": r"datasets\.0\.type: sharegpt has no counterpart; 'completion', 'chat_template'",
    "datasets: [{path: a/b, type: {format: '{instruction}'}}]": r"type: \(a format of its own\) has no counterpart",
    "datasets: [{type: alpaca}]": r"datasets\.0\.path: not given",
    "datasets: [{path: a/b, type: alpaca, shards: 4}]": r"datasets\.0\.shards: 4 has no counterpart; remove it",
    "datasets: [{path: a/b, type: alpaca, data_files: x.json}]": r"data_files: x\.json: only with path: json",
    "datasets: [{path: json, type: alpaca, data_files: [a, b]}]": r"data_files: .*: give one file, or a glob",
    "datasets: [{path: a.jsonl, type: alpaca, split: test}]": r"split: test: files have none; name the file",
    "datasets: [{path: a/b, type: chat_template, train_on_eos: all}]": r"train_on_eos: 'all' would train",
    "datasets: [{path: a/b, type: chat_template, roles_to_train: [user]}]": r"roles_to_train: .* has no counterpart",
    "datasets: [{path: a/b, type: chat_template, chat_template: phi_3}]": r"chat_template: phi_3 has no counterpart by name",
    "datasets: [{path: a/b, type: chat_template, message_property_mappings: {weight: w}}]": r"only role and content.*not weight",
    "rl: dpo\ndatasets: [{path: a/b, type: alpaca}]": r"rl = dpo is not read from this file; remove it",
    "train_on_inputs: true\ndatasets: [{path: a/b, type: alpaca}]": r"train_on_inputs = True is not read from this file",
    "datasets: []": r"has no list of datasets",
    "- a": r"it does not read as YAML.*not a mapping",
    "a: [": r"it does not read as YAML",
}


def raw(folder: Path, yaml: str | None, **changes: Any) -> dict[str, Any]:
    if yaml is not None:
        (folder / "a.yml").write_text(yaml)
    table = {"name": "a", "dataset_type": "axolotl", "dataset_path": str(folder / "a.yml"), "sequence_len": 64}
    return small(datasets=[table | changes])


@pytest.mark.parametrize("which", FILES)
def test_a_file_of_axolotls_stands_for_a_dataset_of_ours(which: str, tmp_path: Path) -> None:
    yaml, ours = FILES[which]
    (dataset,) = loading.validate(raw(tmp_path, yaml, subsample=0.5), "x.toml").datasets
    assert {key: getattr(dataset, key) for key in ours} == ours
    assert (dataset.name, dataset.sequence_len, dataset.subsample) == ("a", 64, 0.5)


def test_the_text_that_differs_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loading.validate(raw(tmp_path, FILES["alpaca"][0]), "x.toml")
    assert "instruction and input are one turn of the built-in template 'alpaca'" in capsys.readouterr().err


def test_several_datasets_of_a_file_are_tables_of_their_own(tmp_path: Path) -> None:
    yaml = "datasets: [{path: a/b, type: completion}, {path: c/d, type: alpaca}]"
    both = loading.validate(raw(tmp_path, yaml, eval_size=0.1, num_repeats=2), "x.toml").datasets
    assert [(one.name, one.dataset_type, one.eval_size, one.num_repeats) for one in both] == [
        ("a.0", "doclist", 0.1, 2),
        ("a.1", "completion", 0.1, 2),
    ]
    (line,) = problems(raw(tmp_path, yaml, eval_size=7))
    assert "eval_size: 7 would be held out of each of the 2 datasets" in line
    (line,) = problems(raw(tmp_path, yaml) | {"dataset_combination_mode": "interleave"})
    assert "has 2 datasets, which interleaving would weigh one by one" in line


@pytest.mark.parametrize("yaml", OTHERS)
def test_what_has_no_counterpart_is_refused_by_name(yaml: str, tmp_path: Path) -> None:
    (line,) = problems(raw(tmp_path, yaml))
    assert line.startswith("datasets.0.dataset_path")
    assert re.search(OTHERS[yaml], line), line


def test_a_file_that_is_not_there_is_one_problem(tmp_path: Path) -> None:
    (line,) = problems(raw(tmp_path, None))
    assert line.startswith("datasets.0.dataset_path")
    assert "a.yml" in line
