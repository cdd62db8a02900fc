"""generate.py as users start it: what it says to prompts and at the terminal, and what it refuses."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import generate
from pipeline.commands import generate as command
from pipeline.console import UserError
from pipeline.model.quantized import Scheme
from tests.helpers import quantization
from tests.helpers.builders import ROOT, launch, save_model
from tests.helpers.families import by_peft

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
PROMPTS = ["The salt was", "He came to the"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("models") / "qwen2"
    return folder, save_model(folder, "qwen2", layers=2)


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> list[str]:
    """Lines that it prints."""
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, arguments)])
    assert generate.main() == 0
    return capsys.readouterr().out.splitlines()


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """These lines at a terminal, and then the end of the input."""
    waiting = list(lines)

    def read(_: str) -> str:
        if not waiting:
            raise EOFError
        return waiting.pop(0)

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)


def said(model: Any, folder: Path, prompt: str, count: int) -> str:
    """By transformers' own generate, with stops."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    settings = {"max_new_tokens": count, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
    tokens = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)[0, ids.shape[1] :]
    return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def test_prompts_are_answered_with_an_adapter_and_without(
    model: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, whole = model
    monkeypatch.setattr("tests.helpers.families.load_model", lambda _: whole.from_pretrained(folder))
    adapted = by_peft(folder, tmp_path / "adapter", "lora", size=0.3)
    (tmp_path / "prompts.txt").write_text(PROMPTS[1] + "\n")
    given = [
        "--temperature",
        "0",
        "--max-new-tokens",
        "8",
        "--prompt",
        PROMPTS[0],
        "--prompts",
        tmp_path / "prompts.txt",
    ]
    lines = run(monkeypatch, capsys, "--model", folder, "--lora", tmp_path / "adapter", "--compare", *given)
    text = "\n".join(lines)
    assert "answers: " in text
    for prompt in PROMPTS:
        with adapted.disable_adapter():
            of_base = said(adapted, folder, prompt, 8)
        with_adapter = said(adapted, folder, prompt, 8)
        assert with_adapter != of_base
        for answer in (with_adapter, of_base):
            shown = "".join(c if c.isprintable() else "?" for c in answer)
            assert shown.split("?")[0] in text
        assert f"  > {prompt}" in lines
    assert text.count("[reached the limit]") + text.count("[stopped after ") == 4


@pytest.mark.parametrize("quant", ["nf4", "nf4-double", "int8"])
def test_a_base_in_few_bits_says_what_transformers_own_says(
    tmp_path: Path, quant: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = quantization.save_model(tmp_path / "base", "llama", num_hidden_layers=2)
    whole = quantization.theirs(folder, Scheme.named(quant, torch.float32)).eval()
    given = ["--temperature", "0", "--max-new-tokens", "8", "--base-quant", quant, "--dtype", "float32"]
    text = "\n".join(run(monkeypatch, capsys, "--model", folder, "--prompt", PROMPTS[0], *given))
    right = "".join(c if c.isprintable() else "?" for c in said(whole, folder, PROMPTS[0], 8)).split("?")[0]
    assert right
    assert right in text
    if quant != "int8":  # which is too near to say something else in so few tokens
        assert right not in "\n".join(run(monkeypatch, capsys, "--model", folder, "--prompt", PROMPTS[0], *given[:4]))


def test_what_changes_a_weight_is_refused_over_a_base_in_few_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = quantization.save_model(tmp_path / "base", "llama", num_hidden_layers=2)
    monkeypatch.setattr("tests.helpers.families.load_model", AutoModelForCausalLM.from_pretrained)
    by_peft(folder, tmp_path / "adapter", "hra", size=0.3)
    given = ["--model", folder, "--lora", tmp_path / "adapter", "--prompt", "x", "--base-quant", "nf4"]
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, given)])
    with pytest.raises(UserError, match=r"changes the weight of .* itself, .* leave .*--base-quant, out"):
        generate.main()


