"""Takes rows that are one scored answer each, several of a prompt; gives a row a prompt: a pair, or ranked answers.

The score is a weighted sum of fields. A pair is the best answer and one drawn from those that score less; of equal scores
one counts, and a prompt whose answers all score the same is none. What is drawn is a function of the prompt, not of the
order of the files. (HelpSteer: helpfulness, correctness, coherence and complexity, less verbosity.)
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.data.chat.turns import Refused
from pipeline.data.reading.json_rows import Broken
from pipeline.data.reading.records import Record
from pipeline.data.units.formats import Kind, Names


@dataclass
class Grouped:
    """What was met: scored answers, their prompts, and prompts without answers that differ."""

    answers: int = 0
    prompts: int = 0
    level: int = 0

    def __str__(self) -> str:
        few = f"{self.level:,} of these have too few different scores"
        return f"{self.answers:,} scored answers to {self.prompts:,} prompts; {few}"


@dataclass
class _Prompt:
    where: str
    value: Any
    answers: list[tuple[float, Any]] = field(default_factory=list)


def by_prompt(
    records: Iterable[Record], kind: Kind, names: Names, weights: Mapping[str, float], ranks: int, met: Grouped
) -> Iterator[Record]:
    """A record a prompt, in the order in which prompts first come; those that cannot be read stay as they are, first."""
    prompts: dict[str, _Prompt] = {}
    for record in records:
        try:
            score = _score(record.value, weights)
            key = json.dumps(record.value[names.prompt], sort_keys=True)
            answer = record.value[names.completion]
        except Refused as refused:
            yield Record(record.where, Broken(refused.reason, refused.reason))
            continue
        except (KeyError, TypeError) as error:
            yield (
                record
                if isinstance(record.value, Broken)
                else Record(record.where, Broken(no_field := f"there is no field {error}", no_field))
            )
            continue
        met.answers += 1
        prompts.setdefault(key, _Prompt(record.where, record.value)).answers.append((score, answer))
    met.prompts = len(prompts)
    for key, prompt in prompts.items():
        chosen = _best_first(prompt.answers)
        if len(chosen) < (2 if kind == "preference" else ranks):
            met.level += 1
            continue
        row = {name: value for name, value in prompt.value.items() if name not in (names.completion, *weights)}
        if kind == "ranked":
            yield Record(prompt.where, row | {names.answers: [answer for _, answer in chosen]})
            continue
        assert names.rejected is not None, "of scored answers both are given"
        best, lower = chosen[0], [pair for pair in _in_order(prompt.answers) if pair[0] < chosen[0][0]]
        seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
        other = lower[int(np.random.PCG64(seed).random_raw() % len(lower))]
        yield Record(prompt.where, row | {names.chosen: best[1], names.rejected: other[1]})


def _score(value: Any, weights: Mapping[str, float]) -> float:
    if isinstance(value, Broken):
        raise Refused(value.reason)
    if not isinstance(value, dict):
        raise Refused("the row is no object")
    total = 0.0
    for name, weight in weights.items():
        try:
            total += weight * float(value[name])
        except KeyError:
            raise Refused(f"there is no field '{name}' to score by") from None
        except (TypeError, ValueError):
            raise Refused(f"'{name}', a score, is no number") from None
    return total


def _best_first(answers: list[tuple[float, Any]]) -> list[tuple[float, Any]]:
    """The answers by falling score; of equal scores one."""
    order = _in_order(answers)
    return [pair for place, pair in enumerate(order) if not place or pair[0] < order[place - 1][0]]


def _in_order(answers: list[tuple[float, Any]]) -> list[tuple[float, Any]]:
    """By falling score, then by their text, whatever order they stand in."""
    return sorted(answers, key=lambda pair: (-pair[0], json.dumps(pair[1], sort_keys=True)))
