"""The training options in a configuration: what LoRA+'s two keys mean together, and which options go with what."""

from typing import Any

import pytest
import tomli

from pipeline.config import loading
from tests.helpers.configs import problems, small


def optimizer(**changes: Any) -> dict[str, Any]:
    return {"type": "AdamW", "lr": 1e-5, **changes}


@pytest.mark.parametrize(
    ("keys", "ratio"),
    [
        ({}, 1.0),
        ({"loraplus_lr_ratio": 20.0}, 20.0),
        ({"use_loraplus": True}, 16.0),  # qlora-pipe's default
        ({"use_loraplus": True, "loraplus_lr_ratio": 8}, 8.0),
        ({"use_loraplus": False}, 1.0),
        ({"use_loraplus": False, "loraplus_lr_ratio": 8}, 1.0),  # off in qlora-pipe, too
    ],
)
def test_loraplus(keys: dict[str, Any], ratio: float) -> None:
    assert loading.validate(small(optimizer=optimizer(**keys)), "x.toml").optimizer.loraplus == ratio


OPTIONS = {"composite_weight_decay": 0.1, "scale_weight_norms": 1.0, "neftune_noise_alpha": 5.0, "init_adapter": "a"}


@pytest.mark.parametrize("family", ["multiplicative_lora", "lora"])
def test_all_options_go_with_a_pair_of_a_and_b(family: str) -> None:
    raw = small(adapter_type=family, optimizer=optimizer(loraplus_lr_ratio=16), **OPTIONS)
    assert loading.validate(raw, "x.toml")


@pytest.mark.parametrize("key", OPTIONS)
@pytest.mark.parametrize("value", [0, -1.0, True, ""])
def test_values_that_mean_nothing(key: str, value: Any) -> None:
    (line,) = problems(small(**{key: value}))
    assert line.startswith(key)


@pytest.mark.parametrize("key", ["composite_weight_decay", "scale_weight_norms"])
@pytest.mark.parametrize("family", ["moslora", "control_adapter"])
def test_products_that_are_not_there(key: str, family: str) -> None:
    alpha = 8 if family == "moslora" else None
    (line,) = problems(small(adapter_type=family, lora_alpha=alpha, **{key: 0.5}))
    assert line == f"{key}: adapter_type = '{family}' has no product s·B·A; it is for 'multiplicative_lora', 'lora'"


@pytest.mark.parametrize("key", ["composite_weight_decay", "scale_weight_norms", "init_adapter"])
def test_what_does_not_go_with_a_start_from_the_weight(key: str) -> None:
    (line,) = problems(small(adapter_type="lora", init_lora_weights="pissa", **{key: OPTIONS[key]}))
    assert line.startswith(key)


def test_loraplus_needs_a_b() -> None:
    raw = small(adapter_type="control_adapter", lora_alpha=None, optimizer=optimizer(loraplus_lr_ratio=16))
    (line,) = problems(raw)
    assert line.startswith("optimizer.loraplus_lr_ratio: adapter_type = 'control_adapter' has no B to learn faster")
    assert loading.validate(small(adapter_type="moslora", optimizer=optimizer(loraplus_lr_ratio=16)), "x.toml")


def test_full_fine_tuning_has_noise_and_none_of_the_others() -> None:
    raw = small(full_fine_tune=True, optimizer=optimizer(use_loraplus=True), **OPTIONS)
    lines = problems(raw)
    told = [line.split(":")[0] for line in lines]
    assert sorted(told) == sorted({*OPTIONS, "optimizer.loraplus_lr_ratio"} - {"neftune_noise_alpha"})


def test_a_runs_own_copy_of_its_configuration_reads_as_it_was() -> None:
    """Tables with patterns for keys, and a list of tables in [optimizer], through TOML and back."""
    groups = [{"names": ["B", r"layers\.0\..*"], "lr_ratio": 2.0, "beta1": 0.5}]
    raw = small(
        rank_pattern={"layers.0.mlp.down_proj": 8}, alpha_pattern={r".*o_proj": 2.0}, optimizer=optimizer(groups=groups)
    )
    config = loading.validate(raw, "x.toml")
    assert loading.validate(tomli.loads(loading.to_toml(config)), "x.toml") == config
    assert config.optimizer.groups[0].beta1 == 0.5
    assert config.rank_pattern == {"layers.0.mlp.down_proj": 8}


TALKS = {"name": "a", "dataset_type": "chat", "dataset_path": "a.jsonl", "sequence_len": 64}
BOOK = {"name": "a", "dataset_type": "textfile", "dataset_path": "a.txt", "sequence_len": 64}


@pytest.mark.parametrize(
    ("dataset", "apart"),
    [
        (BOOK, False),
        ({**BOOK, "document_mask": True}, True),
        (TALKS, False),
        ({**TALKS, "packing": "best_fit"}, True),
        ({**TALKS, "packing": "stream"}, True),
        ({**TALKS, "packing": "stream", "document_mask": False}, False),
    ],
)
def test_which_documents_are_kept_apart(dataset: dict[str, Any], apart: bool) -> None:
    assert loading.validate(small(datasets=[dataset]), "x.toml").datasets[0].keeps_apart is apart


def test_packing_where_it_means_nothing_or_would_spoil_a_score() -> None:
    (problem,) = problems(small(datasets=[{**TALKS, "document_mask": True}]))
    assert problem.startswith("datasets.0.document_mask: has a meaning with packing only")
    (problem,) = problems(small(eval_datasets=[{**TALKS, "name": "b", "packing": "stream"}]))
    assert problem.startswith("eval_datasets.0.packing: 'stream' would score what it cuts")
    (problem,) = problems(small(datasets=[{**BOOK, "packing": "stream"}]))
    assert problem.startswith("datasets.0.packing: has a meaning for 'chat' and 'completion'")
