"""Files of others, damaged, and every command that reads them: a UserError with the file and the reason, or the result
that the undamaged files give. Never another exception, and no control character on the terminal.
"""

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import console
from pipeline.artifacts.adapter.directions import read_directions
from pipeline.artifacts.adapter.read import load_adapter, load_pairs
from pipeline.artifacts.export.export import export
from pipeline.artifacts.fold.merge import merge
from pipeline.config import loading
from pipeline.console import UserError
from pipeline.families import KINDS
from pipeline.inspection import page, reading, terminal
from pipeline.training.stage import initial_adapter
from pipeline.training.start import prepare, resolve
from tests.formats.test_foreign_parsing import packed, parts, spoilt
from tests.helpers.artifacts import VOCABULARY, bytes_of, down_proj, load_model, make_base, multiplicative
from tests.helpers.builders import BOOKS, save_tokenizer
from tests.helpers.configs import small
from tests.helpers.quick import only

ADAPTERS = ("ours", "lora", "dora", "ia3", "oft", "boft", "hra")
INDEX, CONFIG, WEIGHTS = "model.safetensors.index.json", "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in two shards, and adapters of every type for it, ours and PEFT's."""
    from peft import BOFTConfig, HRAConfig, IA3Config, LoraConfig, OFTConfig, get_peft_model

    folder = tmp_path_factory.mktemp("made")
    make_base(folder / "base", shard="60KB")
    save_tokenizer(folder / "base", VOCABULARY)
    multiplicative(folder / "ours", full={"model.norm.weight": torch.ones(32)})
    lora = {"r": 4, "target_modules": ["down_proj"], "init_lora_weights": False}
    for name, config in {
        "lora": LoraConfig(
            **lora, rank_pattern={"layers.1.mlp.down_proj": 3}, alpha_pattern={r"2\..*": 5}, modules_to_save=["norm"]
        ),
        "dora": LoraConfig(**lora, use_dora=True),
        "ia3": IA3Config(target_modules=["down_proj"], feedforward_modules=[]),
        "oft": OFTConfig(target_modules=["down_proj"], oft_block_size=16),
        "boft": BOFTConfig(target_modules=["down_proj"], boft_block_size=4),
        "hra": HRAConfig(target_modules=["down_proj"], r=2),
    }.items():
        get_peft_model(load_model(folder / "base"), config).save_pretrained(folder / name)
    return folder