def test_a_conversation_keeps_what_was_said(
    model: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = model
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    seen: list[list[int]] = []
    answers = command.answers

    def noted(stages: Any, asked: Any, *rest: Any) -> Any:
        seen.append(list(asked[0].ids))
        return answers(stages, asked, *rest)

    monkeypatch.setattr(command, "answers", noted)
    typed(monkeypatch, "Who are you?", "And now?", "/new", "Again?")
    given = ["--model", folder, "--chat", "--system", "Be brief.", "--temperature", "0", "--max-new-tokens", "5"]
    lines = run(monkeypatch, capsys, *given)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    first, second, third = (tokenizer.decode(ids) for ids in seen)
    assert first == "system: Be brief.\nuser: Who are you?\nassistant: "
    assert second.startswith(f"{first}")
    assert second.endswith("user: And now?\nassistant: ")
    assert third == "system: Be brief.\nuser: Again?\nassistant: "
    assert sum(line.startswith("[") for line in lines) == 3


@pytest.mark.slow
def test_two_stages_under_a_launcher_say_what_one_process_says(
    model: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = model
    given = ["--model", str(folder), "--temperature", "0.8", "--max-new-tokens", "8"]
    given += [word for prompt in (*PROMPTS, "And then") for word in ("--prompt", prompt)]
    alone = run(monkeypatch, capsys, *given)
    said = launch(2, ROOT / "generate.py", *given).splitlines()
    first = next(place for place, line in enumerate(alone) if line == f"  > {PROMPTS[0]}")
    answers = alone[first:]
    assert sum(line.startswith("  > ") for line in answers) == 3
    begin = said.index(answers[0])
    assert said[begin : begin + len(answers)] == answers


def test_a_conversation_of_a_model_that_goes_on_by_one_token_only_is_read_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mamba drops its state where several tokens go on from it; the oracle reads all turns at once, without a cache."""
    whole = save_model(tmp_path, "mamba", layers=2)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    seen: list[tuple[list[int], list[int]]] = []
    answers = command.answers

    def noted(stages: Any, asked: Any, *rest: Any) -> Any:
        found = answers(stages, asked, *rest)
        seen.append((list(asked[0].ids), found[0].tokens))
        return found

    monkeypatch.setattr(command, "answers", noted)
    typed(monkeypatch, "Who are you?", "And now, what is it that you do?", "Why?")
    run(monkeypatch, capsys, "--model", tmp_path, "--chat", "--temperature", "0", "--max-new-tokens", "6")
    assert len(seen) == 3
    for ids, tokens in seen:
        for token in tokens:
            assert int(whole(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()) == token
            ids.append(token)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "there is no terminal to ask at: give --prompt or --prompts"),
        (
            ["--prompt", "x", "--temperature", "-1", "--top-p", "0", "--min-p", "2"],
            "--temperature -1: give 0 or more\n.*--top-p 0:",
        ),
        (
            ["--prompt", "x", "--top-k", "-3", "--max-new-tokens", "0"],
            "--max-new-tokens 0: give 1 or more\n.*--top-k -3",
        ),
        (["--prompt", "x", "--compare"], "--compare shows an adapter's model beside its base: give --lora"),
        (["--prompt", "x", "--system", "y"], "--system is a message of a conversation: add --chat"),
        (["--prompt", "x", "--lora", "nowhere"], "there is no folder nowhere"),
        (["--prompts", "nowhere.txt"], "--prompts: nowhere.txt cannot be read"),
    ],
)
def test_what_is_wrong_is_said(
    model: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["generate.py", "--model", str(model[0]), *arguments])
    with pytest.raises(UserError, match=f"(?s){said}"):
        generate.main()


def test_an_answer_beyond_the_models_positions_is_warned_of(
    model: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "answers", lambda stages, asked, *a: [command.Answer([5], True)] * len(asked))
    monkeypatch.setattr(
        sys, "argv", ["generate.py", "--model", str(model[0]), "--prompt", "x", "--max-new-tokens", "300"]
    )
    assert generate.main() == 0
    said = capsys.readouterr().err
    assert (
        "--max-new-tokens 300 after a prompt of 1 tokens is more than the model's max_position_embeddings = 256" in said
    )
