"""What is said about a configuration that is wrong, `--set`, and properties of everything that is right."""

from pathlib import Path
from typing import Any

import pytest
import tomli
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import loading
from pipeline.config.schema import layer_ranges
from pipeline.console import UserError
from tests.helpers.configs import problems, small, with_key

# What is said


@pytest.mark.parametrize(
    ("table", "key", "nearest"),
    [
        ("", "epoch", "'epochs'"),
        ("", "gradient_acumulation_steps", "'gradient_accumulation_steps'"),
        ("", "layers_to_transfrom", "'layers_to_transform'"),
        ("optimizer", "wieght_decay", "'weight_decay'"),
        ("datasets", "sequence_length", "'sequence_len'"),
        ("eval_datasets", "dataset_pth", "'dataset_path'"),
    ],
)
def test_typo_names_the_nearest_valid_key(table: str, key: str, nearest: str) -> None:
    (line,) = problems(with_key(small(), table, key, 1))
    assert key in line
    assert line.endswith(f"unknown key. Did you mean {nearest}?")


@pytest.mark.parametrize(
    ("table", "key", "where"),
    [
        ("", "lr", "[optimizer]"),
        ("", "weight_decay", "[optimizer]"),
        ("", "sequence_len", "[[datasets]]"),
        ("", "eval_size", "[[datasets]]"),
        ("datasets", "lr", "[optimizer]"),
        ("optimizer", "sequence_len", "[[datasets]]"),
        ("optimizer", "epochs", "top level"),
        ("datasets", "pipeline_stages", "top level"),
        ("eval_datasets", "eval_size", "[[datasets]]"),
    ],
)
def test_key_in_the_wrong_table_is_told_where_it_belongs(table: str, key: str, where: str) -> None:
    (line,) = problems(with_key(small(), table, key, 1))
    assert key in line
    assert where in line


def test_all_problems_at_once() -> None:
    said = problems(
        {
            **small(pipeline_stages=2, layers_per_stage=[1, 2, 3], warmup_steps=1.5, lora_alpha=None, use_dora=True),
            "lora_rank": -1,
            "epochz": 3,
            "activation_checkpointing": "cpu",
            "layers_to_transform": "5:2",
            "optimizer": {"type": "AdamW", "lr": 1e-5, "lr_min": 1e-4, "lrr": 1},
            "datasets": [{"dataset_type": "axolotl", "sequence_len": 1, "dataset_path": "x"}],
        }
    )
    expected = {
        "use_dora": "no meaning with adapter_type",
        "lora_rank = -1": "greater than 0",
        "epochz": "Did you mean 'epochs'",
        'activation_checkpointing = "cpu"': "'unsloth'",
        'layers_to_transform = "5:2"': "'2:5'",
        "optimizer.lrr": "Did you mean 'lr'",
        "datasets.0.dataset_path": "x",
        "datasets.0.sequence_len = 1": "greater than or equal to 2",
        # rules between keys, in the same message
        "lora_alpha": "required unless full_fine_tune",
        "layers_per_stage": "3 entries, but pipeline_stages = 2",
        "warmup_steps": "neither a whole number",
        "optimizer.lr_min": "above optimizer.lr",
    }
    assert len(said) == len(expected), said
    for key, rule in expected.items():
        assert sum(line.startswith(key) and rule in line for line in said) == 1, (key, said)


def test_no_rule_is_applied_to_what_stands_in_for_a_wrong_value() -> None:
    (line,) = problems(small(pipeline_stages="two", layers_per_stage=[1, 2]))
    assert line.startswith("pipeline_stages")
    (line,) = problems(small(epochs=None, max_steps=-1))
    assert line.startswith("max_steps")


