"""What people write who come from other trainers, from Python, YAML and Windows, and what they are told.

The keys are those of the examples that axolotl, LLaMA-Factory, transformers, TRL and unsloth publish.
"""

from pathlib import Path
from typing import Any

import pytest
import tomli
import tomli_w

from pipeline.config import loading, peers
from pipeline.config.data_tables import Dataset
from pipeline.config.schema import Config
from pipeline.config.tables import Optimizer
from pipeline.config.warnings import warnings_of
from pipeline.console import UserError
from pipeline.names import as_ranges, layer_ranges
from tests.helpers.configs import problems, small

HELD_OUT = {"datasets": [{**small()["datasets"][0], "eval_size": 4}]}
THEIRS = {
    # axolotl
    "base_model": "model",
    "adapter": "adapter_type",
    "lora_r": "lora_rank",
    "lora_target_modules": "target_modules",
    "lora_target_linear": "target_modules",
    "lora_modules_to_save": "trainable_modules",
    "micro_batch_size": "micro_batch_size_per_gpu",
    "num_epochs": "epochs",
    "learning_rate": "optimizer.lr",
    "val_set_size": "eval_size",
    "sample_packing": "packing",
    "flash_attention": "attn_implementation",
    "gradient_checkpointing": "activation_checkpointing",
    "evals_per_epoch": "eval_steps",
    "saves_per_epoch": "save_steps",
    "wandb_project": "tracker_project",
    "bf16": "model_weight_dtype",
    "tf32": "model_weight_dtype",
    "load_in_8bit": "[[quantization.bnb]]",
    "dataset_prepared_path": "no counterpart",
    "noisy_embedding_alpha": "neftune_noise_alpha",
    "deepspeed": "--deepspeed_config",
    "fsdp": "pipeline_stages",
    "peft_use_dora": "use_dora",
    "optimizer_type": "optimizer.type",
    "cosine_min_lr_ratio": "optimizer.lr_min",
    "lora_mlp_kernel": "kernels",
    "activation_offloading": "unsloth",
    # LLaMA-Factory
    "model_name_or_path": "model",
    "finetuning_type": "adapter_type",
    "lora_target": "target_modules",
    "cutoff_len": "sequence_len",
    "dataset_dir": "dataset_path",
    "val_size": "eval_size",
    "quantization_bit": "load_in_4bit",
    "pissa_init": "init_lora_weights",
    "additional_target": "trainable_modules",
    "max_samples": "subsample",
    "template": "chat_template",
    "train_on_inputs": "no counterpart",
    "flash_attn": "attn_implementation",
    # transformers, TRL
    "per_device_train_batch_size": "micro_batch_size_per_gpu",
    "num_train_epochs": "epochs",
    "max_grad_norm": "gradient_clipping",
    "warmup_ratio": "warmup_steps",
    "lr_scheduler_type": "lr_scheduler",
    "optim": "optimizer.type",
    "adam_beta1": "optimizer.beta1",
    "save_total_limit": "keep_states",
    "max_seq_length": "sequence_len",
    "report_to": "trackers",
    "push_to_hub": "after_training",
    "eval_strategy": "eval_steps",
    "Learning-Rate": "optimizer.lr",
    "torch_dtype": "model_weight_dtype",
    "dpo_beta": "preference",
}


@pytest.mark.parametrize(("theirs", "ours"), THEIRS.items())
def test_a_peers_key_is_told_ours(theirs: str, ours: str) -> None:
    (line,) = problems({**small(), theirs: 1})
    told = line.removeprefix(f"{theirs}: unknown key.").lower()
    assert told != line
    assert ours.strip("[]") in told


@pytest.mark.parametrize(
    ("table", "key", "ours"),
    [
        ("datasets", "path", "dataset_path"),
        ("datasets", "type", "dataset_type"),
        ("optimizer", "betas", "beta1"),
        ("optimizer", "learning_rate", "lr"),
    ],
)
def test_a_peers_key_within_a_table(table: str, key: str, ours: str) -> None:
    raw = small()
    where: Any = raw[table]
    (where[0] if isinstance(where, list) else where)[key] = 1
    (line,) = problems(raw)
    assert ours in line.partition("unknown key.")[2]


def test_every_key_the_table_offers_exists() -> None:
    """The first word of an answer is one of our keys, a table, or says that there is none."""
    ours = {*Config.model_fields, *Dataset.model_fields, *Optimizer.model_fields}
    tables = (peers.INSTEAD, peers.IN_DATASETS, peers.IN_OPTIMIZER)
    for theirs, answer in ((t, a) for table in tables for t, a in table.items()):
        first = answer.split()[0].strip(",;")
        known = first.split(".")[-1] in ours or first.startswith(("[", "no", "preference", "chat"))
        assert known, (theirs, answer)
    assert not set(peers.INSTEAD) & set(Config.model_fields), "these are keys here"
    assert not set(peers.IN_DATASETS) & set(Dataset.model_fields)


