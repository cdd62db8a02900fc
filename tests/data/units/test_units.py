"""Preference data becomes units: every format of docs/data-preference.md, the traps of rendering and encoding, the counts."""

import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.console import UserError
from pipeline.data.batches import EvaluationBatches, MicroBatches, Position
from pipeline.data.microbatch import Layout
from pipeline.data.mixing import mix
from pipeline.data.preparing import journal
from pipeline.data.row_store import IGNORED
from pipeline.data.selection import Streams, split, whole
from pipeline.data.units import prepared
from pipeline.data.units.build import UnitSpec, build
from pipeline.data.units.formats import Names
from pipeline.data.units.store import UnitRows, UnitWriter
from tests.helpers import chat
from tests.helpers.data import prose
from tests.helpers.row_store import ListStore
from tests.helpers.rows import write_jsonl

STOP = "<|im_end|>"
USER, ANSWER = [{"role": "user", "content": "Tea?"}], [{"role": "assistant", "content": "Yes."}]
NO = [{"role": "assistant", "content": "No."}]
ASKED = (
    "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\nTea?<|im_end|>\n<|im_start|>assistant\n"
)
HELPFULNESS = {"helpfulness": 1.0, "correctness": 1.0, "coherence": 1.0, "complexity": 1.0, "verbosity": -1.0}


def stored(
    path: Path,
    rows: list[Any],
    kind: Any = "preference",
    template: str = "qwen2_5",
    processes: int | None = None,
    **changes: Any,
) -> UnitRows:
    """The units of `rows`; `changes` are a `UnitSpec`'s or a `Names`'."""
    tokenizer = chat.tokenizer(template, STOP)
    names = {key: changes.pop(key) for key in list(changes) if key in Names.__dataclass_fields__}
    given = {"limit": 512, "most_bad": 0.0, "chat_template": chat.source(template)} | changes
    spec = UnitSpec("pairs", kind, str(write_jsonl(path / "a.jsonl", rows)), names=Names(**names), **given)
    return build(spec, tokenizer, [], path / "cache", processes)


def shown(store: UnitRows, template: str = "qwen2_5") -> list[list[str]]:
    """Each unit's rows as text, what is trained of them between « and »."""
    decode = chat.tokenizer(template, STOP).decode
    units = []
    for unit in range(len(store)):
        rows = []
        for slot in store.slots:
            ((start, end),) = slot.spans(unit)
            ids = slot.ids(unit)
            assert end == len(ids) == slot.lengths[unit]
            assert slot.targets[unit] == end - start
            rows.append(f"{decode(ids[:start])}«{decode(ids[start:])}»")
        units.append(rows)
    return units


@pytest.mark.parametrize(
    ("row", "names", "expected"),
    [
        ({"prompt": "2+2=", "chosen": "4", "rejected": "5"}, {}, ["2+2=«4<|im_end|>»", "2+2=«5<|im_end|>»"]),
        ({"prompt": "2+2=", "chosen": f"4{STOP}", "rejected": "5"}, {}, ["2+2=«4<|im_end|>»", "2+2=«5<|im_end|>»"]),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: The x", "rejected": "\n\nHuman: a\n\nAssistant: The y"},
            {},
            [f"\n\nHuman: a\n\nAssistant:« The x{STOP}»", f"\n\nHuman: a\n\nAssistant:« The y{STOP}»"],
        ),
        (
            {"history": "q", "human_ref_A": " a", "human_ref_B": " b", "labels": 0},
            {"prompt": "history", "chosen": "human_ref_A", "rejected": "human_ref_B", "label": "labels"},
            [f"q« b{STOP}»", f"q« a{STOP}»"],
        ),
        ({"prompt": USER, "chosen": ANSWER, "rejected": NO}, {}, None),
        ({"prompt": USER, "chosen": "Yes.", "rejected": "No."}, {}, None),
        ({"prompt": "Tea?", "chosen": USER + ANSWER, "rejected": USER + NO, "messages": USER + ANSWER}, {}, None),
        ({"chosen": USER + ANSWER, "rejected": USER + NO}, {}, None),
        ({"prompt": "Tea?", "chosen": "Yes.", "rejected": "No."}, {"chat": True}, None),
    ],
)
def test_formats_make_pairs(tmp_path: Path, row: Any, names: Any, expected: Any) -> None:
    store = stored(tmp_path, [row], **names)
    assert shown(store) == [expected or [f"{ASKED}«Yes.{STOP}»", f"{ASKED}«No.{STOP}»"]]


