"""The four properties of a mask, over random conversations with tools and reasoning and every template that TRL has of texts.

A mask is wrong if any of these fails for any row: (a) the targets of a turn decode to what the template writes for it after
its prompt; (b) its last target is a stop; (c) the ids before its first target are those of its prompt alone; (d) there are as
many targets as the replies have tokens, where no row is a border row. Oracle: transformers' own rendering, with which a
server makes its prompts. (test_masks.py has the other oracle: a rule of each format, by hand.)
"""

import datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.chat import derive
from pipeline.data.chat.encode import encode, encoder
from pipeline.data.chat.messages import Fields, conversation
from pipeline.data.chat.turns import Refused
from tests.data.chat.test_masks import FORMATS, WORDS
from tests.helpers import chat

# How TRL's templates end a turn; those that FORMATS has not, and the variants it trains with, which are other texts.
ENDS = {
    "<|END_OF_TURN_TOKEN|>": ("cohere_training", "cohere2_training"),
    "<turn|>": ("diffusion_gemma", "gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4"),
    "<end_of_turn>": ("gemma_training", "gemma3_training"),
    "<|user|>": ("glm4moe_training",),
    "<|return|>": ("gptoss_training",),
    "<|eot|>": ("muse_glimmer", "muse_glimmer_training"),
    "<|eot_id|>": ("llama3_training",),
    "<|end|>": ("phi3_training", "phi3_5_training", "nine_letters"),
    "<｜end▁of▁sentence｜>": ("deepseekv3", "deepseek_r1_distill"),
    "<|im_end|>": (
        *("lfm2_training", "lfm2_v2", "lfm2_v2_training", "lfm2_2_5_v2", "lfm2_2_5_vl", "nemotron_3_nano_training"),
        *(
            "nemotron_3_5_lightning",
            "nemotron_3_super",
            "nemotron_3_ultra",
            "qwen2_5_training",
            "qwen2_5_vl",
            "qwen3_6",
        ),
        *("qwen3_training", "qwen3_5_nothink_training", "qwen3_5_think_training", "qwen3_8", "qwen3_vl", "smollm2"),
        *("qwen3_instruct_2507_training",),
    ),
}
STOPS = {
    **{name: (form.stops[0] if name == "cohere2" else form.end, *form.stops) for name, form in FORMATS.items()},
    **{name: (end,) for end, names in ENDS.items() for name in names},
}
STOPS |= {name: (*STOPS[name], "<|call|>") for name in ("gptoss", "gptoss_training")}
STOPS |= {name: (*STOPS[name], "<|tool_response>") for name in STOPS if name.startswith(("gemma4", "diffusion"))}
# Of these no turn without thinking can be said: their prompts open one, and their history has none.
THINKING = ("deepseekv3", "deepseek_r1_distill")
QUICK = ("cohere2", "gemma4_v5", "glm4moe", "gptoss", "llama3_1", "nine_letters", "qwen3", "smollm2")
REASONS = (
    "the template raises",
    "the template leaves out tool calls",
    "the template leaves out tools' answers",
    "the template leaves out the system text",
    "the template does not write this turn after its own prompt for it",
    "the template writes nothing for a turn of the assistant",
    "no turn of it is trained",
    "empty answer",
    "there is no turn of the assistant",
    "'messages' is empty",
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "sum",
            "description": "Adds.",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer", "description": "one"}},
                "required": ["a"],
            },
        },
    }
]
text = st.lists(st.sampled_from([*WORDS, " ", "\t"]), max_size=4).map("".join)


@st.composite
def conversations(draw: st.DrawFn) -> dict[str, Any]:
    """A row of up to three exchanges, with calls of tools, their answers, and reasoning; seldom out of turn, seldom empty."""
    likely = lambda n: draw(st.integers(0, n - 1)) == 0  # noqa: E731
    messages = [{"role": "system", "content": draw(text)}] if likely(4) else []
    for number in range(draw(st.integers(0, 3))):
        messages += [{"role": "user", "content": draw(text)}] * (1 if not likely(12) else draw(st.integers(0, 2)))
        if likely(4):
            arguments = {"a": draw(st.integers(0, 99))}
            call = {"id": f"call{number:05}", "type": "function", "function": {"name": "sum", "arguments": arguments}}
            words = draw(text) if likely(4) else ""
            messages += [{"role": "assistant", "content": words, "tool_calls": [call]}]
            messages += [{"role": "tool", "name": "sum", "content": draw(text), "tool_call_id": call["id"]}]
        messages += [{"role": "assistant", "content": draw(text)}]
        if likely(3):
            messages[-1]["reasoning_content"] = draw(text)
    if likely(4):
        messages += [{"role": "user", "content": draw(text)}]
    calls = any("tool_calls" in message for message in messages)
    return {"messages": messages, **({"tools": TOOLS} if likely(2 if calls else 6) else {})}


def rendered(tokenizer: Any, name: str, template: Any, messages: Any, tools: Any, prompt: bool) -> str:
    """By transformers, as a server does."""
    return str(
        tokenizer.apply_chat_template(
            messages,
            tools=tools,
            chat_template=chat.source(name),
            add_generation_prompt=prompt,
            tokenize=False,
            **template.kwargs,
        )
    )


def check(name: str, template: Any, tokenizer: Any, row: dict[str, Any]) -> bool:
    """The properties of one conversation; whether it was taken."""
    rules = derive.Rules(10**6, allow_special_text=True)
    try:
        texts = derive.texts(conversation(row, Fields()), template, rules)
    except Refused as refused:
        assert refused.reason.startswith(REASONS), refused
        return False
    messages, tools, trained = texts.conversation
    ids = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    (rows,) = encode([texts.rows], encoder(tokenizer))
    seen, targets, replies = [], 0, 0
    for encoded in rows:
        for turn, (start, end) in zip(encoded.turns, encoded.spans, strict=True):
            prompt = rendered(tokenizer, name, template, messages[: turn.index], tools, True)
            full = rendered(tokenizer, name, template, messages[: turn.index + 1], tools, False)
            assert full.startswith(prompt)
            written = full[len(prompt) :]
            reply = tokenizer.decode(encoded.ids[start:end])
            left = written.removeprefix(reply)
            if left == written:  # a turn of a template without an end of turn: a stop was put behind it
                assert reply.startswith(written)
                assert reply.removeprefix(written) in template.specials.stops
            else:  # (a): what is left is the template's own
                assert template.specials.pattern.sub("", left).strip() in ("", "assistant", "model")
            last = tokenizer.convert_ids_to_tokens(encoded.ids[end - 1])
            assert last in template.specials.stops or "tool_calls" in messages[turn.index]  # (b)
            assert template.specials.pattern.fullmatch(last)
            assert encoded.ids[:start] == ids(prompt)  # (c)
            seen.append(turn.index)
            targets, replies = targets + end - start, replies + len(ids(reply))
    assert sorted(seen) == trained
    if not any(encoded.border for encoded in rows):
        assert targets == replies  # (d)
    return True


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in STOPS])
def test_a_mask_has_the_four_properties(name: str) -> None:
    form = FORMATS.get(name)
    nemotron = {"enable_thinking": False} if name.startswith("nemotron") else {}
    kwargs, today = form.kwargs if form and form.kwargs else nemotron, datetime.date.today().isoformat()
    template, tokenizer = chat.template(name, STOPS[name], kwargs=kwargs, day=today)
    taken = 0

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(conversations())
    def every(row: dict[str, Any]) -> None:
        nonlocal taken
        taken += check(name, template, tokenizer, row)

    every()
    assert name in THINKING or taken >= 2, taken
