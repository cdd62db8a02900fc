"""--plan of preference training: whether a pair of 8192-token rows of Command-R 35B fits two 48 GiB GPUs."""

import re

import pytest

from docs import plans


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_pair_of_long_rows_fits_two_gpus_with_a_cached_reference() -> None:
    """As one row of language modelling does; what is counted is two rows in every micro-batch."""
    case = next(case for case in plans.CASES if "objective" in case.keys)
    text = plans.section(case)
    assert text in plans.PLANS.read_text(encoding="utf-8"), "run python -m docs.plans"
    rows = re.findall(r"(?m)^ +\d +[\d–]+ +A6000 .*$", text)
    totals, free = zip(*([float(part) for part in row.split()[-3:-1]] for row in rows), strict=True)
    assert len(rows) == 2
    assert all(43 < total < 46.5 for total in totals), totals
    assert all(left >= 0 for left in free)
    assert "a step " in text
    assert "for 262 144 tokens" in text
    assert "does not fit" not in text
