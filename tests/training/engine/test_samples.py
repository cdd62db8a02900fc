"""[samples] in a run over two stages: what is written, and that the run ends in the same weights as one without."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer

from pipeline.config import loading
from pipeline.console import UserError
from pipeline.generation.decoding import Asked, InOneProcess, answers
from pipeline.generation.prompts import asker, keys_of_noise
from pipeline.generation.sampling import Sampling
from pipeline.training.metrics import Metrics
from pipeline.training.start import check as start
from tests.helpers.builders import metrics, save_model, write_config
from tests.helpers.rows import talk, write_jsonl
from tests.helpers.stages import CPU, chain
from tests.training.checkpoint.test_resume import final_state, run_plan

PROMPTS = ["The salt was", "He came to the", "The salt was"]
SAMPLES = {"prompts": PROMPTS, "every_steps": 2, "max_new_tokens": 12, "temperature": 0.8, "min_p": 0.02, "seed": 3}
STEPS = 3


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "base"
    save_model(folder, "cohere2", sliding_window=8)
    return folder


def config(folder: Path, base: Path, **changes: Any) -> Path:
    """Whatever draws at random or recomputes: dropout, NEFTune, checkpointing; and our kernels."""
    settings = {
        "model": str(base),
        "output_dir": str(folder / "runs"),
        "max_steps": STEPS,
        "lora_dropout": 0.1,
        "neftune_noise_alpha": 5.0,
        "activation_checkpointing": True,
        "kernels": "all",
        "optimizer": {"type": "adamw_kahan", "lr": 0.3},
        **changes,
    }
    return write_config(folder / f"{'with' if 'samples' in changes else 'without'}.toml", **settings)


@pytest.fixture(scope="module")
def runs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run with samples and one without, by the same two processes, from the first step to the last."""
    folder = tmp_path_factory.mktemp("runs")
    plan = [{"config": str(config(folder, base, **given))} for given in ({"samples": SAMPLES}, {})]
    done = run_plan(folder, 2, plan)
    assert done["codes"] == [0, 0]
    return done["runs"]


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_a_run_with_samples_ends_as_one_without(runs: list[str]) -> None:
    """To the bit: weights, the optimizer's state, the generators', and the losses."""
    with_samples, without = (final_state(run, STEPS) for run in runs)
    assert with_samples.keys() == without.keys()
    assert len(without) > 6
    for name, tensor in without.items():
        assert torch.equal(with_samples[name], tensor), name
    saved = [load_file(next((Path(run) / f"step{STEPS}").glob("*.safetensors"))) for run in runs]
    assert all(torch.equal(saved[0][name], tensor) for name, tensor in saved[1].items())
    losses = [[line["train/loss"] for line in metrics(Path(run)) if "train/loss" in line] for run in runs]
    assert losses[0] == losses[1]
    assert len(losses[0]) == STEPS


def test_samples_are_written_at_the_start_in_between_and_at_the_end(runs: list[str], base: Path) -> None:
    """What the base says over two processes is what one process says; before the first step the adapter changes nothing."""
    written = lines(Path(runs[0]))
    assert [(line["step"], line["prompt"]) for line in written] == [(step, p) for step in (0, 2, 3) for p in PROMPTS]
    asking = asker(AutoTokenizer.from_pretrained(base), str(base), chat=False, system="")
    sampling = Sampling(temperature=0.8, min_p=0.02, seed=3)
    keys = keys_of_noise(PROMPTS)
    for step in (0, 2, 3):
        asked = [Asked(asking.ids(p), sampling.noise(step, key)) for p, key in zip(PROMPTS, keys, strict=True)]
        right = answers(InOneProcess(chain(base, [0, 4]), CPU), asked, sampling, asking.stops, 12)
        found = [line["base"] for line in written if line["step"] == step]
        assert [entry["text"] for entry in found] == [asking.text(answer.tokens) for answer in right]
        assert [(entry["tokens"], entry["stopped"]) for entry in found] == [(len(a.tokens), a.stopped) for a in right]
        assert found[0] != found[2], "the same prompt once more has other noise"
    for line in written:
        own = {key: line[key] for key in ("text", "tokens", "stopped")}
        assert (own == line["base"]) or line["step"]
    assert any(line["text"] != line["base"]["text"] for line in written)
    shares = {line["step"]: line["samples/stopped"] for line in metrics(Path(runs[0])) if "samples/stopped" in line}
    assert shares == {s: sum(line["stopped"] for line in written if line["step"] == s) / 3 for s in (0, 2, 3)}
    events = EventAccumulator(runs[0])
    events.Reload()
    assert [event.step for event in events.Tensors("samples/1/text_summary")] == [0, 2, 3]
    assert PROMPTS[1] in events.Tensors("samples/1/text_summary")[0].tensor_proto.string_val[0].decode()


