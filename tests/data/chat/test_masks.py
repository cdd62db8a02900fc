"""Which tokens of a conversation are trained, over random conversations and the templates of many families.

Oracle: a rule for each format, by hand: an answer is what stands between the format's header of an assistant's turn and its
end of turn. And what a server would do: the ids before a turn are those of its prompt.
"""

import re
from typing import Any, NamedTuple

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pipeline.data.chat import derive, turns
from pipeline.data.chat.encode import encode, encoder
from pipeline.data.chat.messages import Fields, conversation
from pipeline.data.chat.turns import Conversation, Refused
from tests.helpers import chat


class Format(NamedTuple):
    """A family's header of an assistant's turn and its end of turn, stops beside the end, what its template needs."""

    header: str
    end: str
    stops: tuple[str, ...] = ()
    split: bool = False  # a row for each turn where there are several
    system: bool = True
    alternates: bool = False
    kwargs: Any = None


CHATML = Format("<|im_start|>assistant\n", "<|im_end|>")
LLAMA = Format("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>")
GEMMA = Format("<start_of_turn>model\n", "<end_of_turn>", alternates=True)
FORMATS = {
    "qwen2_5": CHATML,
    "qwen3": CHATML._replace(split=True),
    "qwen3_instruct_2507": CHATML,
    "qwen3_5_think": Format("<|im_start|>assistant\n<think>\n", "<|im_end|>", split=True),
    "qwen3_5_nothink": Format("<|im_start|>assistant\n<think>\n\n</think>\n\n", "<|im_end|>", split=True),
    "lfm2": CHATML,
    "lfm2_2_5": CHATML,
    "nemotron_3_nano": Format(
        "<|im_start|>assistant\n<think></think>", "<|im_end|>", kwargs={"enable_thinking": False}
    ),
    "llama3": LLAMA,
    "llama3_1": LLAMA,
    "llama3_2": LLAMA,
    "gemma": GEMMA._replace(system=False),
    "gemma3": GEMMA,
    "gemma4_v5": Format("<|turn>model\n", "<turn|>"),
    "cohere": Format("<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>", "<|END_OF_TURN_TOKEN|>", alternates=True),
    "cohere2": Format(
        "<|CHATBOT_TOKEN|><|START_RESPONSE|>",
        "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
        ("<|END_OF_TURN_TOKEN|>",),
        alternates=True,
    ),
    "phi3": Format("<|assistant|>\n", "<|end|>"),
    "phi3_5": Format("<|assistant|>\n", "<|end|>"),
    "glm4moe": Format("<|assistant|>", chat.EOS, ("<|user|>",)),
    "gptoss": Format("<|start|>assistant", "<|return|>", split=True),
    "none_at_the_end": Format("<|assistant|>", chat.EOS, ("<|user|>",)),
    "inst": Format("[/INST]", chat.EOS, system=False),
    "dated": Format("<|assistant|>", "<|end|>"),
    "opens_the_next": Format("<|assistant|>", "<|end|>"),
    "built_in_chatml": CHATML,
    "built_in_llama3": LLAMA,
    "built_in_gemma": GEMMA._replace(system=False),
    "built_in_alpaca": Format("### Response:\n", chat.EOS),
}
WORDS = ["yes", "no\n", "  ", "\n", "Thé", "🙂", "a", ".", "[[", "\n\n", "the end", "1+1=2"]
text = st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map("".join).filter(lambda t: t.strip() != "")


@st.composite
def messages(draw: st.DrawFn, form: Format) -> list[dict[str, str]]:
    """Up to four exchanges of a conversation in which the roles alternate, where the format asks for it."""
    found = [{"role": "system", "content": draw(text)}] if form.system and draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        found += [{"role": "user", "content": draw(text)}]
        if not form.alternates and draw(st.integers(0, 5)) == 0:
            found += [{"role": "user", "content": draw(text)}]
        found += [{"role": "assistant", "content": draw(text)}]
    return found + ([{"role": "user", "content": draw(text)}] if draw(st.booleans()) else [])


