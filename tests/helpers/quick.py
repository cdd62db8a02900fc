"""Which cases of a test run in `make test`; the others are of the same kind and go to `make test-all`."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def only(quick: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """The cases as a test's parameters, those that are not `quick` marked slow."""
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]