@pytest.fixture
def work(made: Path, tmp_path: Path) -> Path:
    """A copy of them that a test may spoil."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def fold(base: Path, adapter: Path, output: Path) -> None:
    merge(base, adapter, output)


def exported(format: str) -> Callable[[Path, Path, Path], None]:
    def run(base: Path, adapter: Path, output: Path) -> None:
        export(
            base,
            adapter,
            output,
            format=format,
            dtype="float32",
            device="cpu",
            dry_run=False,
            force=True,
            kind=None,
            base_quant=None,
            base_dtype=None,
        )

    return run


def inspect(base: Path, adapter: Path, output: Path) -> None:
    found = load_pairs(adapter)
    kind = reading.kind_without_base(found, None if found.kind else KINDS[1])
    inspection = reading.read(
        found, kind, base=None, tokenizer=None, text=None, directions=2, device=torch.device("cpu"), dtype=torch.float32
    )
    terminal.describe(inspection)
    page.page(inspection)


def begin_with(base: Path, adapter: Path, output: Path) -> None:
    sizes = dict.fromkeys(down_proj(), (4, 1.5))
    initial_adapter.read_in_full(str(adapter), ["model.norm.weight"], {})
    initial_adapter.read_pairs(str(adapter), sizes, uniform=(4, 1.5), on_the_output=True, biased_targets=False)


def begin_family_with(base: Path, adapter: Path, output: Path) -> None:
    initial_adapter.read_family(str(adapter), list(down_proj()), "hra", {"r": 2})


def check(base: Path, adapter: Path, output: Path) -> None:
    raw = small(
        model=str(base),
        output_dir=str(output),
        pipeline_stages=1,
        target_modules=["down_proj"],
        model_weight_dtype="float32",
        lora_rank=4,
        lora_alpha=6,
        datasets=[{"dataset_type": "textfile", "dataset_path": str(BOOKS / "the_salt_ledger.md"), "sequence_len": 64}],
    )
    config = loading.validate(raw, "x.toml")
    plan = resolve.resolve(config)
    prepare.check_files(config.model, config.output_dir, plan.meta_model)
    prepare.tokenizer_for(plan, config.model)


COMMANDS: dict[str, Callable[[Path, Path, Path], None]] = {
    "merge": fold,
    "export peft": exported("peft"),
    "export gguf": exported("gguf"),
    "inspect": inspect,
    "init_adapter": begin_with,
    "init_adapter of a family": begin_family_with,
}


def refused(command: Callable[[Path, Path, Path], None], work: Path, adapter: str) -> str | None:
    """The message, on one line but for a list of problems; None where it ran."""
    try:
        command(work / "base", work / adapter, work / "out")
    except UserError as error:
        assert error.exit_code == 2
        assert console.plain(str(error)) == str(error), (
            "what would steer a terminal must be refused or shown as escapes"
        )
        return str(error)
    finally:
        shutil.rmtree(work / "out", ignore_errors=True)
        (work / "out").unlink(missing_ok=True)
    return None


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_undamaged_files_are_read(made: Path, tmp_path: Path, adapter: str) -> None:
    merge(made / "base", made / adapter, tmp_path / "out")
    assert bytes_of(tmp_path / "out").keys() == bytes_of(made / "base").keys()


def test_an_undamaged_base_passes_the_check(made: Path, tmp_path: Path) -> None:
    check(made / "base", made / "ours", tmp_path / "out")


# --- adapter_config.json: each key with values that it cannot have

NUMBERS = (float("nan"), float("inf"), -float("inf"), "16", True, [16], {"a": 1}, None)
COUNTS = (*NUMBERS, 0, -1, 16.9, 10**90)
NAMES = (3, True, {"a": 1}, [3], [None], [["a"]], ["a\x1b[2J"], "a\nb")
SWITCHES = ("true", 1, 0, [], {})
WRONG: dict[str, dict[str, tuple[Any, ...]]] = {
    "lora": {
        "r": COUNTS,
        "lora_alpha": (*NUMBERS, 0),
        "use_rslora": SWITCHES,
        "use_dora": SWITCHES,
        "lora_bias": SWITCHES,
        "rank_pattern": (3, [3], "a", {"(": 4}, {"a\x07": 4}, *({"down_proj": v} for v in ("4", 4.5, True, 0, None))),
        "alpha_pattern": (3, [3], {"[": 4}, *({"down_proj": v} for v in ("4", float("nan"), 0, [1]))),
        "target_modules": NAMES,
        "modules_to_save": (*NAMES, "norm"),
        "layers_to_transform": ("1", 1.5, ["1"], {"a": 1}, True),
        "base_model_name_or_path": (3, ["a"], "a\x1b]0;x\x07"),
        "bias": (3, ["all"], True),
        "peft_type": (3, ["LORA"], {}, "LORA\x1b", None),
        "init_lora_weights": (3, [], {}),
        "ensure_weight_tying": SWITCHES,
        "inference_mode": SWITCHES,
        "fan_in_fan_out": SWITCHES,
    },
    "ours": {
        "scaling": (*NUMBERS, 0, 0.0),
        "depth": (0.0, "0", True, None, 1),
        "act_fn": (3, None, "relu", ["linear"]),
        "r": COUNTS,
    },
    "ia3": {"feedforward_modules": NAMES, "target_modules": NAMES},
    "oft": {
        "r": (-1, 1.5, "1", True),
        "num_cayley_neumann_terms": (*COUNTS, 2),
        "use_cayley_neumann": SWITCHES,
        "block_share": SWITCHES,
    },
    "boft": {"boft_block_size": (-1, "4", 1.5), "boft_n_butterfly_factor": ("1", True)},
    "hra": {"r": (0, -1, 16.9, "16", True, float("nan")), "apply_GS": SWITCHES},
}
CASES = [(adapter, key, value) for adapter, keys in WRONG.items() for key, values in keys.items() for value in values]


@pytest.mark.parametrize(
    ("adapter", "key", "value"), CASES, ids=[f"{a}-{k}-{v!r}"[:60].replace("\x1b", "") for a, k, v in CASES]
)
def test_values_that_a_key_cannot_have_are_refused_by_its_name(work: Path, adapter: str, key: str, value: Any) -> None:
    file = work / adapter / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    said = (
        key
        if key not in ("peft_type", "lora_alpha", "alpha_pattern")
        else "peft_type|(peft|of) type|lora_alpha|alpha_pattern|scaling"
    )
    message = refused(fold, work, adapter)
    assert message is not None, message
    assert re.search(said, message), message


FACTS = {
    "kind": (3, None, ["lora"], "lora\x1b", "other", {}),
    "rank": COUNTS,
    "alpha": NUMBERS,
    "scaling": (*NUMBERS, 0, 3.0),
    "train_logit_scale": (float("nan"), float("inf"), 0, -1, "1", True, None),
    "modules": ("a", 3, [3], {}),
    "full": ("a", [3], {}),
    "tied": ("a", [], {"a": 3}),
    "format_version": (None, "1", 1.0, True, 0, -1, 2, [], 10**90),
    "base_model": (3, [], "a\x1b"),
    "trained_over": (
        3,
        [],
        {},
        {"bits": 4},
        {"bits": "4", "quant_type": "nf4", "double_quant": False, "skip": [], "dtype": "bfloat16"},
    ),
}


@pytest.mark.parametrize("key", FACTS)
def test_facts_of_ours_that_are_not_what_we_write_are_refused(work: Path, key: str) -> None:
    file = work / "ours" / WEIGHTS
    header, data = parts(file.read_bytes())
    for value in FACTS[key]:
        own = json.loads(header["__metadata__"]["mulora_pipe"]) | {key: value}
        changed = header | {"__metadata__": header["__metadata__"] | {"mulora_pipe": json.dumps(own)}}
        file.write_bytes(packed(changed, data))
        with pytest.raises(UserError, match=f"{WEIGHTS}|scaling|the weights' metadata"):
            load_adapter(work / "ours")


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "null", "{", '"x"', "[" * 50_000, '{"format_version": 1}', '{"a": 1, "a": 2}']
)
@pytest.mark.parametrize("command", ["init_adapter", "init_adapter of a family", "merge"])
def test_metadata_of_ours_that_is_no_such_thing(work: Path, text: str, command: str) -> None:
    file = work / "ours" / WEIGHTS
    header, data = parts(file.read_bytes())
    file.write_bytes(packed(header | {"__metadata__": {"mulora_pipe": text}}, data))
    message = refused(COMMANDS[command], work, "ours")
    assert message is not None
    assert len(message) < 1000
    assert WEIGHTS in message


# --- what every command makes of files that are no such files

NO_SUCH_FILES = {
    "nothing": b"",
    "cut short": b'{"peft_type": "LO',
    "no JSON": b"<html>",
    "a list": b"[]",
    "a number": b"3",
    "null": b"null",
    "not UTF-8": b'{"a": "\xff"}',
    "brackets for ever": b"[" * 50_000,
    "400 deep": b'{"a":' * 400 + b"1" + b"}" * 400,
    "a key twice": b'{"a": 1, "a": 2}',
    "4 300 digits": b'{"a": ' + b"9" * 4300 + b"}",
    "half a pair": rb'{"a": "\ud800"}',
    "NULs": bytes(64),
}


@pytest.mark.parametrize("kind", NO_SUCH_FILES)
@pytest.mark.parametrize("command", COMMANDS)
def test_an_adapter_whose_files_are_none(work: Path, command: str, kind: str) -> None:
    for name in (WEIGHTS, CONFIG):
        whole = (work / "ours" / name).read_bytes()
        (work / "ours" / name).write_bytes(NO_SUCH_FILES[kind])
        message = refused(COMMANDS[command], work, "ours")
        assert message is None or name in message or command.endswith("family")  # which reads the weights alone
        assert message is not None or command.startswith("init_adapter")
        (work / "ours" / name).write_bytes(whole)


@pytest.mark.parametrize("kind", NO_SUCH_FILES)
@pytest.mark.parametrize(
    "name",
    only(
        ["config.json", "tokenizer.json"],
        ["config.json", INDEX, "tokenizer.json", "tokenizer_config.json", "generation_config.json"],
    ),
)
def test_a_base_whose_files_are_none(work: Path, name: str, kind: str) -> None:
    (work / "base" / name).write_bytes(NO_SUCH_FILES[kind])
    message = refused(check, work, "ours")
    assert message is None or str(work / "base") in message
    assert message is not None or name in ("generation_config.json", "tokenizer_config.json")
    message = refused(fold, work, "ours")
    assert (message is not None) == (name in ("config.json", INDEX))


@pytest.mark.parametrize(
    "weight_map",
    [
        None,
        3,
        [],
        "x",
        {},
        {"a": 3},
        {"a": None},
        {"a": ["b"]},
        {"a": {}},
        {"a": "../x"},
        {"a": "\x1b"},
        {"a": "x\0"},
        {"a": ""},
        {"\x1b[2J": "model.safetensors"},
        {"a": "x" * 5000},
    ],
)
def test_an_index_that_places_nothing(work: Path, weight_map: Any) -> None:
    for index in ({"weight_map": weight_map}, {"metadata": [1], "weight_map": weight_map}):
        (work / "base" / INDEX).write_text(json.dumps(index))
        assert INDEX in (refused(fold, work, "ours") or "")
        assert INDEX in (refused(check, work, "ours") or "")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", ["llama"]),
        ("model_type", "a\x1b[2J"),
        ("text_config", 3),
        ("tie_word_embeddings", "yes"),
        ("quantization_config", [1]),
        ("hidden_size", "32"),
        ("num_hidden_layers", -1),
        ("num_hidden_layers", None),
        ("hidden_size", 0),
        ("num_attention_heads", 0),
        ("vocab_size", float("nan")),
        ("rope_parameters", []),
        ("dtype", "float7"),
        ("hidden_act", "\x1b"),
        ("num_hidden_layers", 10**8),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_a_base_s_config_with_values_of_other_types(work: Path, key: str, value: Any) -> None:
    file = work / "base" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    assert refused(check, work, "ours") is not None
    for command in ("merge", "export gguf"):
        refused(COMMANDS[command], work, "ours")


def test_a_config_with_infinities_comes_through_a_fold(work: Path) -> None:
    """Mamba's time_step_limit is [0.0, Infinity], and Python writes it so."""
    file = work / "base" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"time_step_limit": [0.0, float("inf")]}))
    merge(work / "base", work / "ours", work / "out", dtype="bfloat16")
    assert json.loads((work / "out" / "config.json").read_text())["time_step_limit"] == [0.0, float("inf")]


