"""rejected = 'generate' over two stages: what the model says, what it is trained on, and that a resumed run reads it."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid
from transformers import AutoTokenizer

from pipeline.artifacts.adapter.adapter import WEIGHTS_FILE
from pipeline.config import loading
from pipeline.data.batches import Position
from pipeline.formats.base_model import read_base
from pipeline.generation import adapter as adapters
from pipeline.generation.decoding import Answer, Asked, InOneProcess, answers, speaking
from pipeline.generation.sampling import Sampling
from pipeline.training.data import specs
from pipeline.training.data.batches import micro_batches
from pipeline.training.data.read import Data, read_data
from pipeline.training.engine import on_policy
from tests.helpers import unsplit
from tests.helpers.builders import metrics, save_model, write_config
from tests.helpers.configs import problems, small
from tests.helpers.stages import CPU, chain
from tests.training.checkpoint.test_resume import assert_equal, final_state, numbers, run_plan
from tests.training.run.test_preference_trained import WORDS, near, text

STEPS, MOST, BETA, SEED = 6, 7, 0.5, 3
PAIRS = {"dataset_type": "preference", "dataset_path": "x.jsonl", "sequence_len": 64}
ON = {"rl": {"method": "dpo"}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"datasets": [{**PAIRS, "rejected": "generate", "eval_size": 2}], **ON}, "datasets.0.eval_size: does not go"),
        ({"datasets": [{**PAIRS, "rejected": "generate", "field_label": "x"}], **ON}, "datasets.0.field_label: does"),
        (
            {"datasets": [{**PAIRS, "dataset_type": "unpaired", "rejected": "generate"}]},
            "datasets.0.rejected: has a meaning for 'preference' only",
        ),
        ({"datasets": [PAIRS], "sampling": {"top_k": 5}, **ON}, "sampling: has a meaning with rejected = 'generate'"),
        ({"datasets": [PAIRS], "rejected_sampling_max_new_tokens": 5, **ON}, "sampling: has a meaning with"),
        ({"rejected_sampling": True}, "rejected_sampling: none of [[datasets]] is of pairs"),
        (
            {"datasets": [{**PAIRS, "rejected": "generate"}], "sampling": {"min_p": 2}, **ON},
            "sampling.min_p = 2",
        ),
    ],
)
def test_what_does_not_go_with_it_is_refused(changes: dict[str, Any], said: str) -> None:
    (line,) = problems({**small(), **changes})
    assert said in line


def test_qlora_pipes_keys_are_the_same_run() -> None:
    theirs = {"rejected_sampling": True, "rejected_sampling_max_new_tokens": 9, "sampling": {"temperature": 0.7}}
    config = loading.validate({**small(datasets=[PAIRS]), **ON, **theirs}, "x.toml")
    ours = {"datasets": [{**PAIRS, "rejected": "generate"}], "sampling": {"max_new_tokens": 9, "temperature": 0.7}}
    same = loading.validate({**small(), **ON, **ours}, "x.toml")
    assert specs.generation_of(config.sampling, config.datasets) == specs.generation_of(same.sampling, same.datasets)
    assert config.datasets == same.datasets
    again = loading.validate(config.model_dump(exclude_unset=True), "written back")
    assert again.datasets == config.datasets
    assert specs.generation_of(None, loading.validate(small(), "x.toml").datasets) is None


def test_a_line_that_a_kill_cut_short_is_asked_for_again(tmp_path: Path) -> None:
    file = tmp_path / on_policy.FILE
    lines = [{"step": step, "dataset": "pairs", "row": 4, "ids": [step]} for step in (1, 2, 3)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "data')
    assert on_policy._read(file, 1) == {(2, "pairs", 4): [2], (3, "pairs", 4): [3]}
    assert file.read_text().endswith('"ids": [3]}\n')
    assert on_policy._read(tmp_path / "nothing", 0) == {}


# In a run


def config(root: Path, **changes: Any) -> str:
    """Dropout, so that RNG matters, which neither the answers nor the reference may see; the model's answers and given ones."""
    generated = [{"prompt": WORDS[7 * n], "chosen": text(3 * n, n % 5 + 1)} for n in range(24)]
    given = [
        {"prompt": WORDS[7 * n], "chosen": text(3 * n, n % 4 + 1), "rejected": text(500 + 3 * n, n % 5 + 2)}
        for n in range(8)
    ]
    for name, rows in (("asked", generated), ("given", given)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"dataset_type": "preference", "sequence_len": 64}
    settings = {
        "model": str(root / "cohere"),
        "output_dir": str(root / "runs"),
        "max_steps": STEPS,
        "epochs": 3,
        "lora_dropout": 0.2,
        "gradient_accumulation_steps": 4,
        "micro_batch_size_per_gpu": 2,
        "save_steps": 2,
        "checkpoint_on_save": True,
        "optimizer": {"type": "adamw_kahan", "lr": 3e-2, "weight_decay": 0.01},
        "sampling": {"max_new_tokens": MOST, "temperature": 0.9, "seed": SEED},
        "objective": {"type": "preference", "loss_type": "sigmoid", "beta": BETA},
        "datasets": [
            {"name": "asked", "dataset_path": str(root / "asked.jsonl"), "rejected": "generate", **common},
            {"name": "given", "dataset_path": str(root / "given.jsonl"), **common},
        ],
        **changes,
    }
    return str(write_config(root / "config.toml", **settings))


