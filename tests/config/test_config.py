"""The configuration: what is accepted, what it resolves to, what is refused of qlora-pipe's, what is generated.

Oracles: the values of the founding run as its author published them, and the list of keys that qlora-pipe reads.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import tomli
import tomli_w

from docs import generate
from pipeline.config import loading
from pipeline.config.data_tables import Dataset, EvalDataset
from pipeline.config.qlora_pipe import REFUSED
from pipeline.config.schema import Config, layer_ranges
from pipeline.config.tables import Bnb, Optimizer, Quantization, Samples, Sampling
from pipeline.console import UserError
from tests.helpers.configs import problems, small, with_key
from tests.helpers.paths import ROOT

CONFIGS = ROOT / "configs"

# The founding run, creative-writer-v0.1-alfa-35b, as its model card has it.
FOUNDING_TOML = """\
# Paths
model = '/mnt/data/c4ai-command-r-v01'
output_dir = '/mnt/data/creative-writer-v0.1-alfa-35b'

# Lora configuration
lora_rank = 64
lora_alpha = 64
lora_dropout = 0.0
target_modules = ['down_proj']
layers_to_transform = '0:38' # skip last layer

# Optimization configuration
epochs = 1
lr_scheduler = 'constant'
warmup_steps = 100
batch_size_tokens = 8192

# Performance settings
pipeline_stages = 2
logging_steps = 1
eval_steps = 100
save_steps = 100
checkpoint_every_n_minutes = 60
eval_before_first_step = true
model_weight_dtype = 'bfloat16'
lora_weight_dtype = 'bfloat16'
keep_states = 3
group_by_length = true
activation_checkpointing = 'unsloth'

# Resume a prior run
resume_from_checkpoint = false

# Dataset configuration
dataset_combination_mode = 'concatenate'
eval_gradient_accumulation_steps = 1

[optimizer]
type = 'adamw_kahan'
lr = 5e-6
beta1 = 0.9
beta2 = 0.99
weight_decay = 0.01