def test_a_system_text_goes_through_the_template(tmp_path: Path) -> None:
    from pipeline.data.chat.messages import Fields

    row = {"system": "Be brief.", "question": "Tea?", "chosen": "Yes.", "rejected": "No."}
    store = stored(tmp_path, [row], prompt="question", messages=Fields(system="system"))
    (rows,) = shown(store)
    assert (
        rows[0]
        == f"<|im_start|>system\nBe brief.{STOP}\n<|im_start|>user\nTea?{STOP}\n<|im_start|>assistant\n«Yes.{STOP}»"
    )


def test_rated_answers_stand_beside_one_to_another_prompt(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "chosen": " 1", "rejected": " 2"},
        {"prompt": "b", "completion": " 3", "label": True},
        {"prompt": "c", "completion": " 4", "label": "0"},
    ]
    store = stored(tmp_path, rows, "unpaired")
    assert store.desirable.tolist() == [True, False, True, False]
    texts = [[row.replace(STOP, "") for row in unit] for unit in shown(store)]
    assert texts == [["a« 1»", "a« 3»"], ["a« 2»", "a« 3»"], ["b« 3»", "b« 2»"], ["c« 4»", "c« 3»"]]
    with pytest.raises(UserError, match="1 have no other prompt whose answer could stand beside them"):
        stored(tmp_path / "one", rows[1:2], "unpaired")


def test_ranked_answers_are_the_best_ones_in_order(tmp_path: Path) -> None:
    answers = [
        {"answer": " d", "rank": 4},
        {"answer": " a", "rank": 1.0},
        {"answer": " e", "rank": 1},
        {"answer": " b", "rank": 2},
    ]
    store = stored(tmp_path, [{"prompt": "x", "answers": answers}], "ranked", ranks=3)
    assert shown(store) == [[f"x« a{STOP}»", f"x« b{STOP}»", f"x« d{STOP}»"]]
    (tmp_path / "b").mkdir()
    assert len(stored(tmp_path / "b", [{"prompt": "x", "answers": [" p", " q"]}], "ranked").slots) == 2
    with pytest.raises(UserError, match="it has 1 answers of different rank, fewer than ranks = 2"):
        stored(tmp_path, [{"prompt": "x", "answers": [" p"]}], "ranked")


def test_scored_answers_become_the_best_and_a_lower_one(tmp_path: Path) -> None:
    """HelpSteer's recipe by its own sum: mean(help + 1, corr + 1, coh + 1, compl + 1, 4 − verb) · 2 has the same order."""
    draw = random.Random(0)
    rows = [
        {"prompt": f"p{number // 4}", "response": f" r{number}", **{key: draw.randint(0, 4) for key in HELPFULNESS}}
        for number in range(80)
    ]
    rows += [{"prompt": "level", "response": f" l{n}", **dict.fromkeys(HELPFULNESS, 2)} for n in range(3)]
    score = {
        row["response"]: sum([row[k] + 1 for k in list(HELPFULNESS)[:4]] + [4 - row["verbosity"]]) / 5 * 2
        for row in rows
    }
    draw.shuffle(rows)
    names: Any = {"completion": "response", "score_weights": HELPFULNESS}
    store = stored(tmp_path, rows, **names)
    drawn = set()
    for chosen, rejected in shown(store):
        prompt, best = chosen.replace(f"{STOP}»", "").split("«")
        other = rejected.replace(f"{STOP}»", "").split("«")[1]
        mine = [row["response"] for row in rows if row["prompt"] == prompt]
        assert score[best] == max(score[one] for one in mine) > score[other]
        drawn.add(sorted({score[one] for one in mine}).index(score[other]))
    assert len(drawn) > 1, "the lower one is drawn"
    assert any("83 scored answers to 21 prompts; 1 of these" in line for line in store.report.notes)
    again = list(shown(stored(tmp_path / "b", sorted(rows, key=str), **names)))
    assert sorted(again) == sorted(shown(store)), "whatever the order of the files"
    ranked = stored(tmp_path / "c", rows, "ranked", ranks=3, **names)
    for unit in shown(ranked):
        scores = [score[row.replace(f"{STOP}»", "").split("«")[1]] for row in unit]
        assert scores == sorted(set(scores), reverse=True)


