"""Counts what is met in a dataset's rows: bad ones by reason with the first places, and what is worth saying of the others."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.console import UserError
from pipeline.data.chat.derive import NOTES
from pipeline.data.rows.store import Report
from pipeline.foreign import printable

PLACES, REASONS = 3, 12  # named in a report


@dataclass
class _Bad:
    """One reason: how often, where first, how to mend it."""

    advice: str
    count: int = 0
    places: list[str] = field(default_factory=list)


@dataclass
class Tally:
    """Of one dataset."""

    read: int = 0
    bad: int = 0
    kept: int = 0  # the number of the next one that is neither bad nor left out
    duplicates: int = 0
    without_targets: int = 0
    reasons: dict[str, _Bad] = field(default_factory=dict)
    notes: dict[str, tuple[int, str]] = field(default_factory=dict)  # a key of `words` → how often, where first
    words: Mapping[str, str] = field(default_factory=lambda: NOTES)  # what is counted, as the report calls it

    @property
    def counts(self) -> dict[str, int]:
        """For the report: rows of the files, bad ones, those that are the same as an earlier one."""
        return {"read": self.read, "bad": self.bad, "duplicates": self.duplicates}

    def refuse(self, where: str, reason: str, advice: str = "") -> None:
        """A bad row."""
        self.bad += 1
        found = self.reasons.setdefault(reason, _Bad(advice))
        found.count += 1
        if len(found.places) < PLACES:
            found.places.append(where)

    def note(self, where: str, met: dict[str, int]) -> None:
        """What was met in a row that is not bad."""
        for key, count in met.items():
            before, first = self.notes.get(key, (0, where))
            self.notes[key] = (before + count, first)

    def lines(self, deduplicated: bool) -> list[str]:
        """For the report, each what was met with its number."""
        lines = [
            f"{self.notes[key][0]:,} {words} (first {self.notes[key][1]})"
            for key, words in self.words.items()
            if key in self.notes
        ]
        if self.duplicates:
            what = "left out" if deduplicated else "kept; deduplicate = true leaves them out"
            lines.append(f"{self.duplicates:,} rows are the same as an earlier one: {what}")
        if self.without_targets:
            lines.append(f"{self.without_targets:,} rows without a token to train are left out")
        return lines + self.bad_lines()

    def bad_lines(self) -> list[str]:
        """The bad rows, a line a reason, the most frequent first."""
        ordered = sorted(self.reasons.items(), key=lambda item: -item[1].count)
        lines = [
            f"bad, left out: {bad.count:,} × {printable(reason)} ({', '.join(map(printable, bad.places))}"
            f"{', …' if bad.count > len(bad.places) else ''}){f': {printable(bad.advice)}' if bad.advice else ''}"
            for reason, bad in ordered[:REASONS]
        ]
        rest = sum(bad.count for _, bad in ordered[REASONS:])
        return lines + ([f"bad, left out: {rest:,} for {len(ordered) - REASONS:,} other reasons"] if rest else [])


def check(name: str, read: int, bad: int, lines: list[str], most: float) -> None:
    """UserError where more than the part `most` of a dataset's rows is bad. `lines`: what is wrong with them."""
    if bad > most * read:
        raise UserError(
            f"dataset '{name}': {bad:,} of {read:,} rows are bad ({bad / read:.1%}), more than max_bad_rows = {most:g} "
            "allows:\n  " + "\n  ".join(lines)
        )


def check_report(report: Report, most: float) -> None:
    """UserError where more than the part `most` of a dataset's rows is bad, or none is left."""
    check(report.name, report.read, report.bad, report.bad_lines, most)
    if not report.rows:
        raise UserError(
            f"dataset '{report.name}': none of its {report.read:,} rows is left to train on:\n  "
            + "\n  ".join(report.notes)
        )
