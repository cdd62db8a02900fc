"""The commands that a command ends with: what they name can be parsed by the scripts that they start."""

import shlex
from pathlib import Path

import generate
import merge_lora
from pipeline.publishing import next_steps

BASE, SAVED = Path("a base"), Path("runs/x/step5")


def test_what_follows_an_export() -> None:
    (hear,) = next_steps.after_export(BASE, SAVED, gguf=False)
    asked = generate.parser().parse_args(shlex.split(hear.line)[2:])
    assert (Path(asked.model), asked.lora, asked.compare) == (BASE, SAVED, True)
    (serve,) = next_steps.after_export(BASE, Path("x.gguf"), gguf=True)
    assert shlex.split(serve.line) == ["llama-server", "-m", "a base.gguf", "--lora", "x.gguf"]


def test_what_follows_a_run() -> None:
    *_, fold = next_steps.after_run(Path("runs/x"), SAVED, BASE, is_adapter=True)
    asked = merge_lora.parser().parse_args(shlex.split(fold.line)[2:])
    assert (asked.input, asked.lora, asked.output) == (BASE, [SAVED], Path("runs/x/merged"))
    (hear,) = next_steps.after_run(Path("runs/x"), SAVED, BASE, is_adapter=False)
    assert "--lora" not in hear.line