def test_an_answer_begins_where_the_ids_part_and_many_such_are_a_warning(tmp_path: Path) -> None:
    """A prompt that ends in a space straddles; one that ends before it does not. What is in a row is the text either way."""
    words = prose(400, seed=5).split()
    cuts = [
        (" ".join(words[n : n + 6]), words[n + 6], words[n + 7])
        for n in range(0, 300, 9)
        if words[n + 6] != words[n + 7]
    ]
    after = [{"prompt": f"{text} ", "chosen": one, "rejected": two} for text, one, two in cuts]
    before = [{"prompt": text, "chosen": f" {one}", "rejected": f" {two}"} for text, one, two in cuts]
    bad, good = stored(tmp_path / "a", after), stored(tmp_path / "b", before)
    whole = [[row.replace("«", "").replace("»", "") for row in unit] for unit in shown(bad)]
    assert whole == [[row.replace("«", "").replace("»", "") for row in unit] for unit in shown(good)]
    assert all(row.split("«")[1].startswith(" ") for unit in shown(bad) for row in unit)
    (warning,) = bad.report.warnings
    assert "a token straddles prompt and answer" in warning
    assert "a.jsonl:1" in warning
    assert good.report.warnings == []
    assert not any("straddles" in note for note in good.report.notes)


def test_both_answers_begin_at_one_place(tmp_path: Path) -> None:
    """The token straddles on one side only: the other's answer begins there too."""
    tokenizer = chat.tokenizer("qwen2_5", STOP)
    pair = next(
        (text, end)
        for text in prose(300, seed=6).split()
        for end in range(1, len(text))
        if (ids := tokenizer(text, add_special_tokens=False)["input_ids"])
        and tokenizer(text[:end], add_special_tokens=False)["input_ids"]
        != ids[: len(tokenizer(text[:end])["input_ids"])]
    )
    text, end = pair
    store = stored(tmp_path, [{"prompt": text[:end], "chosen": text[end:], "rejected": "!"}])
    starts = {slot.spans(0)[0][0] for slot in store.slots}
    assert len(starts) == 1


@pytest.mark.parametrize(
    ("template", "end"), [("thinks_in_the_prompt", "<|end|>"), ("thinks_in_the_prompt_without_an_end", STOP)]
)
def test_a_template_that_rewrites_its_prompt_goes_by_ids(tmp_path: Path, template: str, end: str) -> None:
    """Its generation prompt opens a thought that a row without one does not have: TRL's rule, and it is counted."""
    row = {"prompt": USER, "chosen": ANSWER, "rejected": NO}
    store = stored(tmp_path, [row], template=template)
    answers = [text.split("«")[1] for text in shown(store, template)[0]]
    assert answers == [f"Yes.{end}»", f"No.{end}»"]
    assert any("straddles" in note for note in store.report.notes)