def test_without_a_good_match_none_is_given_and_the_valid_keys_once() -> None:
    with pytest.raises(UserError) as caught:
        loading.validate({**small(), "wibble": 1, "zzz_top": 2}, "x.toml")
    said = str(caught.value)
    assert "Did you mean" not in said
    assert said.count("Valid keys at the top level: model, output_dir") == 1
    assert "x.toml has 2 problem(s)" in said


# What is not TOML


@pytest.mark.parametrize(
    ("line", "number", "mend"),
    [
        ("full_fine_tune = True", 2, "lower case"),
        ("eval_steps = None", 2, "leave the key out"),
        ("model = /mnt/models/x", 2, "needs quotes"),
        ("adapter_type = lora", 2, "needs quotes"),
        ('model = "C:\\models\\x"', 2, "single quotes"),
        ("epochs: 1", 2, "key = value"),
        ("epochs =", 2, "value is missing"),
        ("epochs", 2, "key = value"),
        ("seed = 1\nseed = 2", 3, "twice (first in line 2)"),
        ("[optimizer]\nlr = 1\n[optimizer]\nlr = 2", 4, "twice (first in line 2)"),
        ("[datasets]\nname = 'a'\n[datasets]\nname = 'b'", 4, "[[datasets]]"),
        ("[datasets]\nname = 'a'\n[[datasets]]\nname = 'b'", 4, "[[datasets]]"),
    ],
)
def test_a_line_that_is_not_toml_is_shown_with_its_remedy(tmp_path: Path, line: str, number: int, mend: str) -> None:
    (tmp_path / "x.toml").write_text(f"# a comment\n{line}\n# another\n")
    with pytest.raises(UserError) as caught:
        loading.load(str(tmp_path / "x.toml"))
    assert f"line {number}" in str(caught.value)
    assert mend in str(caught.value)


def test_a_mark_at_the_beginning_is_no_mistake(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_bytes(b"\xef\xbb\xbf" + tomli_w.dumps(small(adapter_type="lora")).encode())
    assert loading.load(str(tmp_path / "x.toml")).adapter_type == "lora"


# Values of another shape, and what was accepted in silence


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layers_to_transform": [0, 1, 2, 7]}, "layers_to_transform = '0:2,7'"),
        ({"datasets": small()["datasets"][0]}, "write [[datasets]] with double brackets"),
        ({"eval_datasets": small()["datasets"][0]}, "write [[eval_datasets]] with double brackets"),
        ({"resume_from_checkpoint": "false"}, "without quotes"),
        ({"resume_from_checkpoint": "True"}, "without quotes"),
        ({"eval_steps": 10}, "nothing to evaluate"),
        ({"eval_before_first_step": True}, "nothing to evaluate"),
        ({"eval_after_last_step": True}, "nothing to evaluate"),
        ({"load_best_at_end": True}, "nothing to evaluate"),
        ({"early_stopping_patience": 2}, "nothing to evaluate"),
        ({"load_best_at_end": True, "eval_before_first_step": True, **HELD_OUT}, "nothing is evaluated after a step"),
        ({"early_stopping_patience": 2, "eval_after_last_step": True, **HELD_OUT}, "give eval_steps"),
        ({"trackers": ["wandb", "wandb"]}, "more than once"),
        ({"tracker_options": {"wandb": {}}}, "trackers does not name 'wandb'"),
        ({"early_stopping_min_delta": 0.1, **HELD_OUT}, "only applies with early_stopping_patience"),
    ],
)
def test_refused_with_the_remedy(changes: dict[str, Any], said: str) -> None:
    (line,) = problems(small(**changes))
    assert line.startswith(next(iter(changes)))
    assert said in line


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({}, "adapter_type"),
        ({"batch_size_tokens": 64, "micro_batch_size_per_gpu": 1}, "micro_batch_size_per_gpu"),
        ({"force_constant_lr": 1e-5, "lr_scheduler": "cosine"}, "lr_scheduler"),
        ({"checkpoint_on_save": True, "checkpoint_every_n_minutes": 5.0}, "checkpoint_every_n_minutes"),
        ({"datasets": [{**small()["datasets"][0], "sample_weight": 2.0}]}, "datasets.0.sample_weight"),
    ],
)
def test_what_was_probably_not_meant_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], key: str
) -> None:
    given = {"adapter_type": "multiplicative_lora", **changes} if changes else {}
    (tmp_path / "x.toml").write_text(tomli_w.dumps(small(**given)))
    loading.load(str(tmp_path / "x.toml"))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {key}: ")


def test_the_resolved_configuration_raises_no_doubt() -> None:
    config = loading.validate(small(batch_size_tokens=64), "x")
    written = tomli.loads(loading.to_toml(config))
    assert list(warnings_of(loading.validate(written, "y"))) == []


def test_layers_as_text_read_back() -> None:
    for layers in ([0], [0, 1, 2], [5, 3, 4, 9, 9], [0, 2, 4]):
        numbers = [n for low, high in layer_ranges(as_ranges(layers)) for n in range(low, high + 1)]
        assert numbers == sorted(set(layers))
