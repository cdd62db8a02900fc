"""Runs on conversations and completions over two stages: killed or stopped, resumed, bit-equal to the run that went through.

Oracles: the run that was not interrupted; for the first step's loss the unsplit model, one row at a time, with labels from
the rows' text.
"""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.config import loading
from pipeline.data.batches import Position
from pipeline.training.data import specs
from pipeline.training.data.batches import micro_batches
from pipeline.training.data.read import read_data
from tests.helpers.builders import train, write_config
from tests.helpers.data import prose
from tests.helpers.rows import talk, write_jsonl
from tests.training.checkpoint.test_resume import assert_equal, final_state, numbers, run_plan

STEPS = 6
WORDS = prose(4000, seed=5).split()


def words(begin: int, count: int) -> str:
    return " ".join(WORDS[begin : begin + count])


def chat_rows(folder: Path) -> dict[str, Any]:
    """Conversations of one to three exchanges, a bad row among them."""
    rows: list[Any] = []
    for n in range(22):
        texts = [words(40 * n + 9 * part, 3 + (n + part) % 6) for part in range(2 * (1 + n % 3))]
        rows.append(talk(*texts, system="Be brief." if n % 4 == 0 else None))
    rows[7] = talk("Why?", "")
    path = write_jsonl(folder / "chat.jsonl", rows)
    return {
        "name": "talks",
        "dataset_type": "chat",
        "dataset_path": str(path),
        "chat_template": "alpaca",
        "max_bad_rows": 0.05,
    }


def completion_rows(folder: Path) -> dict[str, Any]:
    """Prompts and completions of many lengths."""
    rows = [{"prompt": words(50 * n, 2 + n % 9) + " ", "completion": words(50 * n + 20, 1 + n % 7)} for n in range(20)]
    path = write_jsonl(folder / "pairs.jsonl", rows)
    return {"name": "pairs", "dataset_type": "completion", "dataset_path": str(path)}


def config(folder: Path, base: Path, dataset: dict[str, Any], **changes: Any) -> str:
    settings: dict[str, Any] = {
        "model": str(base),
        "output_dir": str(folder / "runs"),
        "max_steps": STEPS,
        "epochs": 4,
        "micro_batch_size_per_gpu": 2,
        "lora_dropout": 0.2,
        "eval_steps": 3,
        "datasets": [{"sequence_len": 256, "eval_size": 3, **dataset}],
        **changes,
    }
    folder.mkdir(exist_ok=True)
    return str(write_config(folder / f"{dataset['name']}.toml", **settings))


def first_loss(toml: str, base: Path) -> float:
    """Of the first step's rows by the unsplit model: the mean over what the text says is an answer or its end."""
    loaded = loading.load(toml)
    spec, tokenizer = specs.data_of(loaded), AutoTokenizer.from_pretrained(base)
    batches = micro_batches(spec, read_data(spec, tokenizer))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    total, targets = 0.0, 0
    for index, row in batches.info(Position()).rows:
        ids = torch.from_numpy(batches.stores[index].ids(row).astype("int64"))
        text = tokenizer.decode(ids)
        labels = torch.full_like(ids, -100)
        for part, begin in answers(text):
            start = len(tokenizer(text[:begin], add_special_tokens=False)["input_ids"])
            end = start + len(tokenizer(part, add_special_tokens=False)["input_ids"])
            labels[start:end] = ids[start:end]
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum").item()
        targets += int((labels[1:] != -100).sum())
    return total / targets


def answers(text: str) -> list[tuple[str, int]]:
    """(answer with its EOS, where it begins) in a conversation by the alpaca template."""
    found, place = [], 0
    while (place := text.find("### Response:\n", place)) >= 0:
        begin = place + len("### Response:\n")
        place = text.index("<EOS>", begin) + len("<EOS>")
        found.append((text[begin:place], begin))
    return found


def killed_in_a_save(folder: Path, toml: str, step: int) -> Path:
    """The folder of a run over two stages that died while it saved `step`."""
    run_plan(folder, 2, [{"config": toml, "fault": f"die_in_save:{step}"}], expect=-9 & 0xFF, name="killed")
    (run,) = [p for p in (folder / "runs").iterdir() if (p / "config.toml").exists()]
    return run