def test_a_resumed_run_drops_what_it_will_say_again(tmp_path: Path) -> None:
    for step in (0, 2, 4):
        with (tmp_path / "samples.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "prompt": "x"}) + "\n")
    Metrics(tmp_path, 2, settled=True).close()
    assert [line["step"] for line in lines(tmp_path)] == [0, 2]
    Metrics(tmp_path, 2, settled=False).close()
    assert [line["step"] for line in lines(tmp_path)] == [0]


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        ({"prompts_file": "nowhere.txt"}, "samples.prompts_file: nowhere.txt cannot be read"),
        ({"prompts": ["x"], "chat": True}, "the model's tokenizer has no chat template"),
    ],
)
def test_check_refuses_what_cannot_be_asked(base: Path, tmp_path: Path, samples: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        start.check(loading.load(str(config(tmp_path, base, samples=samples))), None)


def test_check_says_what_will_be_asked(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = {"prompts": ["The salt was"], "max_new_tokens": 300, "temperature": 0, "at_start": False}
    start.check(loading.load(str(config(tmp_path, base, samples=samples))), None)
    said = capsys.readouterr()
    assert "samples:  1 prompt(s) every 100 steps, at the end; greedy, at most 300 tokens each" in said.out
    assert "samples.max_new_tokens = 300 after a prompt of" in said.err
    assert "more than the model's max_position_embeddings = 256" in said.err


@pytest.mark.slow
def test_replicas_share_the_prompts_out(base: Path, tmp_path: Path) -> None:
    """Two of one stage say, each of its own prompts, what one process says; the first of them writes all, in their order."""
    toml = str(config(tmp_path, base, samples=SAMPLES, max_steps=2))
    (run,) = run_plan(tmp_path, 2, [{"config": toml, "overrides": ["pipeline_stages=1"]}])["runs"]
    written = lines(Path(run))
    assert [(line["step"], line["prompt"]) for line in written] == [(step, p) for step in (0, 2) for p in PROMPTS]
    asking = asker(AutoTokenizer.from_pretrained(base), str(base), chat=False, system="")
    sampling, keys = Sampling(temperature=0.8, min_p=0.02, seed=3), keys_of_noise(PROMPTS)
    for step in (0, 2):
        asked = [Asked(asking.ids(p), sampling.noise(step, key)) for p, key in zip(PROMPTS, keys, strict=True)]
        right = answers(InOneProcess(chain(base, [0, 4]), CPU), asked, sampling, asking.stops, 12)
        assert [line["base"]["text"] for line in written if line["step"] == step] == [
            asking.text(answer.tokens) for answer in right
        ]


@pytest.mark.slow
def test_a_model_that_is_trained_on_chats_learns_to_stop(tmp_path: Path) -> None:
    """Before it, it goes on to the limit; then it says its answer and stops, as each trained turn does."""
    save_model(tmp_path / "base", "llama")
    questions = [f"Is it {word}?" for word in ("salt", "day", "night", "sea", "late", "far", "near", "true")]
    rows = [talk(question, "It is.") for question in questions]
    talks = {
        "name": "talks",
        "dataset_type": "chat",
        "dataset_path": str(write_jsonl(tmp_path / "chat.jsonl", rows)),
        "sequence_len": 128,
        "chat_template": "alpaca",
    }
    samples = {"prompts": questions[:3], "at_start": True, "at_end": True, "max_new_tokens": 20, "temperature": 0.0}
    toml = config(
        tmp_path,
        tmp_path / "base",
        samples=samples | {"every_steps": 0},
        datasets=[talks],
        adapter_type="lora",
        target_modules="all-linear",
        layers_to_transform=None,
        lora_rank=16,
        lora_alpha=32,
        lora_dropout=0.0,
        neftune_noise_alpha=None,
        kernels="none",
        micro_batch_size_per_gpu=4,
        max_steps=60,
        optimizer={"type": "adamw", "lr": 0.01},
    )
    (run,) = run_plan(tmp_path, 2, [{"config": str(toml)}])["runs"]
    before, after = ([line for line in lines(Path(run)) if line["step"] == step] for step in (0, 60))
    assert len(before) == len(after) == 3
    assert not any(line["stopped"] for line in before)
    assert [(line["text"].strip(), line["stopped"]) for line in after] == [("It is.", True)] * 3