[[datasets]]
name = 'books'
dataset_type = 'textfile'
dataset_path = '/mnt/data/datasets/ebooks/*.txt'
sequence_len = 8192
eval_size = 0.01
"""
FOUNDING_JSON = """\
{
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 16,
    "gradient_clipping": 1.0,
    "steps_per_print": 1
}
"""
FOUNDING_VALUES: dict[str, Any] = {
    "model": "/mnt/data/c4ai-command-r-v01",
    "output_dir": "/mnt/data/creative-writer-v0.1-alfa-35b",
    "adapter_type": "multiplicative_lora",
    "full_fine_tune": False,
    "train_logit_scale": 1.0,
    "lora_rank": 64,
    "lora_alpha": 64.0,
    "lora_dropout": 0.0,
    "target_modules": ["down_proj"],
    "layers_to_transform": "0:38",
    "epochs": 1,
    "max_steps": None,
    "lr_scheduler": "constant",
    "warmup_steps": 100.0,
    "batch_size_tokens": 8192,
    "pipeline_stages": 2,
    "layers_per_stage": None,
    "logging_steps": 1,
    "eval_steps": 100,
    "save_steps": 100,
    "checkpoint_every_n_minutes": 60.0,
    "eval_before_first_step": True,
    "model_weight_dtype": "bfloat16",
    "lora_weight_dtype": "bfloat16",
    "keep_states": 3,
    "group_by_length": True,
    "activation_checkpointing": "unsloth",
    "resume_from_checkpoint": False,
    "dataset_combination_mode": "concatenate",
    "eval_gradient_accumulation_steps": 1,
    "micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 16,
    "gradient_clipping": 1.0,
    "steps_per_print": 1,
}
FOUNDING_OPTIMIZER = {"type": "adamw_kahan", "lr": 5e-6, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.01, "eps": 1e-6}
FOUNDING_DATASET = {
    "name": "books",
    "dataset_type": "textfile",
    "dataset_path": "/mnt/data/datasets/ebooks/*.txt",
    "sequence_len": 8192,
    "eval_size": 0.01,
    "eval_split": "chunk",
    "subsample": None,
}

# What qlora-pipe reads from its TOML, by table, with a value that asks for something.
QLORA_PIPE_KEYS: dict[str, dict[str, Any]] = {
    "": {
        "model": "m",
        "output_dir": "o",
        "full_fine_tune": True,
        "load_in_4bit": True,
        "lora_rank": 8,
        "lora_alpha": 8,
        "lora_dropout": 0.1,
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens"],
        "layers_to_transform": "0:3",
        "use_dora": True,
        "epochs": 2,
        "lr_scheduler": "cosine",
        "warmup_steps": 10,
        "micro_batch_size_per_gpu": 2,
        "batch_size_tokens": 4096,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "steps_per_print": 2,
        "pipeline_stages": 2,
        "use_column_major_topology": True,
        "force_constant_lr": 1e-5,
        "load_optimizer_states": False,
        "scale_weight_norms": 1.0,
        "load_balancing_loss_coef": 0.02,
        "loss_type": "focal_loss",
        "focal_loss_gamma": 2.0,
        "eval_steps": 10,
        "logging_steps": 2,
        "eval_before_first_step": True,
        "eval_after_last_step": True,
        "eval_gradient_accumulation_steps": 2,
        "save_steps": 10,
        "save_every_n_epochs": 2,
        "save_checkpoint_on_epoch_end": False,
        "checkpoint_every_n_minutes": 30,
        "checkpoint_on_save": True,
        "keep_states": 2,
        "save_dtype": "float16",
        "model_weight_dtype": "float32",
        "lora_weight_dtype": "bfloat16",
        "group_by_length": True,
        "activation_checkpointing": True,
        "attn_implementation": "sdpa",
        "offload_mlp_to_cpu": True,
        "resume_from_checkpoint": True,
        "dataset_combination_mode": "interleave",
        "dataset_interleave_stopping_strategy": "all_exhausted",
        "rejected_sampling": True,
        "rejected_sampling_max_new_tokens": 100,
        "quantization": {"bnb": {"load_in_4bit": True}},
        "rl": {"method": "dpo", "dpo_beta": 0.1},
        "sampling": {"temperature": 1.0},
    },
    "optimizer": {
        "type": "AdamW",
        "lr": 1e-5,
        "beta1": 0.8,
        "beta2": 0.9,
        "weight_decay": 0.1,
        "eps": 1e-8,
        "kahan_sum": False,
        "lr_min": 1e-6,
        "use_loraplus": True,
        "loraplus_lr_ratio": 8,
    },
    "quantization": {"hqq": {"nbits": 4}},
    "quantization.bnb": {
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_use_double_quant": True,
        "llm_int8_threshold": 5.0,
        "llm_int8_skip_modules": ["o_proj"],
        "bnb_4bit_quant_storage": "bfloat16",
        "llm_int8_has_fp16_weight": True,
        "llm_int8_enable_fp32_cpu_offload": True,
    },
    "datasets": {
        "name": "x",
        "dataset_type": "doclist",
        "dataset_path": "x.jsonl",
        "sequence_len": 64,
        "eval_size": 3,
        "sample_weight": 2.0,
        "subsample": 0.5,
        "num_repeats": 2,
    },
    "eval_datasets": {"name": "y", "dataset_type": "textfile", "dataset_path": "y.txt", "sequence_len": 64},
}
SECTIONS = {
    "": Config,
    "optimizer": Optimizer,
    "datasets": Dataset,
    "eval_datasets": EvalDataset,
    "quantization": Quantization,
    "quantization.bnb": Bnb,
    "samples": Samples,
    "sampling": Sampling,
}
KEYS = [(table, key) for table, keys in QLORA_PIPE_KEYS.items() for key in keys]


@pytest.fixture
def founding(tmp_path: Path) -> tuple[str, str]:
    toml, js = tmp_path / "config_creative_writer.toml", tmp_path / "ds_creative_writer.json"
    toml.write_text(FOUNDING_TOML)
    js.write_text(FOUNDING_JSON)
    return str(toml), str(js)


# The founding run


def test_founding_configuration_resolves_to_its_own_values(founding: tuple[str, str]) -> None:
    config = loading.load(*founding).model_dump()
    assert {key: config[key] for key in FOUNDING_VALUES} == FOUNDING_VALUES
    assert {key: config["optimizer"][key] for key in FOUNDING_OPTIMIZER} == FOUNDING_OPTIMIZER
    (dataset,) = config["datasets"]
    assert {key: dataset[key] for key in FOUNDING_DATASET} == FOUNDING_DATASET
    assert layer_ranges(config["layers_to_transform"]) == [(0, 38)]


def test_every_key_the_founding_run_names_is_checked_above() -> None:
    given_toml, given_json = tomli.loads(FOUNDING_TOML), json.loads(FOUNDING_JSON)
    for key in given_toml:
        assert key in {*FOUNDING_VALUES, "optimizer", "datasets"}, key
    assert set(given_toml["optimizer"]) <= set(FOUNDING_OPTIMIZER)
    assert set(given_toml["datasets"][0]) <= set(FOUNDING_DATASET)
    assert set(given_json) == set(loading.JSON_KEYS)


def test_shipped_single_file_is_the_founding_run(founding: tuple[str, str]) -> None:
    shipped = loading.load("config_creative_writer.toml").model_dump()
    seed = loading.load(*founding).model_dump()
    assert shipped.pop("eval_after_last_step")  # what the run ends with is measured, which the founding run left out
    seed.pop("eval_after_last_step")
    for path in ("model", "output_dir"):
        shipped.pop(path), seed.pop(path)
    shipped["datasets"][0].pop("dataset_path"), seed["datasets"][0].pop("dataset_path")
    assert shipped == seed


def test_shipped_toml_goes_with_the_founding_json() -> None:
    both = loading.load("config_creative_writer.toml", str(CONFIGS / "ds_creative_writer.json"))
    assert both == loading.load("config_creative_writer.toml")


# The DeepSpeed JSON


def test_value_that_differs_between_toml_and_json_names_both(tmp_path: Path) -> None:
    toml, js = tmp_path / "x.toml", tmp_path / "ds.json"
    toml.write_text(tomli_w.dumps(small(gradient_accumulation_steps=4, gradient_clipping=1.0)))
    js.write_text(json.dumps({"gradient_accumulation_steps": 16, "gradient_clipping": 1}))
    with pytest.raises(UserError) as caught:
        loading.load(str(toml), str(js))
    (line,) = str(caught.value).split("\n")[1:]
    for part in ("gradient_accumulation_steps", "TOML says 4", str(js), "16"):
        assert part in line


def test_json_keys_that_are_not_ours_are_refused_by_name(tmp_path: Path) -> None:
    toml, js = tmp_path / "x.toml", tmp_path / "ds.json"
    toml.write_text(tomli_w.dumps(small(pipeline_stages=0)))
    js.write_text(json.dumps({"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}, "steps_per_print": 5}))
    with pytest.raises(UserError) as caught:
        loading.load(str(toml), str(js))
    lines = str(caught.value).split("\n")[1:]
    for key in ("bf16", "zero_optimization", "pipeline_stages"):
        assert sum(key in line.split("; it takes")[0] for line in lines) == 1, lines
    assert len(lines) == 3


@pytest.mark.parametrize(("text", "said"), [("[]", "does not hold a JSON object"), ("{", "ds.json"), (None, "ds.json")])
def test_json_that_cannot_be_read(tmp_path: Path, text: str | None, said: str) -> None:
    toml, js = tmp_path / "x.toml", tmp_path / "ds.json"
    toml.write_text(tomli_w.dumps(small()))
    if text is not None:
        js.write_text(text)
    with pytest.raises(UserError, match=said):
        loading.load(str(toml), str(js))


@pytest.mark.parametrize(("content", "said"), [(b"a = = 1", "not valid TOML"), (b"a = '\xff'", "not valid TOML")])
def test_toml_that_cannot_be_read(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "x.toml").write_bytes(content)
    with pytest.raises(UserError, match=said):
        loading.load(str(tmp_path / "x.toml"))


def test_config_that_is_nowhere_names_what_there_is() -> None:
    with pytest.raises(UserError, match=r"no_such\.toml: no such file.*config_creative_writer\.toml"):
        loading.load("no_such.toml")


# qlora-pipe's vocabulary


@pytest.mark.parametrize(("table", "key"), KEYS)
def test_every_key_of_qlora_pipe_is_built_or_refused_by_name(table: str, key: str) -> None:
    full = f"{table}.{key}" if table else key
    built = key in SECTIONS[table].model_fields
    assert built != (full in REFUSED), "in the schema or in REFUSED, and not in both"
    raw = with_key(small(), table, key, QLORA_PIPE_KEYS[table][key])
    if built:
        loading.validate(raw, "x.toml")
    else:
        (line,) = problems(raw)
        assert line.startswith(f"{full} = ")
        assert REFUSED[full][1] in line


@pytest.mark.parametrize("full", REFUSED)
def test_refused_keys_pass_with_a_value_that_asks_for_nothing(full: str) -> None:
    table, _, key = full.rpartition(".")
    assert (table, key) in KEYS, "REFUSED names a key that qlora-pipe does not have"
    for harmless in REFUSED[full][0]:
        assert loading.validate(with_key(small(), table, key, harmless), "x.toml")


# What is shipped and generated


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda p: p.name)
def test_shipped_configs_are_valid(path: Path) -> None:
    config = loading.load(str(path))
    kinds = json.loads(generate.schema())["$defs"]["Optimizer"]["properties"]["type"]["enum"]
    assert tomli.loads(path.read_text())["optimizer"]["type"] in kinds, "the schema for editors takes it too"
    assert {kind.lower() for kind in kinds} >= {config.optimizer.type}


def test_generated_files_are_not_stale() -> None:
    mend = "run python -m docs.generate"
    assert generate.SCHEMA.read_text(encoding="utf-8") == generate.schema(), mend
    assert generate.REFERENCE.read_text(encoding="utf-8") == generate.config_reference(), mend


def test_reference_has_every_key_and_every_key_has_a_meaning() -> None:
    reference = generate.config_reference()
    for section in SECTIONS.values():
        for key, field in section.model_fields.items():
            if key not in (
                "optimizer",
                "groups",
                "quantization",
                "bnb",
                "peft",
                "samples",
                "datasets",
                "eval_datasets",
                "objective",
                "rl",
                "reference",
                "sampling",
            ):
                assert f"\n| `{key}` | " in reference, key
                assert field.description, key
    for key in REFUSED:
        assert f"\n| `{key}` | " in reference, key