def by_hand(text: str, form: Format) -> list[str]:
    """The answers that stand in a row's text, each with its end of turn."""
    header, ends = re.escape(form.header), "|".join(re.escape(end) for end in (form.end, *form.stops))
    return re.findall(rf"{header}((?:(?!{header}).)*?(?:{ends}))", text, re.S)


def made(name: str) -> tuple[Any, Any]:
    form = FORMATS[name]
    stop = form.stops[0] if name == "cohere2" else form.end
    return chat.template(name, (stop, *form.stops), kwargs=form.kwargs or {})


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_targets_are_what_a_server_samples(name: str, data: st.DataObject) -> None:
    form, (template, tokenizer) = FORMATS[name], made(name)
    given_messages = data.draw(messages(form))
    talk = conversation({"messages": given_messages}, Fields())
    try:
        found = derive.texts(talk, template, derive.Rules(10**6))
    except Refused as refused:
        assert name == "gptoss" or "raises" in refused.reason, refused
        assume(False)
    enc = encoder(tokenizer)
    (rows,) = encode([found.rows], enc)
    ids = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    seen: list[int] = []
    for row in rows:
        by_rule = by_hand(tokenizer.decode(row.ids), form)
        for turn, (start, end) in zip(row.turns, row.spans, strict=True):
            seen.append(turn.index)
            assert tokenizer.decode(row.ids[start:end]) == turn.reply  # (a)
            assert tokenizer.convert_ids_to_tokens(row.ids[end - 1]) in template.specials.stops  # (b)
            assert row.ids[:start] == ids(turn.prompt)  # (c)
            assert template.render(talk.messages[: turn.index], prompt=True) == turn.prompt
        answers = [tokenizer.decode(row.ids[start:end]) for start, end in row.spans]
        assert answers == by_rule[-1:] if form.split or row.border else answers == by_rule
        assert row.spans[-1][1] == len(row.ids)
    assert sorted(seen) == talk.trained
    if not any(row.border for row in rows):  # (d)
        targets = sum(end - start for row in rows for start, end in row.spans)
        assert targets == sum(len(ids(turn.reply)) for row in found.rows for turn in row.turns)
    if form.split:
        assert len(rows) == len(talk.trained)


def refused(name: str, talk: list[dict[str, Any]], **changes: Any) -> Refused:
    template, _ = chat.template(name, **changes)
    with pytest.raises(Refused) as found:
        derive.texts(conversation({"messages": talk}, Fields()), template, derive.Rules(10**6))
    return found.value


USER, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "sum", "arguments": {"a": 1}}}]}


@pytest.mark.parametrize(
    ("name", "talk", "advice"),
    [
        ("system_in_the_last", [SYSTEM, USER, ANSWER], "merge_system = true"),
        ("thinks_in_the_prompt", [USER, ANSWER], "another chat_template"),
        ("nemotron_3_nano", [USER, ANSWER], "enable_thinking = false"),
        ("deepseekv3", [USER, ANSWER], "another chat_template"),
        ("gemma", [SYSTEM, USER, ANSWER], "merge_system = true"),
    ],
)
def test_a_turn_that_the_template_cannot_say_is_refused_with_the_remedy(name: str, talk: Any, advice: str) -> None:
    assert advice in refused(name, talk).detail


def test_a_turn_that_goes_on_where_the_one_before_stopped_is_refused_with_the_remedy() -> None:
    """Gemma 4 writes no header between two turns of the model, so a prompt for the second opens one that the history lacks."""
    template, _ = chat.template("gemma4_v5", "<turn|>")
    with pytest.raises(Refused) as found:
        turns.rows(Conversation([USER, {**ANSWER, "reasoning_content": "Hm."}, ANSWER], None, [1, 2]), template)
    assert "train_on = 'last'" in found.value.detail


def test_a_turn_of_which_the_template_writes_nothing_is_refused() -> None:
    """Gemma 4 takes the blanks off an answer, and where the call before it had words, too, it ends no turn that is left empty."""
    template, _ = chat.template("gemma4_v5", ("<turn|>", "<|tool_response>"))
    blank = {"role": "assistant", "content": "\n\n"}
    call, result = {**CALL, "content": "Let me add."}, {"role": "tool", "content": "1"}
    talk = conversation({"messages": [USER, call, result, blank, USER]}, Fields())
    with pytest.raises(Refused, match="the template writes nothing for a turn of the assistant"):
        derive.texts(talk, template, derive.Rules(10**6))


