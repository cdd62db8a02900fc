"""Patterns of names, with PEFT's meaning and a limit of time: `rank_pattern`, `alpha_pattern`, names of groups.

Takes a regular expression that somebody wrote and a name; gives whether PEFT would take the one for the other. Python's
own `re` has no limit, and `(a+)+b` would keep it busy for longer than the machine lasts; `regex` has its syntax, its
meaning (but for two spellings, which are refused), and a limit.
"""

import functools
import math
import re
import time

import regex

from pipeline.console import UserError
from pipeline.foreign import printable

LONGEST = 10_000  # characters; a list of all modules of a large model is shorter
REPEATED = re.compile(r"\{(\d*),?(\d*)\}|\)[*+?]")
LARGEST = 300_000  # characters, if every repetition were written out, as regex does
LIMIT_S = 1.0  # of one name
DIFFERENT = re.compile(
    r"\[:|\{(?![\d,])"
)  # [:alpha:] and {e<=1}: literal in re, a syntax in regex, in no name's pattern
TOGETHER_S = 5.0  # of all names that one pattern has met; an honest one takes microseconds for each


def matches(pattern: str, name: str, where: str) -> bool:
    """Whether `pattern` describes `name`, or its end after a dot: PEFT's `re.match(rf"(.*\\.)?({pattern})$", name)`.

    `where`: the key that starts a message. Raises UserError if `pattern` is not a valid regular expression or takes too long.
    """
    try:
        return _matcher(pattern).match(name)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def check(pattern: str) -> None:
    """Raise ValueError where `pattern` is not a valid regular expression."""
    _matcher(pattern)


@functools.lru_cache(maxsize=1000)
def _matcher(pattern: str) -> "_Matcher":
    return _Matcher(pattern)


class _Matcher:
    """A pattern, what it said of the names so far, and the time it has taken."""

    def __init__(self, pattern: str) -> None:
        self._shown = printable(pattern, 80)
        if len(pattern) > LONGEST:
            raise ValueError(f"'{self._shown}' has {len(pattern):,} characters, too many for a pattern of names")
        if found := DIFFERENT.search(pattern):
            raise ValueError(f"'{self._shown}': '{found.group()}' is not taken in a pattern of names")
        if len(pattern) * _repetitions(pattern) > LARGEST:
            raise ValueError(f"'{self._shown}' repeats too often for a pattern of names")
        try:
            re.compile(pattern)
            re.compile(rf"(.*\.)?({pattern})$")
            self._compiled = regex.compile(rf"(.*\.)?({pattern})$", regex.VERSION0)
        except (re.error, regex.error, RecursionError, OverflowError, MemoryError) as error:
            raise ValueError(f"'{self._shown}' is not a valid regular expression: {error}") from None
        self._known: dict[str, bool] = {}
        self._left_s = TOGETHER_S

    def match(self, name: str) -> bool:
        if name not in self._known:
            began = time.monotonic()
            try:
                found = self._compiled.match(name, timeout=max(1e-3, min(LIMIT_S, self._left_s)))
            except (TimeoutError, MemoryError):
                raise ValueError(
                    f"the pattern '{self._shown}' takes too long on '{printable(name, 80)}': it repeats what repeats. "
                    "Write the names out, or one repetition for two."
                ) from None
            self._left_s -= time.monotonic() - began
            self._known[name] = found is not None
        return self._known[name]


def _repetitions(pattern: str) -> int:
    """A bound of how often `regex` writes a part of the pattern down: {n} n times, a repeated group once more."""
    counts = [max(int(digits[:7] or 1) for digits in found.groups("1")) + 1 for found in REPEATED.finditer(pattern)]
    return math.prod(counts)
