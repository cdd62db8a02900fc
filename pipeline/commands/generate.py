"""generate.py behind its command line: loads the model, in one process or a stage in each of several, and answers.

Takes the parsed arguments; gives answers on the console. Raises UserError before a weight is read where the arguments, the
prompts, the model or the adapter are wrong.
"""

import argparse
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from transformers import PreTrainedModel, TextStreamer

from pipeline.commands import loading
from pipeline.console import UserError, duration, log, log_if_slow, plain, rank
from pipeline.data import tokenizer as tokenizers
from pipeline.formats.dtypes import DTYPES
from pipeline.formats.hub import model_folder
from pipeline.generation import adapter as adapters
from pipeline.generation import cache_check, positions, shown
from pipeline.generation.decoding import Answer, Asked, InOneProcess, Memory, OverProcesses, Stages, answers, speaking
from pipeline.generation.prompts import Asker, asker, keys_of_noise, read_prompts
from pipeline.generation.sampling import Sampling
from pipeline.model import unsupported
from pipeline.model.adapters.switch import adapters_off
from pipeline.model.quantized import Scheme
from pipeline.model.stage import Stage, read_model_config


class Speaker(NamedTuple):
    """A loaded model, ready to be asked. `whole`: without weights, for its structure. `goes_on`: whether a conversation may go on
    from the caches of its turn before."""

    stage: Stage
    stages: Stages
    asker: Asker
    whole: PreTrainedModel
    sampling: Sampling
    max_new_tokens: int
    goes_on: bool


def generate(asked: argparse.Namespace) -> None:
    """Load, and answer the prompts or whoever sits at the terminal."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    sampling = _check(asked)
    prompts = [*asked.prompt, *(read_prompts(asked.prompts, "--prompts") if asked.prompts else [])]
    device = loading.meet(asked.device)
    speaker = load(asked, sampling, device)
    if prompts:
        _answer_all(speaker, prompts, asked.compare)
    else:
        _converse(speaker, asked.chat)
    loading.part()


def _check(asked: argparse.Namespace) -> Sampling:
    """What can be known to be wrong from the command line alone, all at once."""
    problems = []
    for option, value, right, rule in (
        ("max-new-tokens", asked.max_new_tokens, asked.max_new_tokens >= 1, "1 or more"),
        ("temperature", asked.temperature, 0 <= asked.temperature < float("inf"), "0 or more"),
        ("top-k", asked.top_k, asked.top_k >= 0, "0 or more"),
        ("top-p", asked.top_p, 0 < asked.top_p <= 1, "more than 0, at most 1"),
        ("min-p", asked.min_p, 0 <= asked.min_p <= 1, "0 to 1"),
    ):
        if not right:
            problems.append(f"--{option} {value:g}: give {rule}")
    if asked.system and not asked.chat:
        problems.append("--system is a message of a conversation: add --chat")
    if asked.chat_template and not asked.chat:
        problems.append("--chat-template is for conversations: add --chat")
    if asked.compare and not asked.lora:
        problems.append("--compare shows an adapter's model beside its base: give --lora")
    if not (asked.prompt or asked.prompts):
        if not sys.stdin.isatty():
            problems.append("there is no terminal to ask at: give --prompt or --prompts")
        elif asked.compare:
            problems.append("--compare is for --prompt and --prompts, not for a conversation")
    if problems:
        raise UserError("\n       ".join(problems))
    return Sampling(asked.temperature, asked.top_k, asked.top_p, asked.min_p, asked.temperature_last, asked.seed)


def load(asked: argparse.Namespace, sampling: Sampling, device: torch.device) -> Speaker:
    """Check all there is, then read the weights and the adapter."""
    folder = Path(model_folder(asked.model, "--model"))
    dtype = DTYPES[asked.dtype] if asked.dtype else read_model_config(str(folder)).dtype or torch.float32
    scheme = Scheme.named(asked.base_quant, dtype) if asked.base_quant else None
    found = loading.look(folder, "--model", loading.processes(), dtype=dtype, scheme=scheme)
    with log_if_slow("trying out a tiny copy of the model"):
        goes_on = cache_check.check(found.config, found.ranges, "generate.py")
    tokenizer = tokenizers.load(found.folder)
    asks = asker(tokenizer, found.folder, chat=asked.chat, system=asked.system, chat_template=asked.chat_template)
    saved = adapters.read(asked.lora, found.base, asked.kind) if asked.lora else None
    if saved:
        loading.warn_of_another_base(found.base, saved)
        if asked.compare and saved.adapter.full:
            raise UserError(
                f"--compare: {asked.lora} takes the place of weights of the base ({next(iter(saved.adapter.full))}), so there "
                "is no base left to show; run once without --lora"
            )
    with loading.said_here():
        stage = loading.read_stage(found, rank(), device)
        if saved:
            with unsupported.named(found.config.model_type, "putting its adapter into a stage"):
                adapters.put(stage, saved)
    stages: Stages = InOneProcess([stage], device)
    if dist.is_initialized():
        stages = OverProcesses(stage, range(dist.get_world_size()), device, found.dtype)
    return Speaker(stage, stages, asks, found.whole, sampling, asked.max_new_tokens, goes_on)


def _answer_all(speaker: Speaker, prompts: list[str], compare: bool) -> None:
    """The answers to all prompts, and with `compare` the base's."""
    ids = [_ids(speaker, prompt, number) for number, prompt in enumerate(prompts)]
    began = time.monotonic()
    keys = keys_of_noise(prompts)

    def answered() -> list[Answer]:
        asked = [Asked(i, speaker.sampling.noise(0, key)) for i, key in zip(ids, keys, strict=True)]
        return answers(speaker.stages, asked, speaker.sampling, speaker.asker.stops, speaker.max_new_tokens)

    with speaking([speaker.stage]):
        said, base = answered(), None
        with adapters_off(speaker.stage) if compare else nullcontext():
            base = answered() if compare else None
    samples = shown.samples(prompts, said, base, speaker.asker.text)
    log(shown.described(samples, "answers", duration(time.monotonic() - began)))