def test_an_answer_is_what_it_says_to_its_last_newline_and_its_prompt_is_its_own(tmp_path: Path) -> None:
    """Where axolotl renders the answer by itself and strips it, and reads another field than `field_prompt` without a system."""
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in ("Yes.\n\n", "  No. "))
    store = stored(tmp_path, [{"question": USER, "chosen": chosen, "rejected": rejected}], prompt="question")
    assert shown(store) == [[f"{ASKED}«Yes.\n\n{STOP}»", f"{ASKED}«  No. {STOP}»"]]
    texts = [{"question": "Tea?", "prompt": "Milk?", "chosen": "Yes.", "rejected": "No."}]
    store = stored(tmp_path / "texts", texts, prompt="question", chat=True)
    assert shown(store) == [[f"{ASKED}«Yes.{STOP}»", f"{ASKED}«No.{STOP}»"]]


LAST_THOUGHT = (
    "{% set said = messages | selectattr('role', 'equalto', 'assistant') | list %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if m.role == 'user' or m == said[-1] else m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_where_earlier_thoughts_are_left_out_rows_part_from_their_prompt_there(tmp_path: Path) -> None:
    """The prompt alone shows the thought of its last answer, which is no longer the last one in a row: TRL's rule again."""
    thought = [{"role": "assistant", "content": "<think>Hm.</think>Perhaps."}]
    row = {"prompt": USER + thought + USER, "chosen": ANSWER, "rejected": NO}
    store = stored(tmp_path, [row], chat_template=LAST_THOUGHT)
    for text, answer in zip(shown(store)[0], ("Yes.", "No."), strict=True):
        assert text.replace("«", "").replace("»", "") == (
            f"<|im_start|>user\nTea?{STOP}\n<|im_start|>assistant\nPerhaps.{STOP}\n<|im_start|>user\nTea?{STOP}\n"
            f"<|im_start|>assistant\n{answer}{STOP}"
        )
        assert text.index("«") == text.index("Perhaps.") - 1, "from where the two differ"
    assert any("straddles" in note for note in store.report.notes)


def test_an_end_that_is_the_padding_token_too_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As most tokenizers without one of its own have it: places are known by a row's length, never by `ids == pad`."""
    rows = [
        {"prompt": "2+2=", "chosen": "4", "rejected": "5"},
        {"prompt": "a", "chosen": " long" * 9, "rejected": "b"},
    ]
    tokenizer = chat.tokenizer("qwen2_5", STOP)
    monkeypatch.setitem(tokenizer._special_tokens_map, "pad_token", STOP)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    store, stop = stored(tmp_path, rows), tokenizer.eos_token_id
    batch = Layout([store], 2, None).micro_batch(whole_rows(store), 1.0)
    assert batch.input_ids.shape[0] == 4
    for row, length in enumerate(batch.lengths.tolist()):
        assert batch.labels[row, length - 1] == batch.input_ids[row, length - 1] == stop
        assert (batch.labels[row, length:] == IGNORED).all()


def test_two_bos_are_a_bad_row(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="begins with two BOS"):
        stored(tmp_path, [{"prompt": USER, "chosen": ANSWER, "rejected": NO}], template="two_bos")


def test_what_is_too_long_loses_its_end(tmp_path: Path) -> None:
    long, prompt = " word" * 40, "a b c"
    rows = [
        {"prompt": prompt, "chosen": long, "rejected": " no"},
        {"prompt": long, "chosen": " a", "rejected": " b"},
        {"prompt": "!?" * 9 + "!", "chosen": "yes", "rejected": "no"},
        {"prompt": prompt, "chosen": f"{long} x", "rejected": f"{long} y"},
        {"prompt": prompt, "chosen": " yes", "rejected": " no"},
    ]
    store = stored(tmp_path, rows, limit=20)
    assert store.cut.tolist() == [[True, False], [True, True], [False, False]]
    assert [slot.targets.tolist()[1] for slot in store.slots] == [1, 1], "a token that is left stays"
    assert store.slots[0].lengths.tolist()[0] == 20
    assert not shown(store)[0][0].endswith(f"{STOP}»"), "a truncated answer has no end"
    said = "\n".join(store.report.notes)
    assert "2 have an answer that is longer than sequence_len and cut there" in said
    assert "1 have a prompt that alone fills" in said
    assert "1 have two answers that are the same" in said
    assert len(stored(tmp_path / "drop", rows, limit=20, keep_start=False)) == 1
    with pytest.raises(UserError, match="none of its"):
        stored(tmp_path / "none", rows[:1], limit=20, keep_start=False)


def test_what_teaches_nothing_is_left_out_and_counted(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "chosen": " x", "rejected": " x"},
        {"prompt": "a", "chosen": "", "rejected": " x"},
        {"prompt": "a", "chosen": " x", "rejected": " x and y"},
    ]
    store = stored(tmp_path, rows)
    assert len(store) == 1
    said = "\n".join(store.report.notes)
    for part in (
        "1 have two answers that are the same",
        "1 have an empty answer",
        "1 have an answer that is the beginning",
    ):
        assert part in said, said


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "chosen": "b"}, "there is no field 'rejected'"),
        ({"chosen": "a b", "rejected": "a c"}, "do not begin alike up to an 'Assistant:'"),
        (
            {"chosen": USER + ANSWER, "rejected": [{"role": "user", "content": "Milk?"}, *NO]},
            "differ before their last",
        ),
        ({"prompt": USER, "chosen": ANSWER + USER + ANSWER, "rejected": NO}, "an answer is several messages"),
        ({"prompt": "a", "chosen": ["b"], "rejected": "c"}, "neither all texts nor all lists"),
        ({"prompt": "a", "chosen": "b<|im_end|>c", "rejected": "d"}, "marks a row's end"),
        ({"prompt": USER, "chosen": USER, "rejected": NO}, "there is no turn of the assistant"),
        ({"chosen": USER + ANSWER + USER, "rejected": USER + NO}, "does not end with the assistant"),
        ("[]", "the row is no object"),
    ],
)
def test_bad_rows_are_said_with_their_reason(tmp_path: Path, row: Any, reason: str) -> None:
    with pytest.raises(UserError) as caught:
        stored(tmp_path, [row, {"prompt": "a", "chosen": " b", "rejected": " c"}])
    assert reason in str(caught.value)
    assert "a.jsonl:1" in str(caught.value)


