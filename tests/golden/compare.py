"""What two digests of one run (`runs.record`) differ in, within fp32 rounding.

A bound is three times or more what other vector lengths and orders of summation change, which was tried with
ATEN_CPU_CAPABILITY=default and MKL_CBWR=COMPATIBLE. Errors grow over the steps: Adam turns small gradients, which rounding
changes most, into steps of full size; eps = 1e-3 keeps that small.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

RELATIVE = {"after": 0.0, "loss": 1e-5, "norm": 1e-4, "lr": 1e-12}
CHANGE = 1e-3  # of the norm of a weight's change
ROUNDING = 2**-23  # of the weight's own norm: the fold rounds the sum once


class Error(NamedTuple):
    """A value that is not the golden one; `share`: by how much, in bounds."""

    what: str
    kind: str
    share: float


def differences(golden: dict[str, Any], found: dict[str, Any], rounding: float = 1.0) -> list[str]:
    """One line for each value outside its bound, none where it is the same run. `rounding` multiplies the bounds."""
    if lines := _structure(golden, found):
        return lines
    return [f"{e.what}, {e.share / rounding:.3g} bounds off" for e in errors(golden, found) if e.share > rounding]


def largest(golden: dict[str, Any], found: dict[str, Any]) -> dict[str, float]:
    """The largest error of each kind, in bounds."""
    shares: dict[str, float] = {}
    for error in errors(golden, found):
        shares[error.kind] = max(shares.get(error.kind, 0.0), error.share)
    return shares


def errors(golden: dict[str, Any], found: dict[str, Any]) -> Iterator[Error]:
    """Every value that is not equal to the bit."""
    for series in ("steps", "evaluations"):
        for number, (old, new) in enumerate(zip(golden[series], found[series], strict=True), start=1):
            for key, value in old.items():
                if new[key] != value:
                    bound = RELATIVE[key.rpartition("/")[2]] * abs(value)
                    yield _error(f"{series} {number}: {key}", key, value, new[key], bound)
    before, after = golden["weights"]["changed"], found["weights"]["changed"]
    for name, old in before.items():
        bound = CHANGE * old["change"] + ROUNDING * old["norm"]
        for key, value in old.items():
            if after[name][key] != value:
                yield _error(f"{name}: {key}", "weights", value, after[name][key], bound)


def _error(what: str, kind: str, old: float, new: float, bound: float) -> Error:
    distance = abs(new - old)
    share = distance / bound if bound and math.isfinite(distance) else math.inf
    return Error(f"{what} was {old}, is {new}", kind, share)


def _structure(golden: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """What cannot be compared: other steps, other evaluations, other tensors."""
    lines = []
    for series in ("steps", "evaluations"):
        old, new = ([sorted(entry) for entry in digest[series]] for digest in (golden, found))
        if old != new:
            lines.append(f"{series}: {len(old)} of {old[:1]} are {len(new)} of {new[:1]}")
    old_names, new_names = (digest["weights"]["changed"].keys() for digest in (golden, found))
    if old_names != new_names or golden["weights"]["unchanged"] != found["weights"]["unchanged"]:
        lines.append(f"weights: other tensors change: {sorted(old_names ^ new_names)}")
    return lines
