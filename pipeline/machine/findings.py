"""A finding of the doctor's: what was looked at, how it is, and the mend.

Takes findings; gives lines, and what to end with. Needs nothing.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

State = Literal["ok", "slow", "broken", "none"]  # "none": not there, and not needed


class Finding(NamedTuple):
    """`found`: in words, with figures. `mend`: what to do, where something is to be done."""

    what: str
    state: State
    found: str
    mend: str = ""


def lines(findings: Sequence[Finding]) -> str:
    """A line for each, and below it the mend."""
    width = max(len(finding.what) for finding in findings)
    shown = []
    for what, state, found, mend in findings:
        shown.append(f"{state if state != 'none' else '–':7} {what:{width}}  {found}")
        if mend:
            shown.append(f"{'':7} {'':{width}}  → {mend}")
    return "\n".join(shown)


def verdict(findings: Sequence[Finding]) -> str:
    """All of it in a sentence."""
    named = {state: [finding.what for finding in findings if finding.state == state] for state in ("broken", "slow")}
    if named["broken"]:
        slow = f", and slow: {', '.join(named['slow'])}" if named["slow"] else ""
        return f"Broken: {', '.join(named['broken'])}{slow}. Mend what is broken before a run."
    if named["slow"]:
        return f"A run works here. Slow: {', '.join(named['slow'])}."
    return "A run works here, and nothing is slower than it should be."
