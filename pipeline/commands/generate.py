"""generate.py behind its command line: loads the model, in one process or a stage in each of several, and answers.

Takes the parsed arguments; gives answers on the console. Raises UserError before a weight is read where the arguments, the
prompts, the model or the adapter are wrong.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from transformers import PreTrainedModel, TextStreamer

from pipeline.artifacts.fold.warnings import other_base
from pipeline.artifacts.fold_history import earlier_folds
from pipeline.console import RankError, UserError, duration, log, log_if_slow, plain, rank, warn
from pipeline.data import tokenizer as tokenizers
from pipeline.formats.base_model import read_base, warn_of_remarks
from pipeline.formats.device import usable_device
from pipeline.formats.dtypes import DTYPES
from pipeline.formats.fingerprint import fingerprint
from pipeline.formats.hub import model_folder
from pipeline.generation import adapter as adapters
from pipeline.generation import cache_check, positions, shown
from pipeline.generation.decoding import Answer, Asked, InOneProcess, OverProcesses, Stages, answers, speaking
from pipeline.generation.prompts import Asker, asker, keys_of_noise, read_prompts
from pipeline.generation.sampling import Sampling
from pipeline.model import cut_check, unsupported, weights
from pipeline.model.adapters.switch import adapters_off
from pipeline.model.stage import Stage, check_head, empty_model, read_model_config
from pipeline.model.structure.parts import head_of_model, layers_of_model
from pipeline.planning.cut import balanced

WAITS_AT_MOST = timedelta(days=7)  # for whoever sits at the terminal


class Speaker(NamedTuple):
    """A loaded model, ready to be asked. `whole`: without weights, for its structure."""

    stage: Stage
    stages: Stages
    asker: Asker
    whole: PreTrainedModel
    sampling: Sampling
    max_new_tokens: int


def generate(asked: argparse.Namespace) -> None:
    """Load, and answer the prompts or whoever sits at the terminal."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    sampling = _check(asked)
    prompts = [*asked.prompt, *(read_prompts(asked.prompts, "--prompts") if asked.prompts else [])]
    asked.model = Path(model_folder(asked.model, "--model"))
    device = _meet(asked.device)
    speaker = load(asked, sampling, device)
    if prompts:
        _answer_all(speaker, prompts, asked.compare)
    else:
        _converse(speaker, asked.chat)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


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


def _meet(device: str | None) -> torch.device:
    """This process's device. Where a launcher started several processes, they find each other."""
    on_gpu = torch.cuda.is_available()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return usable_device(device or ("cuda" if on_gpu else "cpu"))
    found = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(found)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=WAITS_AT_MOST)
    return found


def load(asked: argparse.Namespace, sampling: Sampling, device: torch.device) -> Speaker:
    """Check all there is, then read the weights and the adapter."""
    folder = str(asked.model)
    config = read_model_config(folder)
    kind = config.model_type
    base = read_base(asked.model, "--model")
    dtype = DTYPES[asked.dtype] if asked.dtype else config.dtype or torch.float32
    with unsupported.named(kind, "looking at its structure"):
        whole = empty_model(config, dtype, None)
        weights.check_complete(whole, base)
    warn_of_remarks(base)
    ranges = _ranges(whole, dist.get_world_size() if dist.is_initialized() else 1)
    with log_if_slow("trying out a tiny copy of the model"):
        cut_check.check(config, ranges)
        cache_check.check(config, ranges, "generate.py")
    tokenizer = tokenizers.load(folder)
    asks = asker(tokenizer, folder, chat=asked.chat, system=asked.system, chat_template=asked.chat_template)
    saved = adapters.read(asked.lora, base, asked.kind) if asked.lora else None
    if saved:
        now = fingerprint(base) if saved.adapter.base_fingerprint else ""
        if doubt := other_base(base, saved.adapter, earlier_folds(base.folder), now):
            warn(doubt)
        if asked.compare and saved.adapter.full:
            raise UserError(
                f"--compare: {asked.lora} takes the place of weights of the base ({next(iter(saved.adapter.full))}), so there "
                "is no base left to show; run once without --lora"
            )
    with _said_here(), log_if_slow("reading the weights"), unsupported.named(kind, "putting its stage together"):
        stage = Stage(empty_model(read_model_config(folder), dtype, None), *ranges[rank()])
        weights.load(stage, folder, dtype, device)
        stage.to(device)
        if stage.is_last:
            check_head(stage)
        if saved:
            adapters.put(stage, saved)
    stages: Stages = InOneProcess([stage], device)
    if dist.is_initialized():
        stages = OverProcesses(stage, range(dist.get_world_size()), device, dtype)
    return Speaker(stage, stages, asks, whole, sampling, asked.max_new_tokens)


@contextmanager
def _said_here() -> Iterator[None]:
    """What one process alone finds wrong it says itself, and ends: the launcher then ends the others."""
    try:
        yield
    except UserError as error:
        if dist.is_initialized():
            raise RankError(str(error), error.exit_code) from error
        raise


def _ranges(whole: PreTrainedModel, n_stages: int) -> list[tuple[int, int]]:
    """Each stage's layers, balanced by the weights that are read for a token."""
    sizes = [float(sum(p.numel() for p in layer.parameters())) for layer in layers_of_model(whole)]
    head: Any = head_of_model(whole)
    return balanced(sizes, float(head.weight.numel()), n_stages)


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
    turn = 0
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
        said = _spoken(speaker, ids, turn)
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


def _spoken(speaker: Speaker, ids: list[int], turn: int) -> Answer:
    """One answer, shown while it is said."""
    streamer = _Shown(speaker.asker.tokenizer, skip_special_tokens=True)

    def show(_: int, token: int) -> None:
        if rank() == 0:
            streamer.put(torch.tensor([token]))

    with speaking([speaker.stage]):
        asked = [Asked(ids, speaker.sampling.noise(turn, ""))]
        (said,) = answers(speaker.stages, asked, speaker.sampling, speaker.asker.stops, speaker.max_new_tokens, show)
    if rank() == 0:
        streamer.end()
    log(f"[{shown.ending(shown.entry(said, speaker.asker.text))}]")
    return said


class _Shown(TextStreamer):
    """transformers' own, which shows whole words as soon as they are known; without what would steer the terminal."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(plain(text), stream_end)