def _ids(speaker: Speaker, prompt: str, number: int) -> list[int]:
    try:
        ids = speaker.asker.ids(prompt)
    except UserError as error:
        raise UserError(f"prompt {number + 1}: {error}") from None
    what = f"--max-new-tokens {speaker.max_new_tokens:,} after a prompt of {len(ids):,} tokens"
    positions.check(what, len(ids) + speaker.max_new_tokens, speaker.whole, lower="--max-new-tokens")
    return ids


def _converse(speaker: Speaker, chat: bool) -> None:
    """Ask at the terminal until the input ends; with `chat` the model sees what was said before."""
    log(
        "ask; a line that is /new begins again, an empty one or Ctrl-D ends"
        if chat
        else "a text to go on from; Ctrl-D ends"
    )
    messages: list[dict[str, Any]] = []
    memory, turn = Memory() if speaker.goes_on else None, 0
    while (line := _line()) is not None:
        if chat and line.strip() == "/new":
            messages = []
            continue
        if chat:
            messages.append({"role": "user", "content": line})
        turn += 1
        try:
            ids = speaker.asker.conversation(messages) if chat else _ids(speaker, line, 0)
        except UserError as error:
            log(str(error))
            messages = messages[:-1]
            continue
        said = _spoken(speaker, ids, turn, memory)
        messages.append({"role": "assistant", "content": speaker.asker.text(said.tokens)})


def _line() -> str | None:
    """The next line typed at the first process, on every process; None at the end."""
    typed: list[str | None] = [None]
    if rank() == 0:
        try:
            typed = [input("> ") or None]
        except EOFError:
            log()
    if dist.is_initialized():
        dist.broadcast_object_list(typed, 0, device=torch.device("cpu"))
    return typed[0]


def _spoken(speaker: Speaker, ids: list[int], turn: int, memory: Memory | None) -> Answer:
    """One answer, shown while it is said. `memory`: of what was said before; without one, that is read anew."""
    streamer = _Shown(speaker.asker.tokenizer, skip_special_tokens=True)

    def show(_: int, token: int) -> None:
        if rank() == 0:
            streamer.put(torch.tensor([token]))

    with speaking([speaker.stage]):
        asked = [Asked(ids, speaker.sampling.noise(turn, ""), memory)]
        (said,) = answers(speaker.stages, asked, speaker.sampling, speaker.asker.stops, speaker.max_new_tokens, show)
    if rank() == 0:
        streamer.end()
    log(f"[{shown.ending(shown.entry(said, speaker.asker.text))}]")
    return said


class _Shown(TextStreamer):
    """transformers' own, which shows whole words as soon as they are known; without what would steer the terminal."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(plain(text), stream_end)