def test_missing_keys_are_each_named() -> None:
    said = problems({})
    for key in ("model", "output_dir", "pipeline_stages", "optimizer", "datasets", "lora_rank", "lora_alpha", "epochs"):
        assert sum(line.startswith(f"{key}:") for line in said) == 1, (key, said)


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_rank": True},
        {"lora_rank": 4.0},
        {"epochs": "1"},
        {"full_fine_tune": 1},
        {"lora_alpha": float("inf")},
        {"gradient_clipping": float("nan")},
        {"optimizer": {"type": "AdamW", "lr": float("inf")}},
        {"optimizer": {"type": "AdamW", "lr": True}},
        {"target_modules": "down_proj"},
        {"seed": -1},
        {"keep_states": -2},
    ],
)
def test_values_of_another_kind_are_not_bent_into_shape(changes: dict[str, Any]) -> None:
    (line,) = problems(small(**changes))
    assert " = " in line


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"full_fine_tune": True, "layers_to_transform": "0:3"}, "layers_to_transform"),
        ({"full_fine_tune": True, "adapter_type": "lora"}, "adapter_type"),
        ({"epochs": None}, "epochs"),
        ({"lora_rank": None}, "lora_rank"),
        ({"layers_per_stage": [3]}, "layers_per_stage"),
        ({"warmup_steps": 2.5}, "warmup_steps"),
        ({"eval_datasets": small()["datasets"]}, "datasets.name"),
        ({"samples": {}}, "samples.prompts"),
        ({"samples": {"prompts": ["x"], "prompts_file": "x.txt"}}, "samples.prompts"),
        ({"samples": {"prompts": [""]}}, "samples.prompts.0 ="),
        ({"samples": {"prompts": ["x"], "top_p": 0.0}}, "samples.top_p ="),
        ({"samples": {"prompts": ["x"], "temperature": -1}}, "samples.temperature ="),
        ({"samples": {"prompts": ["x"], "max_tokens": 5}}, "samples.max_tokens: unknown key"),
        ({"samples": {"prompts": ["x"], "every_steps": 0, "at_start": False, "at_end": False}}, "samples.every_steps"),
        ({"samples": {"prompts": ["x"], "compare": True}, "trainable_modules": ["norm"]}, "samples.compare"),
        ({"samples": {"prompts": ["x"], "system": "y", "chat": False}}, "samples.system"),
    ],
)
def test_rules_between_keys(changes: dict[str, Any], key: str) -> None:
    (line,) = problems(small(**changes))
    assert line.startswith(key if key.endswith((" =", " key")) else f"{key}:")


@pytest.mark.parametrize("spelling", ["AdamW", "adamw", "ADAMW", "AdamW8bit", "adamw_kahan", "AdamW_Kahan"])
def test_optimizer_names_in_any_case(spelling: str) -> None:
    config = loading.validate(small(optimizer={"type": spelling, "lr": 1e-5}), "")
    assert config.optimizer.type == spelling.lower()


# --set


@pytest.mark.parametrize(
    ("override", "keys", "value"),
    [
        ("lora_rank=16", ("lora_rank",), 16),
        ("optimizer.lr=1e-4", ("optimizer", "lr"), 1e-4),
        ("output_dir=runs/x y", ("output_dir",), "runs/x y"),
        ("output_dir='runs'", ("output_dir",), "runs"),
        ("layers_to_transform=0:38", ("layers_to_transform",), "0:38"),
        ("target_modules=['q_proj', 'o_proj']", ("target_modules",), ["q_proj", "o_proj"]),
        ("target_modules=all-linear", ("target_modules",), "all-linear"),
        ("activation_checkpointing=unsloth", ("activation_checkpointing",), "unsloth"),
        ("activation_checkpointing=true", ("activation_checkpointing",), True),
        ("layers_per_stage=[3, 1]", ("layers_per_stage",), [3, 1]),
        ("datasets.0.sequence_len=512", ("datasets", 0, "sequence_len"), 512),
        ("model=a=b", ("model",), "a=b"),
    ],
)
def test_set(tmp_path: Path, override: str, keys: tuple[Any, ...], value: Any) -> None:
    (tmp_path / "x.toml").write_text(tomli_w.dumps(small()))
    found: Any = loading.load(str(tmp_path / "x.toml"), overrides=[override]).model_dump()
    for key in keys:
        found = found[key]
    assert found == value
    assert type(found) is type(value)


