"""Takes a tokenizer and what a config says of the template; gives the `Template`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.console import UserError
from pipeline.data.chat.builtin import BUILT_IN
from pipeline.data.chat.template import Template, specials_of
from pipeline.foreign import printable, read_bytes

LARGEST = 1_000_000  # bytes of a template; the longest published have some ten thousand


def template(
    tokenizer: Any, stops: Sequence[int], chat_template: str | None, kwargs: Mapping[str, Any], day: str
) -> Template:
    """The template that `chat_template` says: the tokenizer's own (None), one of BUILT_IN, a text of Jinja, or a file.

    `stops`: ids of the model's beside EOS. `day`: what the template's clock says, a date in ISO form. UserError if there is
    none, or it is no template.
    """
    given = {key: str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    return Template(source(tokenizer, chat_template), specials_of(tokenizer, stops), given, kwargs, day)


def source(tokenizer: Any, chat_template: str | None) -> str:
    """The text of the template."""
    if chat_template is None:
        return _own(tokenizer)
    if chat_template in BUILT_IN:
        return BUILT_IN[chat_template]
    if "{{" in chat_template or "{%" in chat_template:
        return chat_template
    path = Path(chat_template).expanduser()
    if not path.is_file():
        names = ", ".join(f"'{name}'" for name in BUILT_IN)
        raise UserError(
            f"chat_template = '{printable(chat_template)}': there is no such file, and it is neither {names} nor a text "
            f"with {{{{ }}}} or {{% %}} in it"
        )
    try:
        return read_bytes(path, "a chat template", LARGEST).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"chat_template = '{printable(chat_template)}': not UTF-8 at byte {error.start}") from None


def _own(tokenizer: Any) -> str:
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    if not isinstance(own, str):
        names = ", ".join(f"'{name}'" for name in BUILT_IN)
        raise UserError(
            f"the model's tokenizer has no chat template: give the one it is to learn as chat_template in [[datasets]], a file "
            f"or one of {names}"
        )
    return own