@pytest.mark.parametrize("name", ["llama3", "phi3", "dated"])
def test_tool_calls_that_a_template_leaves_out_are_refused(name: str) -> None:
    assert "tool calls" in refused(name, [USER, CALL, {"role": "tool", "content": "1"}, ANSWER]).reason


def test_tool_calls_of_a_template_that_knows_them_are_trained() -> None:
    template, _ = chat.template("qwen3", "<|im_end|>")
    talk = conversation({"messages": [USER, CALL, {"role": "tool", "content": "1"}, ANSWER]}, Fields())
    found = derive.texts(talk, template, derive.Rules(10**6))
    replies = [turn.reply for row in found.rows for turn in row.turns]
    assert '"name": "sum"' in replies[0]
    assert replies[0].endswith("<|im_end|>")
    assert replies[-1].endswith("Because.<|im_end|>")


def test_a_date_is_the_day_that_is_given() -> None:
    template, _ = chat.template("dated", "<|end|>", day="2024-02-29")
    assert "29 Feb 2024" in template.probe
    assert template.prints_the_date
    assert not chat.template("phi3", "<|end|>")[0].prints_the_date


def test_two_bos_are_refused() -> None:
    template, tokenizer = chat.template("two_bos", "<|end|>")
    rules = derive.Rules(10**6)
    text = derive.texts(conversation({"messages": [USER, ANSWER]}, Fields()), template, rules)
    (found,) = derive.encoded([text], template, encoder(tokenizer), rules)
    assert isinstance(found, Refused)
    assert "two BOS" in found.reason


def test_marks_spelled_out_in_the_text_are_refused_and_let_pass() -> None:
    template, _ = chat.template("qwen2_5", "<|im_end|>")
    talk = conversation(
        {"messages": [{"role": "user", "content": "a<|im_end|>\n<|im_start|>assistant\nb"}, ANSWER]}, Fields()
    )
    with pytest.raises(Refused, match="marks turns"):
        derive.texts(talk, template, derive.Rules(10**6))
    assert derive.texts(talk, template, derive.Rules(10**6, allow_special_text=True)).notes["special_text"] == 2


def test_lost_reasoning_and_trimmed_blanks_are_counted() -> None:
    talk = [USER, {**ANSWER, "content": " Because. ", "reasoning": "Hm."}]
    template, _ = chat.template("llama3", "<|eot_id|>")
    notes = derive.texts(conversation({"messages": talk}, Fields()), template, derive.Rules(10**6)).notes
    assert notes == {"lost_reasoning": 1, "trimmed": 1}
    assert not derive.texts(
        conversation({"messages": talk}, Fields()), chat.template("qwen3", "<|im_end|>")[0], derive.Rules(10**6)
    ).notes


@pytest.mark.parametrize(("name", "note"), [("qwen2_5_training", "marks_differ"), ("gemma_training", "marks_blanks")])
def test_marks_of_the_template_itself_are_compared(name: str, note: str) -> None:
    stop = {"qwen2_5_training": "<|im_end|>", "gemma_training": "<end_of_turn>"}[name]
    template, _ = chat.template(name, stop)
    found = derive.texts(conversation({"messages": [USER, ANSWER]}, Fields()), template, derive.Rules(10**6))
    assert set(found.notes) <= {"marks_differ", "marks_blanks"}
    assert found.notes[note] == 1


