"""What is asked, as token ids: a text to go on from, or a conversation in the model's chat template, up to where it answers.

Takes a tokenizer and texts; gives ids, the ids at which an answer ends, and answers as text. A plain prompt gets the special
tokens that the tokenizer itself puts before a text; a conversation those that its template writes, and no others.
"""

import datetime
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pipeline.console import UserError
from pipeline.data.chat import load
from pipeline.data.chat.template import Message, NotRendered, Template
from pipeline.data.tokenizer import encoder
from pipeline.foreign import printable
from pipeline.formats import base_model

NONE: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Asker:
    """Makes prompts of texts for one model. `stops`: the ids that end an answer.

    `template`: of conversations, None for plain text. `system`: the text of their first message, or with `merge_system` of the
    first lines of the user's; "" for none.
    """

    tokenizer: Any
    stops: frozenset[int]
    template: Template | None = None
    system: str = ""
    merge_system: bool = False

    def ids(self, text: str) -> list[int]:
        """Of one prompt. UserError where there is nothing to go on from, or the template refuses it."""
        if self.template is None:
            ids = list(self.tokenizer.encode(text))
            while ids and ids[-1] == self.tokenizer.eos_token_id:  # some tokenizers end every text
                ids.pop()
            if not ids:
                raise UserError(
                    "an empty prompt: this model's tokenizer has no token that begins a text; give some words"
                )
            return ids
        return self.conversation([{"role": "user", "content": text}])

    def conversation(self, messages: Sequence[Message]) -> list[int]:
        """Of a conversation that ends with the user's turn; the system's message comes before it."""
        if self.template is None:
            raise ValueError("there is no chat template")
        given = [dict(message) for message in messages]
        if self.system and self.merge_system:
            given[0]["content"] = f"{self.system}\n\n{given[0]['content']}"
        elif self.system:
            given = [{"role": "system", "content": self.system}, *given]
        try:
            text = self.template.render(given, prompt=True)
        except NotRendered as error:
            raise UserError(f"the chat template cannot render the prompt: {error}") from None
        return encoder(self.tokenizer)([text])[0]

    def text(self, tokens: Sequence[int]) -> str:
        """What an answer says, without special tokens."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def asker(
    tokenizer: Any,
    folder: str,
    *,
    chat: bool,
    system: str,
    chat_template: str | None = None,
    template_kwargs: Mapping[str, Any] = NONE,
    merge_system: bool = False,
) -> Asker:
    """For the model in `folder`. `chat_template`: as in [[datasets]] (chat/load.py). UserError where `chat` has no template."""
    stops = stop_ids(tokenizer, folder)
    if not chat:
        return Asker(tokenizer, stops)
    day = datetime.date.today().isoformat()  # for templates that print it
    made = load.template(tokenizer, sorted(stops), chat_template, template_kwargs, day)
    return Asker(tokenizer, stops, made, system, merge_system)


def stop_ids(tokenizer: Any, folder: str) -> frozenset[int]:
    """The ids at which the model in `folder` stops, the tokenizer's EOS among them."""
    return frozenset(base_model.stop_ids(Path(folder))) | ({tokenizer.eos_token_id} - {None})


def read_prompts(file: Path, where: str) -> list[str]:
    """A prompt a line, without blank lines. `where`: what named the file. UserError where there is none in it."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"it is not UTF-8 ({error})"
        raise UserError(f"{where}: {printable(file)} cannot be read: {reason}") from None
    if not (prompts := [line.strip() for line in lines if line.strip()]):
        raise UserError(f"{where}: {printable(file)} holds no prompt; write one a line")
    return prompts


def keys_of_noise(prompts: Iterable[str]) -> list[str]:
    """By which each prompt's noise is drawn: its text, so that the order of prompts does not matter; one that is there twice
    gets other noise, and another answer, the second time."""
    seen: dict[str, int] = {}
    keys = []
    for prompt in prompts:
        seen[prompt] = seen.get(prompt, -1) + 1
        keys.append(f"{prompt} {seen[prompt]}")
    return keys
