"""Questions with options: how rows are read, in which orders they are asked, and that a habit is no knowledge."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from pipeline.console import UserError
from pipeline.data.chat import encode
from pipeline.data.chat.template import Template, specials_of
from pipeline.data.chat.turns import Refused
from pipeline.evaluation import cells, multiple_choice
from pipeline.evaluation.multiple_choice import Asking, Question
from pipeline.evaluation.records import Scored, records
from pipeline.evaluation.scoring import Score
from pipeline.evaluation.units import Unit, UnitSet
from tests.helpers.builders import save_tokenizer

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|bot|>{% endif %}"
)
RULES = cells.Rules(resamples=500, confidence=0.95, seed=0, beta=0.1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def asking(tokenizer: Any, **changes: Any) -> Asking:
    given: dict[str, Any] = {
        "prompt": "prompt",
        "choices": "choices",
        "answer": "answer",
        "permutations": 2,
        "limit": 256,
        "encoder": encode.encoder(tokenizer),
        "decode": tokenizer.decode,
        "bos": None,
        "template": None,
    }
    return Asking(**{**given, **changes})


@pytest.mark.parametrize(
    ("choices", "answer", "right"),
    [
        (["red", "blue"], 1, 1),
        (["red", "blue"], "B", 1),
        (["red", "blue"], "blue", 1),
        (["red", "blue"], "0", 0),
        ({"text": ["red", "blue"], "label": ["1", "2"]}, "2", 1),
        (["1", "0"], "0", 1),  # an option's own text goes before its number
    ],
)
def test_the_right_one_is_named_in_several_ways(tokenizer: Any, choices: Any, answer: Any, right: int) -> None:
    read = asking(tokenizer).read({"prompt": " Which? ", "choices": choices, "answer": answer})
    assert read == Question("Which?", choices["text"] if isinstance(choices, dict) else choices, right)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("text", "the row is no object"),
        ({"prompt": "x", "choices": ["a", "b"]}, "there is no field 'answer'"),
        ({"prompt": "", "choices": ["a", "b"], "answer": 0}, "'prompt' is no text"),
        ({"prompt": "x", "choices": "a, b", "answer": 0}, "'choices' is no list of texts"),
        ({"prompt": "x", "choices": ["a"], "answer": 0}, "it has 1 options"),
        ({"prompt": "x", "choices": ["a", "a "], "answer": 0}, "two of its options are the same"),
        ({"prompt": "x", "choices": ["a", "b"], "answer": 2}, "'answer' is none of its options"),
        ({"prompt": "x", "choices": ["a", "b"], "answer": True}, "'answer' is none of its options"),
        ({"prompt": "x" * 900, "choices": ["a", "b"], "answer": 0}, "longer than sequence_len = 256"),
    ],
)
def test_what_is_no_question_is_refused(tokenizer: Any, row: Any, reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        asking(tokenizer).units(row, "x:1")


@pytest.mark.parametrize("options", [2, 3, 4, 7])
@pytest.mark.parametrize("permutations", [2, 3, 9])
def test_in_each_order_the_right_one_stands_elsewhere(options: int, permutations: int) -> None:
    question = Question("x", [str(number) for number in range(options)], 1)
    found = multiple_choice.orders("1234abcd", question, permutations)
    assert len({order.index(1) for order in found}) == len(found) == min(permutations, options)
    assert all(sorted(order) == list(range(options)) for order in found)
    assert found == multiple_choice.orders("1234abcd", question, permutations)
    assert found != multiple_choice.orders("1234abce", question, permutations) or options == 2


def test_plain_text_is_listed_and_its_letters_are_scored(tokenizer: Any) -> None:
    row = {"prompt": "Which is a colour?", "choices": ["seven", "red", "run"], "answer": 1}
    units = asking(tokenizer, permutations=3, bos=1).units(row, "x:1")
    for unit in units:
        for place, row_of in enumerate(unit.rows):
            text = tokenizer.decode(row_of.ids[1:])
            listed = [row["choices"][option] for option in unit.order]
            assert row_of.ids[0] == 1
            assert text == f"Which is a colour?\nA. {listed[0]}\nB. {listed[1]}\nC. {listed[2]}\nAnswer: {'ABC'[place]}"
            ((start, end),) = row_of.spans
            assert tokenizer.decode(row_of.ids[start:end]) == f" {'ABC'[place]}"
        assert unit.order[unit.right] == 1
    assert len({unit.prompt for unit in units}) == 1
    assert len({unit.content for unit in units}) == 3


def test_with_a_template_the_letter_is_the_answer(tokenizer: Any) -> None:
    template = Template(TEMPLATE, specials_of(tokenizer, [2]))
    (unit, _) = asking(tokenizer, template=template, bos=1).units(
        {"prompt": "Q", "choices": ["a", "b"], "answer": 0}, ""
    )
    ((start, end),) = unit.rows[1].spans
    before = tokenizer.decode(unit.rows[1].ids[:start])
    assert before.startswith("<|user|>Q\nA. ")
    assert before.endswith("<|bot|>")
    assert tokenizer.decode(unit.rows[1].ids[start:end]) == "B"


def test_too_many_bad_rows_are_an_error(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "x", "choices": ["a", "b"], "answer": 0}, {"prompt": "y", "choices": [], "answer": 0}]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    units, notes = multiple_choice.read(str(tmp_path / "q.jsonl"), "q", asking(tokenizer), 0.5)
    assert len(units) == 2
    assert notes[0] == "1 of 2 questions"
    assert "q.jsonl:2" in notes[1]
    with pytest.raises(UserError, match=r"dataset 'q': 1 of 2 rows are bad"):
        multiple_choice.read(str(tmp_path / "q.jsonl"), "q", asking(tokenizer), 0.1)


def scored(name: str, units: list[Unit], favourite: int | None) -> Scored:
    """Under a model that gives probability 0.9 to the option listed at `favourite`, or to the right one."""
    data = UnitSet("q", "multiple_choice", "in-sample", units)
    scores = []
    for unit in units:
        best = unit.right if favourite is None else min(favourite, len(unit.rows) - 1)
        rest = 0.1 / (len(unit.rows) - 1)
        scores += [Score(float(np.log(0.9 if place == best else rest)), False) for place in range(len(unit.rows))]
    return Scored(name, None, data, records(data, scores))


def test_who_always_says_the_first_is_right_as_often_as_chance(tokenizer: Any) -> None:
    """The file has every right answer first, as TruthfulQA has."""
    rows = [{"prompt": f"Q{n}", "choices": ["t", "f", "g", "h"][: 2 + n % 3], "answer": 0} for n in range(200)]
    units = [unit for n, row in enumerate(rows) for unit in asking(tokenizer).units(row, str(n))]
    chance = multiple_choice.chance(units)
    (first,) = (c for c in cells.cells([scored("base", units, 0)], RULES) if c.main)
    assert first.figure.interval is not None
    assert first.figure.interval[0] <= chance <= first.figure.interval[1]
    (knows,) = (c for c in cells.cells([scored("base", units, None)], RULES) if c.main)
    assert knows.figure.value == 1


def test_options_that_are_equally_likely_share_what_is_right(tokenizer: Any) -> None:
    units = asking(tokenizer).units({"prompt": "Q", "choices": ["a", "b", "c", "d"], "answer": 0}, "")
    data = UnitSet("q", "multiple_choice", "test", units)
    even = Scored("base", None, data, records(data, [Score(-2.0, False)] * 8))
    by_name = {cell.measure: cell.figure.value for cell in cells.cells([even], RULES)}
    assert by_name == pytest.approx({"mc_acc": 0.25, "mc_prob": 0.25, "mc_coverage": 4 * np.exp(-2)})
