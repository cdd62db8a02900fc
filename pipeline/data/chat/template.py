"""Takes a chat template and a tokenizer; gives what the template writes for messages, and how it ends a turn.

Templates run in the sandbox of transformers, as a server runs them. Their clock is frozen to one day: some print today's
date, and a row must not depend on the day on which it is read.
"""

import datetime
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from transformers.utils import chat_template_utils as library

from pipeline.console import UserError

Message = dict[str, Any]  # role, content and what else the template may read
_QUESTIONS, _ANSWERS = ("Zanzibarquestion", "Yokohamaquestion"), ("Xylophoneanswer", "Quetzalcoatlanswer")
PROBE: list[Message] = [
    message
    for question, answer in zip(_QUESTIONS, _ANSWERS, strict=True)
    for message in ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
]


class NotRendered(Exception):
    """The template raised; the text says what, in its own words."""


@dataclass(frozen=True)
class Specials:
    """A tokenizer's special tokens: all of them as text, and those at which a server stops."""

    all: frozenset[str]
    stops: frozenset[str]
    eos: str

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """One of them, the longest where several begin alike."""
        return _one_of(self.all)

    @cached_property
    def run(self) -> re.Pattern[str]:
        """Several after each other, with blanks before the first."""
        return re.compile(rf"\s*(?:{self.pattern.pattern})+")

    @cached_property
    def stop(self) -> re.Pattern[str]:
        """A stop, with blanks before it."""
        return re.compile(rf"\s*(?:{_one_of(self.stops).pattern})")


@dataclass(frozen=True)
class Template:
    """A chat template with the variables a server gives it. `day`: what its clock says, a date in ISO form."""

    source: str
    specials: Specials
    variables: Mapping[str, Any] = field(default_factory=dict)  # bos_token and the like
    kwargs: Mapping[str, Any] = field(default_factory=dict)  # chat_template_kwargs
    day: str = "2026-01-01"

    def render(self, messages: Sequence[Message], tools: Any = None, *, prompt: bool = False) -> str:
        """What a server would see; with `prompt`, up to where the next answer begins. NotRendered if it raises."""
        given = [_for_template(message) for message in messages]
        return str(self._run(lambda: self._compiled.render(**self._context(given, tools, prompt))))

    def generation_blocks(self, messages: Sequence[Message], tools: Any = None) -> list[tuple[int, int]] | None:
        """Characters (start, end) that the template itself marks as generated; None if it marks none."""
        if not re.search(r"\{%-?\s*generation\s*-?%\}", self.source):
            return None
        given = [_for_template(message) for message in messages]
        context = self._context(given, tools, False)
        return self._run(lambda: library._render_with_assistant_indices(self._compiled, **context))[1]

    @cached_property
    def probe(self) -> str:
        """Two short turns, rendered. UserError if the template cannot say even these."""
        try:
            return self.render(PROBE)
        except NotRendered as error:
            raise UserError(f"chat_template: it cannot render a plain conversation of two turns: {error}") from None

    @cached_property
    def tail(self) -> str:
        """All that the template writes after the last answer."""
        if any(self.probe.count(word) != 1 for word in (*_QUESTIONS, *_ANSWERS)):
            raise UserError("chat_template: it does not write each question and each answer of a conversation once")
        return self.probe.split(_ANSWERS[-1])[1]

    @cached_property
    def end_of_turn(self) -> str:
        """What a server samples after the answer's last word, to the stop; '' if the template writes no end of turn."""
        run = self.specials.run.match(self.tail)
        if run is None:
            return self.tail[: _first(self.specials, self.tail)]
        for token in self.specials.pattern.finditer(run[0]):
            if token[0] in self.specials.stops:
                return run[0][: token.end()]
        return run[0]

    @cached_property
    def control(self) -> frozenset[str]:
        """Special tokens that the template itself writes around turns: headers and ends, not marks of thinking."""
        written = set(self.specials.pattern.findall(self.probe))
        return frozenset(token for token in written if "think" not in token.lower())

    @cached_property
    def prints_the_date(self) -> bool:
        """Whether another day gives another text."""
        return Template(self.source, self.specials, self.variables, self.kwargs, "1987-11-23").probe != self.probe

    @cached_property
    def _compiled(self) -> Any:
        try:
            return library._compile_jinja_template(self.source)
        except TemplateError as error:
            raise UserError(f"chat_template: it is no template of Jinja: {error}") from None

    def _context(self, messages: list[Message], tools: Any, prompt: bool) -> dict[str, Any]:
        now = datetime.datetime.fromisoformat(self.day)
        return {
            **self.variables,
            **self.kwargs,
            "messages": messages,
            "tools": tools or None,
            "documents": None,
            "add_generation_prompt": prompt,
            "strftime_now": now.strftime,
        }

    @staticmethod
    def _run(work: Callable[[], Any]) -> Any:
        try:
            return work()
        except (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError, RecursionError) as error:
            raise NotRendered(str(error) or type(error).__name__) from None


def specials_of(tokenizer: Any, stop_ids: Sequence[int]) -> Specials:
    """The special tokens of a tokenizer; it stops at its EOS and at `stop_ids` (the model's generation_config)."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    stops = {tokenizer.eos_token_id, *stop_ids} - {None}
    return Specials(
        all=frozenset(added | set(tokenizer.all_special_tokens)) - {""},
        stops=frozenset(str(tokenizer.convert_ids_to_tokens(id)) for id in stops if id < len(tokenizer)),
        eos=tokenizer.eos_token,
    )


def _for_template(message: Message) -> Message:
    """A message as transformers hands it over: reasoning under the names that templates read it by."""
    if "reasoning_content" in message:
        return {**message, "thinking": message["reasoning_content"]}
    return message


def _first(specials: Specials, text: str) -> int:
    """Where the first stop in `text` ends; 0 if there is none."""
    found = (token for token in specials.pattern.finditer(text) if token[0] in specials.stops)
    return next((token.end() for token in found), 0)


def _one_of(texts: frozenset[str]) -> re.Pattern[str]:
    """Matches any of these; nothing if there are none."""
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or r"(?!)")