def test_set_wins_over_both_files_and_the_last_wins(tmp_path: Path) -> None:
    toml, js = tmp_path / "x.toml", tmp_path / "ds.json"
    toml.write_text(tomli_w.dumps(small(gradient_clipping=2.0)))
    js.write_text('{"gradient_accumulation_steps": 16, "gradient_clipping": 2.0}')
    overrides = ["gradient_accumulation_steps=4", "gradient_clipping=3", "lora_rank=8", "lora_rank=2"]
    changed = loading.load(str(toml), str(js), overrides)
    assert (changed.gradient_accumulation_steps, changed.gradient_clipping, changed.lora_rank) == (4, 3.0, 2)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("lora_rank", "write key=value"),
        ("=3", "write key=value"),
        ("optimizer..lr=1", "write key=value"),
        ("model.x=1", "'model' has no keys"),
        ("model.x.y=1", "has no keys"),
        ("datasets.0=1", "'datasets' has no keys"),
        ("datasets.4.name=x", "'4' is not one of the 1 entries"),
        ("datasets.first.name=x", "'first' is not one"),
        ("lora_rank=many", 'lora_rank = "many": input should be a valid integer'),
        ("optimiser.lr=1", "Did you mean 'optimizer'"),
        ("lora_ranks=1", "Did you mean 'lora_rank'"),
        ("optimizer=1", "optimizer = 1"),
        ("use_dora=true", "use_dora: has no meaning"),
    ],
)
def test_set_of_something_wrong(tmp_path: Path, override: str, said: str) -> None:
    (tmp_path / "x.toml").write_text(tomli_w.dumps(small()))
    with pytest.raises(UserError) as caught:
        loading.load(str(tmp_path / "x.toml"), overrides=[override])
    assert said in str(caught.value)


# Properties


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)).map(sorted), min_size=1, max_size=5), st.data())
def test_layer_ranges_mean_what_they_say(ranges: list[list[int]], data: st.DataObject) -> None:
    space = st.sampled_from(["", " "])
    parts = [
        f"{low}" if low == high and data.draw(st.booleans()) else f"{low}{data.draw(space)}:{data.draw(space)}{high}"
        for low, high in ranges
    ]
    assert layer_ranges(f",{data.draw(space)}".join(parts)) == [(low, high) for low, high in ranges]


@given(st.integers(0, 99), st.integers(1, 99))
def test_backward_range_is_refused_with_the_right_one(low: int, more: int) -> None:
    with pytest.raises(ValueError, match=f"'{low}:{low + more}'"):
        layer_ranges(f"{low + more}:{low}")


@given(st.text(alphabet="0123:, -x", max_size=8))
def test_layer_ranges_accept_a_text_or_say_how_to_write_it(text: str) -> None:
    try:
        ranges = layer_ranges(text)
    except ValueError as error:
        assert "both ends included" in str(error) or "runs backwards" in str(error)
    else:
        assert [str(n) for r in ranges for n in r]
        assert all(low <= high for low, high in ranges)
        assert "-" not in text
        assert "x" not in text


NAMES = st.text(alphabet="abz09_.-", min_size=1, max_size=6)
PATHS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=9)
POSITIVE = st.floats(1e-8, 1e8)
CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "lora_alpha": POSITIVE,
        "target_modules": st.lists(NAMES, min_size=1, max_size=3) | st.just("all-linear"),
        "lora_dropout": st.floats(0, 0.99),
        "layers_to_transform": st.sampled_from(["0:3", "1", "0:3,7"]),
        "warmup_steps": st.integers(0, 99) | st.floats(0, 1),
        "max_steps": st.integers(1, 10**9),
        "batch_size_tokens": st.integers(1, 10**6),
        "keep_states": st.just(-1) | st.integers(1, 9),
        "activation_checkpointing": st.booleans() | st.just("unsloth"),
        "resume_from_checkpoint": st.booleans() | NAMES,
        "adapter_type": st.sampled_from(["lora", "multiplicative_lora"]),
        "save_dtype": st.sampled_from(["float16", "float32"]),
        "layers_per_stage": st.lists(st.integers(1, 40), min_size=2, max_size=2),
        "output_dir": PATHS,
    },
)


@given(CHANGES)
def test_resolved_configuration_reads_back_as_itself(changes: dict[str, Any]) -> None:
    config = loading.validate(small(**changes), "x")
    written = loading.to_toml(config)
    assert loading.validate(tomli.loads(written), "y") == config
    assert set(tomli.loads(written)) >= {"keep_states", "seed", "optimizer"}, "defaults are written out"


