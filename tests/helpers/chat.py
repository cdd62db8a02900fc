"""Chat templates for tests: TRL's, and small ones with the quirks of others; a byte-level tokenizer that knows their marks."""

import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pipeline.data.chat.builtin import BUILT_IN
from pipeline.data.chat.template import Template, specials_of
from tests.helpers.data import prose

BOS, EOS = "<|bos|>", "<|eos|>"
_SPEC = importlib.util.find_spec("trl")
TRL = Path(_SPEC.origin or "").parent / "chat_templates" if _SPEC else Path("trl")

TEMPLATES = {
    "none_at_the_end": (
        "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
    "inst": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% else %}"
        "{{ raise_exception('Only user and assistant roles are supported') }}{% endif %}{% endfor %}"
    ),
    "system_in_the_last": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
        "{% set messages = messages[1:] %}{% endif %}"
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {% if loop.last and system %}{{ system }}\n\n{% endif %}"
        "{{ m.content }}[/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    ),
    "dated": (
        "{{ bos_token }}<|system|>Today is {{ strftime_now('%d %b %Y') }}<|end|>{% for m in messages %}<|{{ m.role }}|>"
        "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
    "opens_the_next": (
        "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"
    ),
    "thinks_in_the_prompt": (
        "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
    ),
    "smollm2": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "nine_letters": (
        "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for call in m.tool_calls or [] %}"
        "{% if call.id is not defined or call.id | length != 9 %}"
        "{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{% endif %}"
        "{{ call.function.name }}({{ call.function.arguments | tojson }})#{{ call.id }}{% endfor %}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
    "thinks_in_the_prompt_without_an_end": (
        "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
    ),
    "two_bos": (
        "{{ bos_token }}{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
}
TEMPLATES |= {f"built_in_{name}": text for name, text in BUILT_IN.items()}
_MARK = re.compile(r"<[|｜][^<>|｜{}']{1,40}[|｜]>|<(?:start|end)_of_turn>|\[gMASK\]|<sop>|<\|\w+>|<\w+\|>")


def source(name: str) -> str:
    """The template of TRL, or one of the small ones above."""
    return TEMPLATES[name] if name in TEMPLATES else (TRL / f"{name}.jinja").read_text(encoding="utf-8")


@cache
def tokenizer(name: str, stops: str = "") -> Any:
    """A byte-level BPE whose special tokens are the marks of the template `name`; EOS is the first mark in `stops`."""
    own = tuple(f"<|{role}|>" for role in ("system", "user", "assistant", "tool", "end")) if name in TEMPLATES else ()
    return with_marks(tuple(dict.fromkeys([*own, *_MARK.findall(source(name))])), stops or EOS)


@cache
def with_marks(marks: tuple[str, ...], eos: str = EOS) -> Any:
    """A byte-level BPE, trained on prose, with these special tokens, a BOS and an EOS."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = list(dict.fromkeys([BOS, EOS, eos, *marks]))
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=[], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(prose(4000, seed=3).splitlines(keepends=True), trainer)
    backend.add_special_tokens([AddedToken(mark, normalized=False) for mark in special])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=eos)


def template(name: str, stops: str | tuple[str, ...] = "", **changes: Any) -> tuple[Template, Any]:
    """The template and its tokenizer, which stops at `stops`."""
    ends = (stops,) if isinstance(stops, str) else stops
    tok = tokenizer(name, ends[0])
    specials = specials_of(tok, [tok.convert_tokens_to_ids(end) for end in ends if end])
    variables = {"bos_token": tok.bos_token, "eos_token": tok.eos_token}
    return Template(source(name), specials, variables, **changes), tok
