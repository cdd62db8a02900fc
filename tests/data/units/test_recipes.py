"""configs/preference_*.toml: each recipe reads rows made with its set's columns, as the set's card has them."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import loading
from pipeline.data.units.build import build
from pipeline.training.data.specs import unit_spec
from tests.helpers import chat
from tests.helpers.paths import ROOT

RECIPES = sorted((ROOT / "configs").glob("preference_*.toml"))
ASK, YES, NO = (
    {"role": role, "content": text} for role, text in (("user", "Tea?"), ("assistant", "Yes."), ("assistant", "No."))
)
SCORES = ("helpfulness", "correctness", "coherence", "complexity")
QUESTION = "<|im_start|>user\nTea?<|im_end|>\n<|im_start|>assistant\n«"
# Rows, and what the first unit's rows end in.
MADE: dict[str, tuple[list[dict[str, Any]], list[str]]] = {
    "ultrafeedback": (
        [
            {
                "prompt": "Tea?",
                "prompt_id": "a",
                "chosen": [ASK, YES],
                "rejected": [ASK, NO],
                "messages": [ASK, YES],
                "score_chosen": 8.0,
                "score_rejected": 4.0,
            }
        ],
        [f"{QUESTION}Yes.<|im_end|>»", f"{QUESTION}No.<|im_end|>»"],
    ),
    "helpsteer2": (
        [{"prompt": "Tea?", "chosen_response": "Yes.", "rejected_response": "No."}],
        [f"{QUESTION}Yes.<|im_end|>»", f"{QUESTION}No.<|im_end|>»"],
    ),
    "helpsteer": (
        [
            {"prompt": "Tea?", "response": text, **dict.fromkeys(SCORES, score), "verbosity": 2}
            for text, score in (("No.", 1), ("Yes.", 4))
        ],
        [f"{QUESTION}Yes.<|im_end|>»", f"{QUESTION}No.<|im_end|>»"],
    ),
    "hh": (
        [{"chosen": "\n\nHuman: Tea?\n\nAssistant: I do.", "rejected": "\n\nHuman: Tea?\n\nAssistant: I do not."}],
        ["\n\nHuman: Tea?\n\nAssistant:« I do.<|im_end|>»", "\n\nHuman: Tea?\n\nAssistant:« I do not.<|im_end|>»"],
    ),
    "shp": (
        [
            {
                "post_id": "p",
                "history": "Tea?",
                "human_ref_A": "No.",
                "human_ref_B": "Yes.",
                "labels": 0,
                "score_ratio": 3.0,
            }
        ],
        [f"{QUESTION}Yes.<|im_end|>»", f"{QUESTION}No.<|im_end|>»"],
    ),
    "toxic_dpo": (
        [{"prompt": "Tea?", "chosen": "Yes.", "rejected": "No."}],
        [f"{QUESTION}Yes.<|im_end|>»", f"{QUESTION}No.<|im_end|>»"],
    ),
    "truthy_dpo": (
        [
            {"id": "x", "source": "y", "system": "Be brief.", "prompt": "Tea?", "chosen": "Yes.", "rejected": "No."},
            {"id": "z", "source": "y", "system": "", "prompt": "Milk?", "chosen": "Yes.", "rejected": "No."},
        ],
        [f"Be brief.<|im_end|>\n{QUESTION}Yes.<|im_end|>»", f"Be brief.<|im_end|>\n{QUESTION}No.<|im_end|>»"],
    ),
    "orca_dpo": (
        [{"system": "Be brief.", "question": "Tea?", "chosen": "Yes.", "rejected": "No."}],
        [f"Be brief.<|im_end|>\n{QUESTION}Yes.<|im_end|>»", f"Be brief.<|im_end|>\n{QUESTION}No.<|im_end|>»"],
    ),
    "kto_mix": (
        [
            {"prompt": [ASK], "completion": [YES], "label": True},
            {"prompt": [{"role": "user", "content": "Milk?"}], "completion": [NO], "label": False},
        ],
        [f"{QUESTION}Yes.<|im_end|>»", f"{QUESTION}No.<|im_end|>»"],
    ),
    "nectar": (
        [
            {
                "prompt": "\n\nHuman: Tea?\n\nAssistant: ",
                "answers": [{"answer": f"{n}.", "model": "m", "rank": float(n)} for n in (2, 1, 4, 3, 5, 6, 7)],
            }
        ],
        ["1.<|im_end|>»", "2.<|im_end|>»", "3.<|im_end|>»", "4.<|im_end|>»"],
    ),
}


def test_each_recipe_has_its_rows() -> None:
    assert {path.stem.removeprefix("preference_") for path in RECIPES} == set(MADE)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_reads_its_set(path: Path, tmp_path: Path) -> None:
    rows, ends = MADE[path.stem.removeprefix("preference_")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = loading.load(str(path), None, [f"datasets.0.dataset_path={str(tmp_path / 'rows.jsonl')!r}"])
    tokenizer = chat.tokenizer("qwen2_5", "<|im_end|>")
    tokenizer.chat_template = chat.source("qwen2_5")
    try:
        store = build(unit_spec(config.datasets[0], "made"), tokenizer, [], tmp_path / "cache")
    finally:
        tokenizer.chat_template = None
    assert store.report.bad == 0
    for slot, end in zip(store.slots, ends, strict=True):
        ((start, _),) = slot.spans(0)
        text = f"{tokenizer.decode(slot.ids(0)[:start])}«{tokenizer.decode(slot.ids(0)[start:])}»"
        assert text.endswith(end), text