# --- pickles and directions


def test_pickles_that_hold_something_else(work: Path) -> None:
    (work / "lora" / WEIGHTS).unlink()
    name = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
    good = torch.ones(4, 48)
    file = work / "lora" / "adapter_model.bin"
    for content in (
        3,
        [good],
        {3: good},
        {name: "x"},
        {name: good.to_sparse()},
        {name: good.new_ones(1).expand(10**7, 10**5)},
        {name + "\x1b": good},
        {name: good.to("meta")},
        {name: good.to(torch.float8_e4m3fn)},
        {name: good.to(torch.complex64)},
        {},
    ):
        torch.save(content, file)
        assert refused(fold, work, "lora") is not None, content
    whole = torch.load(file) or {name: good}
    torch.save(whole, file)
    raw = file.read_bytes()
    for damaged in (
        b"",
        b"\x80",
        raw[: len(raw) // 2],
        raw.replace(b"torch", b"tprch"),
        b"PK\x03\x04" + bytes(50),
        b"garbage",
    ):
        file.write_bytes(damaged)
        assert "adapter_model.bin" in (refused(fold, work, "lora") or "")


NPY = b"\x93NUMPY\x01\x00"
TOO_LARGE = b"{'descr': '<f4', 'fortran_order': False, 'shape': (10000000000000,), }\n"
ARRAYS = (
    b"",
    NPY,
    NPY + len(TOO_LARGE).to_bytes(2, "little") + TOO_LARGE,
    NPY + b"\x10\x00{'descr': '<f4'(\n",
    b"PK\x03\x04",
    b"\x80\x04.",
)


@pytest.mark.parametrize("raw", ARRAYS, ids=range(len(ARRAYS)))
def test_arrays_that_are_none(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "x.npy").write_bytes(raw)
    with pytest.raises(UserError, match=r"x\.npy"):
        read_directions(tmp_path / "x.npy", [0], 1, 4)


# --- patterns


@pytest.mark.parametrize(
    "pattern", ["(a+)+b", "(.*)*(.*)*(.*)*x", "(a|a)*(a|aa)*c", "(\\w|[a-z])+!", "(a?){99}" * 20, "(" * 500]
)
@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_patterns_that_take_for_ever_end(work: Path, key: str, pattern: str) -> None:
    """Each either ends with a message or matches nothing, which leaves the fold as it is without the pattern."""
    header, data = parts((work / "lora" / WEIGHTS).read_bytes())
    long = {name.replace("layers.0.", "layers.0." + "a" * 60 + "."): entry for name, entry in header.items()}
    (work / "lora" / WEIGHTS).write_bytes(packed(long, data))
    file = work / "lora" / CONFIG
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"rank_pattern": None, "alpha_pattern": None, key: {pattern: 4}})
    )
    assert refused(fold, work, "lora") is not None