def said(run: Path | str) -> dict[tuple[int, int], list[int]]:
    """(step, unit) → the answer's ids; each is there once."""
    lines = [json.loads(line) for line in (Path(run) / on_policy.FILE).read_text(encoding="utf-8").splitlines()]
    found = {(line["step"], line["row"]): line["ids"] for line in lines}
    assert len(found) == len(lines)
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A whole run; one that was killed in its save at step 4 and resumed; the same from where an answer of step 3 was changed;
    and a whole one over two replicas."""
    root = tmp_path_factory.mktemp("on_policy")
    save_model(root / "cohere", "cohere", logit_scale=1.0)
    toml = config(root)
    run_plan(root, 2, [{"config": toml, "fault": "die_in_save:4"}], expect=-9 & 0xFF, name="killed")
    (killed,) = [p for p in (root / "runs").iterdir() if (p / "config.toml").exists()]
    before = said(killed)
    assert {step for step, _ in before} == {1, 2, 3, 4}, "written down before the step"
    changed = root / "changed"
    shutil.copytree(killed, changed)
    lines = [json.loads(line) for line in (changed / on_policy.FILE).read_text(encoding="utf-8").splitlines()]
    next(line for line in lines if line["step"] == 3)["ids"] = [7, 8, 9]
    (changed / on_policy.FILE).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    replicas = ["pipeline_stages=1", "gradient_accumulation_steps=2", "max_steps=2"]
    plan: list[dict[str, Any]] = [
        {"config": toml, "resume": str(killed)},
        {"config": toml},
        {"config": toml, "resume": str(changed)},
        {"config": toml, "overrides": replicas},
    ]
    done = run_plan(root, 2, plan, name="resumed")
    assert done["codes"] == [0, 0, 0, 0]
    resumed = said(killed)
    assert {key: resumed[key] for key in before} == before
    return {
        name: Path(run) for name, run in zip(("resumed", "whole", "changed", "replicas"), done["runs"], strict=True)
    }


@pytest.mark.slow
def test_killed_and_resumed_is_bit_equal_and_reads_what_was_said(runs: dict[str, Path]) -> None:
    assert_equal(final_state(str(runs["resumed"])), final_state(str(runs["whole"])))
    assert numbers(str(runs["resumed"])) == numbers(str(runs["whole"]))
    assert said(runs["resumed"]) == said(runs["whole"])
    changed = said(runs["changed"])
    assert [7, 8, 9] in changed.values(), "it was not asked again"
    state, whole = final_state(str(runs["changed"])), final_state(str(runs["whole"]))
    assert any(not torch.equal(state[key], whole[key]) for key in whole if key.startswith("weights/"))


def units_of(run: Path) -> tuple[Any, Data]:
    chosen = loading.load(str(run / "config.toml"), None, [])
    tokenizer = AutoTokenizer.from_pretrained(chosen.model)
    data = read_data(specs.data_of(chosen), tokenizer)
    return data.train[0].store, data


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 3])
def test_answers_are_those_of_the_model_as_it_was_before_the_step(runs: dict[str, Path], step: int) -> None:
    """Of step 3, with the adapter that was saved after step 2."""
    run = runs["whole"]
    store, data = units_of(run)
    base = Path(loading.load(str(run / "config.toml"), None, []).model)
    sampling = Sampling(temperature=0.9, seed=SEED)
    found = {row: ids for (at, row), ids in said(run).items() if at == step}
    assert data.spoken is not None
    asked = [
        Asked(store.rejected.prompt(row).tolist(), sampling.noise(step, f"asked {row}"), most=MOST) for row in found
    ]
    stages = chain(base, [0, 4])
    saved = adapters.read(run / "step2", read_base(base, "model"), None) if step > 1 else None
    with speaking(stages), adapters.worn(stages[0], saved):
        right: list[Answer] = answers(InOneProcess(stages, CPU), asked, sampling, data.spoken.stops, MOST)
    assert [[*one.tokens, *([] if one.stop is None else [one.stop])] for one in right] == list(found.values())
    assert (run / "step2" / WEIGHTS_FILE).exists()


@pytest.mark.slow
def test_answers_do_not_depend_on_how_the_work_is_shared(runs: dict[str, Path]) -> None:
    first = {key: ids for key, ids in said(runs["whole"]).items() if key[0] == 1}
    assert {key: ids for key, ids in said(runs["replicas"]).items() if key[0] == 1} == first


@pytest.mark.slow
def test_what_is_trained_is_the_answer_against_the_reference(runs: dict[str, Path]) -> None:
    """The loss of step 3 but for dropout: of a run without it, by the unsplit model, its adapter and its base."""
    root = runs["whole"].parent.parent
    plan = [{"config": config(root, lora_dropout=0.0, output_dir=str(root / "plain"), max_steps=3)}]
    run = Path(run_plan(root, 2, plan, name="plain")["runs"][0])
    losses = [line["train/loss"] for line in metrics(run) if "train/loss" in line]
    store, data = units_of(run)
    answered = {row: ids for (step, row), ids in said(run).items() if step == 3}
    batches = micro_batches(specs.data_of(loading.load(str(run / "config.toml"), None, [])), data)
    position = batches.info(batches.info(Position()).next_position).next_position
    rows = batches.info(position).rows
    assert {row for index, row in rows if index == 0} == set(answered)
    assert {index for index, _ in rows} == {0, 1}, "both kinds of pairs are in the step"
    stores = [store.answered(answered), data.train[1].store]
    state = {k.removeprefix("weights/"): v for k, v in final_state(str(run), 2).items() if k.startswith("weights/")}

    @torch.no_grad()
    def of_units(dtype: torch.dtype) -> torch.Tensor:
        """[2, U]: of step 1, when policy and reference are one, and of step 3."""
        model = unsplit.load(root / "cohere", dtype)
        reference = [sums(model, stores[index], row) for index, row in rows]
        unsplit.with_multiplicative(model, state, 2.0)
        margins = [
            sums(model, stores[index], row) - before for (index, row), before in zip(rows, reference, strict=True)
        ]
        of_step = -torch.stack([logsigmoid(BETA * (one[0] - one[1])) for one in margins])
        return torch.stack([torch.full_like(of_step, math.log(2)), of_step])

    near([losses[0], losses[2]], of_units(torch.float64), of_units(torch.float32))
    assert abs(losses[2] - math.log(2)) > 1e-3
    last = [line for line in metrics(run) if "train/generated/tokens" in line][-1]
    assert last["train/generated/tokens"] == pytest.approx(sum(map(len, answered.values())) / len(answered))
    assert 0 <= last["train/generated/stopped"] <= 1
    assert 0 <= last["train/generated/same"] <= 1


def sums(model: Any, store: Any, unit: int) -> torch.Tensor:
    """[2]: Σ log p of chosen and rejected."""
    found = []
    for slot in store.slots:
        ids = torch.from_numpy(slot.ids(unit).copy()).long()
        ((start, end),) = slot.spans(unit)
        logits = model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
        found.append(logits[start - 1 : end - 1].gather(1, ids[start:end, None]).sum())
    return torch.stack(found)
