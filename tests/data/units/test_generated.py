"""Pairs whose rejected answer is yet to come: what is known of them before, and what they are with answers."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.console import UserError
from pipeline.data.batches import MicroBatches, Position
from pipeline.data.mixing import mix
from pipeline.data.preview import preview
from pipeline.data.row_store import IGNORED
from pipeline.data.selection import Streams, whole
from pipeline.data.units.generated import GeneratedPairs
from tests.data.units.test_units import ANSWER, STOP, USER, stored
from tests.helpers import chat
from tests.helpers.data import prose

LIMIT, MOST = 24, 6


@pytest.fixture
def pairs(tmp_path: Path) -> GeneratedPairs:
    words = prose(300, seed=3).split()
    rows = [{"prompt": " ".join(words[n : n + 1 + n % 4]), "chosen": f" {words[n + 9]}"} for n in range(12)]
    store = stored(tmp_path, rows, rejected=None, limit=LIMIT)
    assert len(store.slots) == 1
    return GeneratedPairs(store.folder, LIMIT, MOST)


def test_a_pair_without_its_answer_is_planned_as_long_as_it_may_become(pairs: GeneratedPairs) -> None:
    chosen, rejected = pairs.slots
    assert rejected.name == "pairs, rejected"
    for row in range(len(pairs)):
        ((start, _),) = chosen.spans(row)
        assert rejected.lengths[row] == min(LIMIT, start + MOST)
        assert pairs.lengths[row] == max(chosen.lengths[row], rejected.lengths[row])
        assert rejected.ids(row).tolist() == chosen.ids(row)[:start].tolist()
        assert rejected.spans(row) == []
    assert GeneratedPairs(pairs.folder, LIMIT, None).slots[1].lengths.tolist() == [LIMIT] * len(pairs)


def test_answers_and_what_the_reference_says_go_into_the_micro_batches_of_a_step(pairs: GeneratedPairs) -> None:
    batches = MicroBatches(
        [pairs], mix([whole(Streams(pairs))], seed=1), seed=1, micro_batch_size=2, gradient_accumulation_steps=2
    )
    rows = [row for _, row in batches.info(Position()).rows]
    answers = {row: [5, 6, 7][: 1 + place % 3] for place, row in enumerate(rows)}
    reference = np.full((len(pairs), 2), np.nan, np.float32)
    reference[rows] = [[-1.0, -2.0]] * len(rows)
    micro_batches, info = batches.step(Position(), [pairs.answered(answers).with_reference(reference)])
    assert [row for _, row in info.rows] == rows
    chosen = pairs.slots[0]
    assert info.tokens == sum(2 * int(chosen.lengths[r] - chosen.targets[r] + 0) for r in rows) + sum(
        int(chosen.targets[row]) + len(answers[row]) for row in rows
    )
    for batch in micro_batches:
        assert batch.units is not None
        assert torch.equal(batch.units.reference, torch.tensor([[-1.0] * 2, [-2.0] * 2]))
        for place, row in enumerate(batch.rows):
            assert row is not None
            at = len(batch.rows) + place
            trained = batch.input_ids[at][batch.labels[at] != IGNORED]
            assert trained.tolist() == answers[row[1]]
            assert batch.lengths[at] == chosen.lengths[row[1]] - chosen.targets[row[1]] + len(answers[row[1]])
    assert pairs.slots[1].spans(rows[0]) == [], "the run's store is as it was"


def test_a_preview_shows_the_prompt_that_is_answered(pairs: GeneratedPairs) -> None:
    batches = MicroBatches([pairs], mix([whole(Streams(pairs))], seed=1), seed=1)
    lines = "\n".join(preview(batches, chat.tokenizer("qwen2_5", STOP), 1))
    assert "'pairs, chosen'" in lines
    assert "'pairs, rejected'" in lines


def test_conversations_and_implicit_prompts_wait_for_an_answer_too(tmp_path: Path) -> None:
    rows = [
        {"prompt": USER, "chosen": ANSWER},
        {"chosen": USER + ANSWER},
        {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d"},
    ]
    store = stored(tmp_path, rows, rejected=None)
    waiting = GeneratedPairs(store.folder, 512, None)
    decode = chat.tokenizer("qwen2_5", STOP).decode
    prompts = [decode(waiting.rejected.prompt(row)) for row in range(3)]
    assert prompts[0] == prompts[1]
    assert prompts[0].endswith("<|im_start|>assistant\n")
    assert prompts[2].endswith("\n\nHuman: c\n\nAssistant:")
    (tmp_path / "bad").mkdir()
    with pytest.raises(UserError, match=re.escape("there is no field 'chosen'")):
        stored(tmp_path / "bad", [{"prompt": "a"}], rejected=None)
