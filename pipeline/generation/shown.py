"""Answers as people and files read them: the prompt, what was said, and whether the model stopped by itself.

Takes prompts and answers; gives plain values for a line of JSON, and lines for the console. Needs neither torch nor
transformers.
"""

from collections.abc import Callable, Sequence
from typing import Any

Answer = tuple[list[int], int | None]  # decoding.Answer's: the tokens, and the stop that ended them, if one did
# prompt, text, tokens, stopped; and for the base's answer, where it was asked too, the last three once more under "base".
Sample = dict[str, Any]


def samples(
    prompts: Sequence[str], said: Sequence[Answer], base: Sequence[Answer] | None, text: Callable[[list[int]], str]
) -> list[Sample]:
    """For each of `prompts` what the model said, and what its `base` said. `text`: of an answer's tokens."""
    found = []
    for number, (prompt, answer) in enumerate(zip(prompts, said, strict=True)):
        sample: Sample = {"prompt": prompt, **entry(answer, text)}
        found.append({**sample, "base": entry(base[number], text)} if base is not None else sample)
    return found


def described(found: Sequence[Sample], head: str, took: str) -> str:
    """Lines for the console: `head`, how many stopped, how long all `took`, and each prompt with what was said."""
    bases = [sample["base"] for sample in found if "base" in sample]
    of_base = f" (the base: {sum(base['stopped'] for base in bases)})" if bases else ""
    lines = [f"{head}: {sum(s['stopped'] for s in found)} of {len(found)} stopped{of_base}, {took}"]
    for sample in found:
        lines.append(_indented("> ", sample["prompt"]))
        lines.append(_indented("  ", f"{sample['text']} [{ending(sample)}]"))
        if "base" in sample:
            lines.append(_indented("  base: ", f"{sample['base']['text']} [{ending(sample['base'])}]"))
    return "\n".join(lines)


def ending(said: Sample) -> str:
    """'stopped after 57 tokens', or 'reached the limit'."""
    return f"stopped after {said['tokens']} tokens" if said["stopped"] else "reached the limit"


def entry(answer: Answer, text: Callable[[list[int]], str]) -> Sample:
    """An answer by itself."""
    tokens, stop = answer
    return {"text": text(tokens), "tokens": len(tokens), "stopped": stop is not None}


def _indented(mark: str, text: str) -> str:
    return "  " + mark + text.replace("\n", "\n  " + " " * len(mark))