def resumed_equals_uncut(folder: Path, toml: str, run: Path, steps: int = STEPS) -> list[dict[str, Any]]:
    """Go on from `run` to the last of `steps`: state and numbers are those of a run that nothing stopped. Gives the latter's."""
    plan: list[dict[str, Any]] = [{"config": toml, "resume": str(run)}, {"config": toml}]
    resumed, uncut = run_plan(folder, 2, plan, name="resumed")["runs"]
    assert_equal(final_state(resumed, steps), final_state(uncut, steps))
    assert numbers(resumed) == numbers(uncut)
    return numbers(uncut)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_conversations_killed_in_a_save_and_resumed_are_bit_equal(tmp_path: Path, base: Path) -> None:
    toml = config(tmp_path, base, chat_rows(tmp_path), save_steps=2, checkpoint_on_save=True, lora_dropout=0.0)
    killed = killed_in_a_save(tmp_path, toml, 4)
    # An epoch has three steps and ends in a checkpoint as well.
    assert sorted(p.name for p in killed.glob("global_step*")) == ["global_step2", "global_step3"]
    lines = resumed_equals_uncut(tmp_path, toml, killed)
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    # fp32 sums of some 100 targets' losses in another order.
    assert losses[0] == pytest.approx(first_loss(toml, base), abs=2e-5)
    assert any("eval/talks/loss" in line for line in lines)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_completions_killed_in_a_save_and_resumed_are_bit_equal(tmp_path: Path, base: Path) -> None:
    toml = config(tmp_path, base, completion_rows(tmp_path), save_steps=2, checkpoint_on_save=True)
    killed = killed_in_a_save(tmp_path, toml, 4)
    assert not (killed / "global_step4").exists()
    resumed_equals_uncut(tmp_path, toml, killed)


@pytest.mark.slow
def test_that_a_model_will_not_stop_is_said_at_the_start_and_again_at_the_end(tmp_path: Path, base: Path) -> None:
    talks = {**chat_rows(tmp_path), "train_on_eos": "none"}
    toml = config(tmp_path, base, talks, pipeline_stages=1, max_steps=1, eval_steps=None)
    lines = train(1, "--config", toml).splitlines()
    said = [place for place, line in enumerate(lines) if "it will not learn to stop" in line]
    step = next(place for place, line in enumerate(lines) if "step 1" in line)
    assert len(said) == 2
    assert said[0] < step < said[1]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_packed_conversations_killed_in_a_save_and_resumed_are_bit_equal(tmp_path: Path, base: Path) -> None:
    packed = {**chat_rows(tmp_path), "packing": "best_fit"}
    toml = config(tmp_path, base, packed, save_steps=2, checkpoint_on_save=True, micro_batch_size_per_gpu=1)
    killed = killed_in_a_save(tmp_path, toml, 4)
    assert not (killed / "global_step4").exists()
    resumed_equals_uncut(tmp_path, toml, killed)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_streamed_run_killed_in_a_save_and_resumed_is_bit_equal(tmp_path: Path, base: Path) -> None:
    """Windows of 8 of the 22 conversations, so that 9 steps of 4 rows go over their ends and the stream's."""
    rows = chat_rows(tmp_path)
    streamed = {**rows, "eval_size": 0, "streaming": True, "window_rows": 8, "max_bad_rows": 0.2}
    held = {
        "name": "held",
        "sequence_len": 256,
        **{key: rows[key] for key in ("dataset_type", "dataset_path", "chat_template")},
    }
    changes: dict[str, Any] = {"epochs": None, "max_steps": 9, "eval_datasets": [held | {"max_bad_rows": 0.2}]}
    toml = config(tmp_path, base, streamed, save_steps=2, checkpoint_on_save=True, **changes)
    killed = killed_in_a_save(tmp_path, toml, 6)
    assert sorted(p.name for p in killed.glob("global_step*")) == ["global_step2", "global_step4"]
    lines = resumed_equals_uncut(tmp_path, toml, killed, 9)
    windows = [line["train/window"] for line in lines if "train/window" in line]
    assert windows == sorted(windows)
    assert windows[-1] > 3  # which is the first again
    assert not list((tmp_path / "runs").glob("*/epoch*"))
    # Two replicas read the rows that one reads: fp32 sums of some 100 targets' losses in another order.
    alone = ["pipeline_stages=1", "lora_dropout=0.0"]
    one = run_plan(tmp_path, 1, [{"config": toml, "overrides": alone}], name="one")["runs"]
    halves = [*alone, "gradient_accumulation_steps=1"]
    two = run_plan(tmp_path, 2, [{"config": toml, "overrides": halves}], name="two")["runs"]
    losses = [[line["train/loss"] for line in numbers(run) if "train/loss" in line] for run in (*one, *two)]
    assert losses[0] == pytest.approx(losses[1], abs=2e-5)


def paragraphs(folder: Path) -> dict[str, Any]:
    """Texts of 3 to 30 words, a document each."""
    texts = [{"text": words(30 * n, 3 + 7 * n % 28)} for n in range(60)]
    return {"name": "texts", "dataset_type": "doclist", "dataset_path": str(write_jsonl(folder / "texts.jsonl", texts))}