def test_resolved_full_fine_tune_reads_back_as_itself() -> None:
    raw = small(full_fine_tune=True, lora_rank=None, lora_alpha=None)
    config = loading.validate(raw, "x")
    assert loading.validate(tomli.loads(loading.to_toml(config)), "y") == config


@pytest.mark.parametrize(
    "changes", [{"model_weight_dtype": "float16"}, {"lora_weight_dtype": "float16"}, {"keep_states": 0}]
)
def test_values_that_would_train_or_keep_nothing_are_refused(changes: dict[str, Any]) -> None:
    """float16 gradients vanish without a loss scale; keeping no save would delete the last one too."""
    (key,) = changes
    (line,) = problems({**small(), **changes})
    assert line.startswith(f"{key}: ")


def test_values_of_qlora_pipe_that_are_not_built_are_refused_by_name() -> None:
    (line,) = problems({**small(), "activation_checkpointing": "cpu"})
    assert (
        line == "activation_checkpointing = \"cpu\": not built; 'unsloth' also keeps the layers' inputs in host memory"
    )


def dataset(kind: str, **keys: Any) -> dict[str, Any]:
    """A configuration whose dataset is of this type, with these keys."""
    raw = small()
    raw["datasets"] = [{**raw["datasets"][0], "dataset_type": kind, **keys}]
    return raw


@pytest.mark.parametrize(
    ("kind", "key", "value", "types"),
    [
        ("textfile", "field_text", "body", "'doclist'"),
        ("textfile", "chat_template", "chatml", "'chat' and 'completion' and 'preference' and 'unpaired' and 'ranked'"),
        (
            "doclist",
            "max_bad_rows",
            0.5,
            "'chat' and 'completion' and 'pretokenized' and 'preference' and 'unpaired' and 'ranked'",
        ),
        ("chat", "join_lines", True, "'textfile' and 'doclist'"),
        ("chat", "eval_split", "document", "'textfile' and 'doclist'"),
        ("chat", "field_prompt", "question", "'completion' and 'preference' and 'unpaired' and 'ranked'"),
        ("completion", "train_on", "last", "'chat'"),
        ("completion", "roles", {"user": ["customer"]}, "'chat' and 'preference' and 'unpaired' and 'ranked'"),
        ("pretokenized", "train_on_eos", "none", "'chat' and 'completion'"),
    ],
)
def test_keys_that_do_not_go_with_the_type_are_refused(kind: str, key: str, value: Any, types: str) -> None:
    lines = problems(dataset(kind, **{key: value, "eval_size": 2}))
    assert f"datasets.0.{key}: has a meaning for {types} only, not for '{kind}'; remove it" in lines
    held = {"dataset_type": kind, "dataset_path": "x", "sequence_len": 64, key: value}
    if key != "eval_split":
        assert any(
            line.startswith(f"eval_datasets.0.{key}: ") for line in problems({**small(), "eval_datasets": [held]})
        )


def test_values_that_do_not_go_with_the_type_are_refused() -> None:
    (line,) = problems(dataset("chat", chat_template="none"))
    assert line.startswith("datasets.0.chat_template: 'none' goes with 'completion' only")
    (line,) = problems(dataset("pretokenized", too_long="truncate_left"))
    assert line.startswith("datasets.0.too_long: 'truncate_left' needs to know where turns begin")


def test_keys_with_their_defaults_pass_whatever_the_type() -> None:
    """As a run's config.toml has them."""
    for kind in ("textfile", "doclist", "chat", "completion", "pretokenized"):
        config = loading.validate(dataset(kind), "x.toml")
        assert loading.validate(tomli.loads(loading.to_toml(config)), "y.toml") == config


def test_names_that_datasets_get_by_default_count_too() -> None:
    raw = small()
    first = raw["datasets"][0]
    raw["datasets"] = [{**first, "name": "dataset1"}, {k: v for k, v in first.items() if k != "name"}]
    (line,) = problems(raw)
    assert "'dataset1' is used more than once" in line