# --- any bytes

FILES = [
    ("base", "config.json"),
    ("base", INDEX),
    *((adapter, name) for adapter in ADAPTERS for name in (CONFIG, WEIGHTS)),
]


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(place=st.sampled_from(FILES), command=st.sampled_from(sorted(COMMANDS)), data=st.data())
def test_any_bytes_are_the_same_file_or_a_message(
    made: Path, tmp_path: Path, place: tuple[str, str], command: str, data: st.DataObject
) -> None:
    folder, name = place
    shutil.copytree(made / folder, tmp_path / folder, dirs_exist_ok=True)
    file = tmp_path / folder / name
    file.write_bytes(spoilt(file.read_bytes(), data, within=3000))
    base, adapter = (tmp_path / "base", made / "ours") if folder == "base" else (made / "base", tmp_path / folder)
    try:
        COMMANDS[command](base, adapter, tmp_path / "out")
    except UserError as error:
        assert console.plain(str(error)) == str(error)
    finally:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        (tmp_path / "out").unlink(missing_ok=True)
        shutil.rmtree(tmp_path / folder)


# --- the terminal

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
HOSTILE = "x\x1b[2J\x07\x1b]0;owned\x07\u202egnp"


def folders_with_hostile_names(work: Path) -> Iterator[tuple[str, Path, Path]]:
    yield "a folder's name", work / "base", Path(shutil.copytree(work / "ours", work / HOSTILE))
    yield "a missing folder", work / f"{HOSTILE}2", work / "ours"
    damaged = Path(shutil.copytree(work / "lora", work / f"{HOSTILE}3"))
    config = json.loads((damaged / CONFIG).read_text())
    for change in (
        {HOSTILE: 3},
        {"peft_type": HOSTILE},
        {"target_parameters": [HOSTILE]},
        {"base_model_name_or_path": HOSTILE},
    ):
        (damaged / CONFIG).write_text(json.dumps(config | change))
        yield f"{change}", work / "base", damaged


def test_nothing_of_others_steers_the_terminal(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import inspect_lora
    import merge_lora

    for what, base, adapter in folders_with_hostile_names(work):
        for main, arguments in (
            (merge_lora.main, ["--input", base, "--lora", adapter, "--output", work / "out", "--force"]),
            (inspect_lora.main, [adapter]),
        ):
            monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
            with pytest.raises(SystemExit) as ended:
                console.run_command(main)
            shown = capsys.readouterr()
            assert ended.value.code in (0, 2)
            assert shown.out + shown.err
            assert not CONTROL.search(shown.out + shown.err), what


def test_the_console_shows_controls_as_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    console.log(f"a{HOSTILE}\n\tb \ud800 \r")
    console.warn("\x9b31m")
    shown = capsys.readouterr()
    assert shown.out == "ax\\x1b[2J\\x07\\x1b]0;owned\\x07\\u202egnp\n\tb \\ud800 \\r\n"
    assert shown.err == "warning: \\x9b31m\n"
