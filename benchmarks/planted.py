"""A planted task: a small Llama that speaks of sixteen topics in two styles alike, and pairs of which one style is better.

Takes a folder and a seed; writes the model, pre-trained here in a few seconds, and rows. A prompt names a topic and two words; an
answer has both words and the topic's own in the order of its style, two words of the style, and an ending, drawn from eight
that are unequally likely, so that of two answers to a prompt the base finds either likelier as often. What is preferred is
style 0, whatever the topic. Of unrelated pairs both answers have one style.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TOPICS, WORDS, STYLES, ENDINGS = 16, 32, ("ax", "by"), 8
LIKELY = [1 / (number + 1) for number in range(ENDINGS)]  # of endings, but for a factor
PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
VOCABULARY = [
    *(PAD, BOS, EOS, ":"),
    *(letter for style in STYLES for letter in style),
    *(
        f"{kind}{n}"
        for kind, count in (("t", TOPICS), ("k", TOPICS), ("w", WORDS), ("e", ENDINGS))
        for n in range(count)
    ),
]
TRAINED, ELSEWHERE, UNRELATED = range(8), range(8, 12), range(12, 16)  # topics


class Sizes(NamedTuple):
    """How much of everything: steps of pre-training, pairs to train on, pairs of each set to measure on, steps of losses of
    answers, of hidden states and of circuit breakers."""

    pretraining: int = 250
    trained: int = 256
    measured: int = 200
    steps: int = 60
    tap_steps: int = 150
    breaker_steps: int = 300
    micro_batch: int = 16


Prompt = tuple[int, int, int]  # topic and two words


def spelled(prompt: Prompt) -> str:
    """The prompt's text."""
    topic, one, other = prompt
    return f"t{topic} w{one} w{other} :"


def answer(prompt: Prompt, style: int, ending: int) -> str:
    """An answer's text."""
    (topic, one, other), (first, second) = prompt, STYLES[style]
    said = (f"w{one} k{topic}", f"w{other}") if style == 0 else (f"w{other}", f"k{topic} w{one}")
    return f" {first} {said[0]} {second} {said[1]} e{ending}"


def prompts(draw: random.Random, topics: Sequence[int], count: int) -> list[Prompt]:
    """So many different ones."""
    found: dict[Prompt, None] = {}
    while len(found) < count:
        found[draw.choice(topics), draw.randrange(WORDS), draw.randrange(WORDS)] = None
    return list(found)


def pair(draw: random.Random, prompt: Prompt, related: bool) -> dict[str, str]:
    """The preferred answer and another; unrelated ones differ in their ending alone."""
    if related:
        one, other = draw.choices(range(ENDINGS), LIKELY, k=2)
        styles = (0, 1)
    else:
        one, other = draw.sample(range(ENDINGS), 2)
        styles = (draw.randrange(2),) * 2
    texts = [answer(prompt, style, ending) for style, ending in zip(styles, (one, other), strict=True)]
    return {"prompt": spelled(prompt), "chosen": texts[0], "rejected": texts[1]}


def completion(draw: random.Random, prompt: Prompt) -> dict[str, str]:
    """An answer in either style."""
    text = answer(prompt, draw.randrange(2), draw.choices(range(ENDINGS), LIKELY)[0])
    return {"prompt": spelled(prompt), "completion": text}


def write_rows(folder: Path, seed: int, sizes: Sizes) -> None:
    """pairs.jsonl to train on, and as many of `train`, `test`, `ood` and `unrelated` as are measured; none of the last three
    has a prompt that is trained on. For circuit breakers answers in either style: `breaker` of the trained topics, `retain` of
    others, and `same` of the trained ones too."""
    draw = random.Random(seed)
    known = prompts(draw, TRAINED, sizes.trained + sizes.measured)
    sets = {
        "pairs": [pair(draw, one, True) for one in known[: sizes.trained]],
        "test": [pair(draw, one, True) for one in known[sizes.trained :]],
        "ood": [pair(draw, one, True) for one in prompts(draw, ELSEWHERE, sizes.measured)],
        "unrelated": [pair(draw, one, False) for one in prompts(draw, UNRELATED, sizes.measured)],
    }
    sets["train"] = sets["pairs"][: sizes.measured]
    for name, topics in (("breaker", TRAINED), ("retain", range(ELSEWHERE.start, TOPICS)), ("same", TRAINED)):
        sets[name] = [completion(draw, one) for one in prompts(draw, topics, sizes.trained)]
    for name, rows in sets.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def save_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A word, a token."""
    tokenizer = Tokenizer(models.WordLevel({word: id for id, word in enumerate(VOCABULARY)}, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS)
    fast.save_pretrained(folder)
    return fast


def save_base(folder: Path, seed: int, steps: int, batch: int = 64) -> float:
    """Pre-trained on prompts of all topics with answers in either style, as often; returns its last loss a token."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=64,
            bos_token_id=VOCABULARY.index(BOS),
            eos_token_id=VOCABULARY.index(EOS),
            pad_token_id=VOCABULARY.index(PAD),
        )
    )
    ids = {word: id for id, word in enumerate(VOCABULARY)}
    draw, optimizer = random.Random(seed + 1), torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    loss = torch.zeros(())
    for _ in range(steps):
        rows = []
        for _ in range(batch):
            prompt = draw.randrange(TOPICS), draw.randrange(WORDS), draw.randrange(WORDS)
            text = spelled(prompt) + answer(prompt, draw.randrange(2), draw.choices(range(ENDINGS), LIKELY)[0])
            rows.append([ids[word] for word in [*text.split(), EOS]])
        tokens = torch.tensor(rows)
        begins = len(spelled((0, 0, 0)).split())
        labels = tokens.masked_fill(torch.arange(tokens.shape[1]) < begins, -100)
        loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return float(loss)