def many(path: Path, count: int = 23) -> UnitRows:
    words = prose(900, seed=9).split()
    rows = [
        {
            "prompt": words[3 * (n // 2)],
            "chosen": f" {' '.join(words[n : n + n % 7 + 1])}.",
            "rejected": f" {words[n + 9]}",
        }
        for n in range(count)
    ]
    return stored(path, rows)


def test_units_stay_together_and_are_what_is_counted(tmp_path: Path) -> None:
    """Micro-batches hold whole units, slot after slot; a step's scale counts units and the chosen's tokens."""
    store = many(tmp_path)
    assert shown(UnitRows(store.folder)) == shown(store)
    reference = np.arange(2 * len(store), dtype=np.float32).reshape(-1, 2)
    store = store.with_reference(reference)
    batches = MicroBatches(
        [store], mix([whole(Streams(store))], seed=1), seed=1, micro_batch_size=3, gradient_accumulation_steps=2
    )
    position, seen = Position(), []
    while position.epoch == 0:
        micro_batches, info = batches.step(position)
        chosen = sum(int(store.slots[0].targets[row]) for _, row in info.rows)
        assert info.tokens == sum(int(slot.lengths[row]) for _, row in info.rows for slot in store.slots)
        for batch in micro_batches:
            assert batch.units is not None
            real = [row[1] for row in batch.rows if row]
            seen += real
            count = len(batch.rows)
            assert batch.input_ids.shape[0] == 2 * count == len(batch.lengths)
            if real:
                assert batch.units.scale == pytest.approx(2 / len(info.rows))
                assert batch.loss_scale == pytest.approx(2 / chosen)
            for place, row in enumerate(real):
                for slot, rows in enumerate(store.slots):
                    at, length = slot * count + place, int(rows.lengths[row])
                    assert batch.input_ids[at, :length].tolist() == rows.ids(row).tolist()
                    assert batch.lengths[at] == length
                    assert int((batch.labels[at] != IGNORED).sum()) == rows.targets[row]
                    assert batch.units.reference[slot, place] == reference[row, slot]
        position = info.next_position
    assert sorted(seen) == list(range(len(store)))


def whole_rows(store: UnitRows) -> Any:
    return np.stack([np.zeros(len(store), np.int64), np.arange(len(store))], axis=1)


def test_filler_is_a_unit_without_targets(tmp_path: Path) -> None:
    batch = Layout([many(tmp_path)], 4, None).micro_batch(np.empty((0, 2), np.int64), 0.0)
    assert batch.rows == (None,)
    assert not batch.lengths.any()
    assert bool((batch.labels == IGNORED).all())
    assert batch.units is not None
    assert batch.units.reference.shape == (2, 1)
    assert set(batch.tensors()) >= {"unit_scale", "reference", "desirable"}
    assert torch.equal(batch.tensors()["reference"], torch.zeros(2, 1))


def test_prompts_are_held_out_whole_and_evaluated_once(tmp_path: Path) -> None:
    store = many(tmp_path)
    rows = split(Streams(store), eval_size=0.3)
    assert rows.eval is not None
    assert not set(store.groups[rows.train.rows]) & set(store.groups[rows.eval.rows])
    batches = EvaluationBatches(whole(Streams(store)), micro_batch_size=4)
    found = [row[1] for batch in batches for row in batch.rows if row]
    assert sorted(found) == list(range(len(store)))
    assert batches.units == len(store)


def test_batch_size_tokens_counts_all_rows_of_a_unit(tmp_path: Path) -> None:
    store = many(tmp_path)
    layout = Layout([store], 1, 512)
    starts = layout.cut(whole_rows(store))
    for begin, end in itertools.pairwise(starts):
        assert layout.micro_batch(whole_rows(store)[begin:end], 1.0).input_ids.numel() <= 512
    with pytest.raises(
        UserError, match=r"does not hold the longest row .* 2 rows to a unit: raise batch_size_tokens to 128"
    ):
        Layout([store], 1, 100)


def test_sets_of_units_and_of_rows_do_not_mix(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the units of one have 2 rows, those of the\s+other 1"):
        Layout([many(tmp_path), ListStore([([1, 2, 3], [(1, 3)])])], 1, None)


# Prepared by several processes, and gone on with


def dirty(kind: str) -> list[Any]:
    """Rows of which some are bad, some the same, and some give a token that straddles."""
    rows: list[Any] = []
    for number in range(200):
        good = {"prompt": f"question {number}:", "completion": f" answer {number % 7}", "label": bool(number % 3)}
        pair = {"prompt": f"question {number}:", "chosen": f" yes {number}", "rejected": " no"}
        rows.append(good if kind == "unpaired" else pair)
    rows[40], rows[41], rows[77] = '{"prompt": ', rows[3], {"prompt": "x"}
    rows[90] |= {"prompt": "a "}
    return rows


@pytest.mark.parametrize("kind", ["preference", "unpaired"])
def test_units_are_the_same_by_several_processes_and_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path, rows = tmp_path, dirty(kind)
    given: dict[str, Any] = {"kind": kind, "most_bad": 0.1}
    expected = stored(path / "one", rows, **given)
    assert stored(path / "several", rows, processes=3, **given).report == expected.report
    monkeypatch.setattr(journal, "PART_IDS", 600)
    made: list[str] = []
    make = prepared.UnitWork.__call__

    def noting(work: Any, batch: list[Any]) -> Any:
        made.extend(record.where for record in batch)
        return make(work, batch)

    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepared.UnitWork, "__call__", noting)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(UnitWriter, "close", stopped)
        stored(path / "again", rows, **given)
    assert len(made) == 200
    made.clear()
    found = stored(path / "again", rows, **given)
    assert 0 < len(made) < 150
    assert found.report == expected.report
    assert (found.desirable == expected.desirable).all()
    assert shown(found) == shown(expected)
    assert not list((path / "again" / "cache").glob(".parts*"))