def loss_of_parts(toml: str, base: Path) -> float:
    """Of the first step by the unsplit model: what begins anew in a row is a row by itself, its first token untrained."""
    loaded = loading.load(toml)
    spec = specs.data_of(loaded)
    batches = micro_batches(spec, read_data(spec, AutoTokenizer.from_pretrained(base)))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    total, targets, parts = 0.0, 0, 0
    for index, row in batches.info(Position()).rows:
        store = batches.stores[index]
        ids = torch.from_numpy(store.ids(row).astype("int64"))
        trained = torch.zeros(len(ids), dtype=torch.bool)
        for begin, end in store.spans(row):
            trained[begin:end] = True
        for begin, end in itertools.pairwise([*store.restarts(row), len(ids)]):
            assert not trained[begin]
            parts += 1
            if trained[begin:end].any():
                with torch.no_grad():
                    logits = model(ids[None, begin:end]).logits[0, :-1]
                losses = torch.nn.functional.cross_entropy(logits, ids[begin + 1 : end], reduction="none")
                total += losses[trained[begin + 1 : end]].sum().item()
                targets += int(trained[begin:end].sum())
    assert parts > 2 * len(batches.info(Position()).rows)
    return total / targets


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("which", ["books", "stream"])
def test_documents_that_share_a_row_train_as_if_alone(tmp_path: Path, base: Path, which: str) -> None:
    """On two stages and on one, against the unsplit model on every document's part by itself."""
    whole = {"max_steps": 1, "eval_steps": None, "lora_dropout": 0.0, "gradient_accumulation_steps": 3}
    rows = paragraphs(tmp_path) if which == "books" else completion_rows(tmp_path)
    kept = (
        {"document_mask": True, "sequence_len": 256} if which == "books" else {"packing": "stream", "sequence_len": 96}
    )
    toml = config(tmp_path, base, {"eval_size": 0, **rows, **kept}, **whole)
    two = run_plan(tmp_path, 2, [{"config": toml}], name="two")["runs"]
    one = run_plan(tmp_path, 1, [{"config": toml, "overrides": ["pipeline_stages=1"]}], name="one")["runs"]
    steps = [numbers(run)[0] for run in (*two, *one)]
    expected = loss_of_parts(toml, base)
    for step in steps:
        # fp32 sums of a few hundred targets' losses in another order.
        assert step["train/loss"] == pytest.approx(expected, abs=2e-5)
        assert step["train/grad_norm"] == pytest.approx(steps[0]["train/grad_norm"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_packed_conversations_train_as_unpacked_ones_do(tmp_path: Path, base: Path) -> None:
    """One step over all rows: the same loss and gradient on two stages, and on one, packed or not."""
    whole = {"max_steps": 1, "eval_steps": None, "lora_dropout": 0.0, "gradient_accumulation_steps": 12}
    rows = {**chat_rows(tmp_path), "eval_size": 0}
    plain = config(tmp_path / "plain", base, rows, **whole)
    packed = config(tmp_path / "packed", base, {**rows, "packing": "best_fit"}, **whole)
    two = run_plan(tmp_path, 2, [{"config": plain}, {"config": packed}], name="two")
    one = run_plan(tmp_path, 1, [{"config": packed, "overrides": ["pipeline_stages=1"]}], name="one")
    steps = [numbers(run)[0] for run in (*two["runs"], *one["runs"])]
    for step in steps[1:]:
        # fp32 sums in another order: a few units of 2⁻²³ of each of some hundred terms.
        assert step["train/loss"] == pytest.approx(steps[0]["train/loss"], rel=1e-6)
        assert step["train/grad_norm"] == pytest.approx(steps[0]["train/grad_norm"], rel=1e-5)
        assert step["train/epoch"] == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_mixed_run_killed_in_a_save_and_resumed_is_bit_equal(tmp_path: Path, base: Path) -> None:
    """Conversations, completions and texts by turns of targets, with parts of passes, over two stages."""
    weights = {"talks": 3.0, "pairs": 1.0, "texts": 2.0}
    tables = [
        {"sequence_len": 256, "sample_weight": weights[table["name"]], **table}
        for table in (chat_rows(tmp_path), completion_rows(tmp_path), {**paragraphs(tmp_path), "sequence_len": 48})
    ]
    tables[0] |= {"num_repeats": 1.5, "eval_size": 3}
    tables[1] |= {"max_tokens": 150}
    mixed: dict[str, Any] = {
        "datasets": tables,
        "dataset_combination_mode": "interleave",
        "dataset_interleave_stopping_strategy": "all_exhausted",
        "mix_by": "targets",
        "dataset_processes": 2,
    }
    toml = config(tmp_path, base, {"name": "mixed"}, save_steps=2, checkpoint_on_save=True, **mixed)
    resumed_equals_uncut(tmp_path, toml, killed_in_a_save(tmp_path, toml, 4))
    # What the run was given: in the order of the second epoch, whose first micro-batch is not moved, every share holds.
    spec = specs.data_of(loading.load(toml))
    data = read_data(spec, AutoTokenizer.from_pretrained(base))
    epoch = micro_batches(spec, data).epoch_rows(1).tolist()
    targets = [rows.store.targets for rows in data.train]
    largest, given = max(int(of_set.max()) for of_set in targets), torch.zeros(3, dtype=torch.float64)
    for index, row in epoch:
        given[index] += int(targets[index][row])
        assert ((given - torch.tensor([3.0, 1.0, 2.0]) / 6 * given.sum()).abs() <= largest).all()
    assert int(data.train[1].store.lengths[data.train[1].rows].sum()) <= 150
    assert abs(len(data.train[0]) - 1.5 * len(data.train[0].rows)) <= 0.5