def with_pieces_that_decode_otherwise() -> Any:
    """A tokenizer as SentencePiece's: it puts a space before every text, so that pieces do not decode to the whole."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"], show_progress=False)
    backend.train_from_iterator(["a b c d 1 2 3 [ ] I N S T / the cat sat on the mat " * 9] * 3, trainer)
    backend.add_special_tokens([AddedToken(mark, normalized=False) for mark in (chat.BOS, chat.EOS)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=chat.BOS, eos_token=chat.EOS, unk_token="<unk>")


def test_a_tokenizer_whose_pieces_decode_otherwise_leaves_a_straddling_token_untrained() -> None:
    """'sat' is one token here, of which the prompt has the 's' and the answer the rest."""
    tokenizer = with_pieces_that_decode_otherwise()
    enc = encoder(tokenizer)
    assert not enc.in_pieces
    prompt, reply = "the cat s", "at on the mat"
    whole = tokenizer(prompt + reply, add_special_tokens=False)["input_ids"]
    alone = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert whole[: len(alone)] != alone
    turn = turns.Turn(1, prompt, reply + chat.EOS, len(chat.EOS))
    ((row,),) = encode([[turns.RowText((turn,))]], enc)
    ((start, end),) = row.spans
    assert row.border
    assert row.ids == tokenizer(prompt + reply + chat.EOS, add_special_tokens=False)["input_ids"]  # nothing was cut
    tokens = tokenizer.convert_ids_to_tokens(row.ids)
    assert "".join(tokens[start:end]) == "▁on▁the▁mat" + chat.EOS
    assert "".join(tokens[:start]) == "▁the▁cat▁sat"
    # Where prompt and answer meet between tokens, nothing is left out.
    clean = turns.Turn(1, "the cat", " sat" + chat.EOS, len(chat.EOS))
    ((row,),) = encode([[turns.RowText((clean,))]], enc)
    assert not row.border
    assert "".join(tokenizer.convert_ids_to_tokens(row.ids[slice(*row.spans[0])])) == "▁sat" + chat.EOS


def fitted(limit: int, policy: str) -> tuple[list[derive.Row], Any]:
    template, tokenizer = chat.template("phi3", "<|end|>")
    talk = conversation({"messages": [SYSTEM, *[USER, ANSWER] * 5]}, Fields())
    rules = derive.Rules(limit, too_long=policy)
    (found,) = derive.encoded([derive.texts(talk, template, rules)], template, encoder(tokenizer), rules)
    assert isinstance(found, derive.Result)
    return found.rows, (found.notes, tokenizer)


def test_rows_that_are_too_long_are_dropped_or_begin_later() -> None:
    whole, _ = fitted(10**6, "drop")
    assert len(whole) == 1
    limit = len(whole[0].ids) // 2
    rows, (notes, _) = fitted(limit, "drop")
    assert not rows
    assert notes["too_long"] == 1
    rows, (notes, tokenizer) = fitted(limit, "truncate_left")
    answers = [tokenizer.decode(row.ids[start:end]) for row in rows for start, end in row.spans]
    assert answers == ["Because.<|end|>"] * 5
    assert all(len(row.ids) <= limit and "Be brief." in tokenizer.decode(row.ids) for row in rows)


@pytest.mark.parametrize(("value", "count"), [("turn", 2), ("last", 1), ("none", 0)])
def test_which_ends_of_turns_are_trained(value: str, count: int) -> None:
    template, tokenizer = chat.template("phi3", "<|end|>")
    rules = derive.Rules(10**6, train_on_eos=value)
    text = derive.texts(conversation({"messages": [USER, ANSWER, USER, ANSWER]}, Fields()), template, rules)
    (found,) = derive.encoded([text], template, encoder(tokenizer), rules)
    assert isinstance(found, derive.Result)
    decoded = "".join(tokenizer.decode(found.rows[0].ids[start:end]) for start, end in found.rows[0].spans)
    assert decoded.count("<|end|>") == count
    assert decoded.count("Because.") == 2


@pytest.mark.parametrize(("ours", "theirs"), [("chatml", "qwen2_5"), ("llama3", "llama3"), ("gemma", "gemma")])
@pytest.mark.parametrize("prompt", [True, False])
def test_templates_by_name_are_the_published_ones(ours: str, theirs: str, prompt: bool) -> None:
    """TRL's copies, with a system text where the template has a place for one (qwen2_5 puts its own where there is none)."""
    talk = [*([] if ours == "gemma" else [SYSTEM]), USER, ANSWER, {"role": "user", "content": " And then? "}]
    rendered = [chat.template(name)[0].render(talk, prompt=prompt) for name in (f"built_in_{ours}", theirs)]
    assert rendered[0] == rendered[1]
