"""What is asked, as token ids: a text to go on from, or a conversation in the model's chat template, up to where it answers.

Takes a tokenizer and texts; gives ids, the ids at which an answer ends, and answers as text. A plain prompt gets the special
tokens that the tokenizer itself puts before a text; a conversation those that its template writes, and no others.
"""

import datetime
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.console import UserError
from pipeline.data.chat.template import Message, NotRendered, Template, specials_of
from pipeline.data.tokenizer import encoder
from pipeline.foreign import printable, read_object


@dataclass(frozen=True)
class Asker:
    """Makes prompts of texts for one model. `template`: of conversations, None for plain text; `system`: their first message's
    text, "" for none. `stops`: the ids that end an answer."""

    tokenizer: Any
    stops: frozenset[int]
    template: Template | None = None
    system: str = ""

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
        opening = [{"role": "system", "content": self.system}] if self.system else []
        try:
            text = self.template.render([*opening, *messages], prompt=True)
        except NotRendered as error:
            raise UserError(f"the chat template cannot render the prompt: {error}") from None
        return encoder(self.tokenizer)([text])[0]

    def text(self, tokens: Sequence[int]) -> str:
        """What an answer says, without special tokens."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def asker(tokenizer: Any, folder: str, *, chat: bool, system: str, where: str) -> Asker:
    """For the model in `folder`. `where`: what asked for a chat, for the message. UserError where there is no template."""
    stops = stop_ids(tokenizer, folder)
    if not chat:
        return Asker(tokenizer, stops)
    try:
        source = tokenizer.get_chat_template()
    except ValueError as error:
        raise UserError(
            f"{where}: the tokenizer in {printable(folder)} has no chat template ({printable(error, 80)}); "
            "ask in plain text, or add chat_template.jinja to that folder"
        ) from None
    variables = dict(tokenizer.special_tokens_map)
    day = datetime.date.today().isoformat()  # for templates that print it
    return Asker(tokenizer, stops, Template(source, specials_of(tokenizer, sorted(stops)), variables, day=day), system)


def stop_ids(tokenizer: Any, folder: str) -> frozenset[int]:
    """The ids at which the model in `folder` stops: those of its generation_config.json, else of config.json, and the
    tokenizer's EOS."""
    generation = Path(folder) / "generation_config.json"
    source = generation if generation.is_file() else Path(folder) / "config.json"
    written = read_object(source, "where the model says what ends a text").get("eos_token_id")
    found = [*(written if isinstance(written, list) else [written]), tokenizer.eos_token_id]
    return frozenset(id for id in found if isinstance(id, int))


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
