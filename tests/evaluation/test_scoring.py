"""Scores through stages: those of one stage, whatever the cut, the micro-batches and the order of rows."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.evaluation.scoring import Score, Scorer
from pipeline.evaluation.units import Row
from tests.helpers.builders import VOCABULARY, save_model
from tests.helpers.stages import CPU, build, chain

LAYERS = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """With a window, and logits that are capped."""
    folder = tmp_path_factory.mktemp("model")
    return folder, save_model(folder, "gemma2", layers=LAYERS, sliding_window=8, final_logit_softcapping=5.0)


def rows() -> list[Row]:
    """Of unequal lengths, with one run of targets, two, or one token."""
    generator = torch.Generator().manual_seed(0)
    lengths, runs = (5, 31, 12, 23, 7), ([(1, 5)], [(4, 9), (20, 31)], [(11, 12)], [(2, 3), (5, 6)], [(3, 7)])
    ids = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    return [Row(*both, 0) for both in zip(ids, runs, strict=True)]


def score(stages: list, given: list[Row], size: int = 1, tokens: int | None = None, **more: Any) -> list[Score]:
    scorer = Scorer(stages, CPU, torch.float32, 2, micro_batch_size=size, batch_size_tokens=tokens)
    return scorer.score(given, **more)


def test_scores_are_those_of_all_logits(model: tuple[Path, Any]) -> None:
    folder, whole = model
    found = score([build(folder, 0, LAYERS)], rows(), greedy=True)
    for row, mine in zip(rows(), found, strict=True):
        ids = torch.tensor([row.ids])
        with torch.no_grad():
            logits = whole(ids).logits[0].float()
        places = [place for start, end in row.spans for place in range(start, end)]
        right = sum(float(logits[place - 1].double().log_softmax(-1)[row.ids[place]]) for place in places)
        assert mine.logprob == pytest.approx(right, rel=1e-5)
        assert mine.greedy == all(int(logits[place - 1].argmax()) == row.ids[place] for place in places)


def test_what_the_model_says_by_itself_is_greedy(model: tuple[Path, Any]) -> None:
    folder, whole = model
    ids = torch.tensor([[5, 6, 7, 8]])
    said = whole.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, pad_token_id=0)
    row = Row(said[0].tolist(), [(4, said.shape[1])], 0)
    other = row._replace(ids=[*row.ids[:-1], (row.ids[-1] + 1) % VOCABULARY])
    assert [s.greedy for s in score([build(folder, 0, LAYERS)], [row, other], size=2, greedy=True)] == [True, False]


def test_neither_stages_nor_batches_change_them(model: tuple[Path, Any]) -> None:
    """Stages to the bit; in a micro-batch products have other shapes, and sums other orders."""
    folder, _ = model
    alone = score([build(folder, 0, LAYERS)], rows())
    assert score(chain(folder, [0, 1, LAYERS]), rows()) == alone
    assert score([build(folder, 0, LAYERS)], rows()[::-1]) == alone[::-1]
    for size, tokens in ((3, None), (1, 40), (1, 400)):
        found = score([build(folder, 0, LAYERS)], rows(), size, tokens)
        assert [s.logprob for s in found] == pytest.approx([s.logprob for s in alone], rel=1e-5)


def test_progress_counts_every_row(model: tuple[Path, Any]) -> None:
    done: list[int] = []
    score([build(model[0], 0, LAYERS)], rows(), 2, advance=done.append)
    assert sum(done) == 5
