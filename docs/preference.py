"""Writes the tables of docs/preference.md: what preference training did where the answer is known, and to a real model.

    python -m docs.preference            writes them, from benchmarks/results/preference.json and preference_smollm.json
    python -m docs.preference --check    exit code 1 if they are not what would be written

Each table stands between two comments, which name it; everything else of the page is written by hand.
"""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from docs.families import table

PAGE = Path(__file__).resolve().parent / "preference.md"
RESULTS = PAGE.parent.parent / "benchmarks/results"
BROKEN, KEPT = ("train", "test"), ("ood", "unrelated")  # topics that circuit breakers are to break and to leave
BREAKERS = "circuit breakers"

Rows = list[dict[str, Any]]
Column = Callable[[Rows], str]  # a cell of a run's rows, of all seeds


def spread(values: Sequence[float], digits: int = 2, sign: str = "") -> str:
    """'mean [lowest, highest]'."""
    mean, low, high = (f"{v:{sign}.{digits}f}" for v in (_mean(values), min(values), max(values)))
    return f"{mean} [{low}, {high}]"


def learnt(result: dict[str, Any]) -> str:
    """A row per run on pairs, of all seeds."""
    return _runs(result, LEARNT, lambda run: not run.startswith(BREAKERS))


def broken(result: dict[str, Any]) -> str:
    """A row per run of circuit breakers, and the base's, of all seeds."""
    return _runs(result, TURNED, lambda run: run.startswith(("base", BREAKERS)))


def _runs(result: dict[str, Any], columns: Mapping[str, Column], chosen: Callable[[str], bool]) -> str:
    """A row for each run whose name is `chosen`."""
    found = {rows[0]["run"]: rows for rows in _by("run", result["rows"])}
    lines = [(run, *(cell(rows) for cell in columns.values())) for run, rows in found.items() if chosen(run)]
    return table(("run", *columns), lines)


def _accuracy(dataset: str) -> Column:
    return lambda rows: spread([row["pref_acc_mean"] for row in _of(rows, dataset)])


def _trained(measure: str) -> Column:
    return lambda rows: spread([row[measure] for row in _of(rows, "train")])


def _moved(rows: Rows) -> str:
    return _hull([row["pref_prob_mean_delta"] for row in _of(rows, "train") if "pref_prob_mean_delta" in row])


def _mean_lp(datasets: Sequence[str]) -> Column:
    """Of both answers, as circuit breakers know no better one."""
    return lambda rows: spread(
        [_mean([(row["lp_w"] + row["lp_l"]) / 2 for row in seed]) for seed in _seeds(rows, datasets)]
    )


def _perplexity(datasets: Sequence[str]) -> Column:
    def cell(rows: Rows) -> str:
        ratios = [
            [row["perplexity_ratio"] for row in seed if "perplexity_ratio" in row] for seed in _seeds(rows, datasets)
        ]
        return f"× {spread([_mean(seed) for seed in ratios])}" if all(ratios) else "–"

    return cell


def _cosine(tap: str) -> Column:
    """Over the tap's layers."""

    def cell(rows: Rows) -> str:
        cosines = [
            [cosine for name, cosine in row.get("cosines", {}).items() if name.startswith(f"{tap}/")]
            for row in _of(rows, "train")
        ]
        return spread([_mean(seed) for seed in cosines]) if all(cosines) else "–"

    return cell


def _lit(rows: Rows) -> str:
    trained = _of(rows, "train")
    counted = Counter(light for row in trained for light in row["lights"])
    return ", ".join(f"{what} ({count} of {len(trained)})" for what, count in counted.items()) or "–"


LEARNT: dict[str, Column] = {
    "trained pairs": _accuracy("train"),
    "new prompts": _accuracy("test"),
    "other topics": _accuracy("ood"),
    "nothing to prefer": _accuracy("unrelated"),
    "p(chosen), trained, to the base": _moved,
    "lp̄ chosen, trained": _trained("lp_w"),
    "lp̄ rejected": _trained("lp_l"),
    "lights, trained": _lit,
}
TURNED: dict[str, Column] = {
    "lp̄, trained topics": _mean_lp(BROKEN),
    "perplexity, trained topics": _perplexity(BROKEN),
    "lp̄, other topics": _mean_lp(KEPT),
    "perplexity, other topics": _perplexity(KEPT),
    "cos, broken rows": _cosine("break"),
    "cos, retained rows": _cosine("retain"),
}


def setting(result: dict[str, Any]) -> str:
    """How much of everything, and on what."""
    s, versions = result["settings"], result["machine"]["versions"]
    return (
        f"{s['seeds']} seeds, {s['seconds'] / 60:.0f} minutes with one thread, PyTorch {versions['torch']}: "
        f"{s['trained']} pairs, {s['steps']} steps of {s['micro_batch']} "
        f"(with taps {s['tap_steps']}, circuit breakers {s['breaker_steps']}), "
        f"learning rate {s['lr']:g}, β = {s['beta']:g}; {s['measured']} pairs a set. A cell is the mean over the seeds and, "
        f"in brackets, the lowest and the highest of them{_covers(s['seeds'])}.\n"
    )


def _covers(seeds: int) -> str:
    """How sure the two ends are: the median of all seeds is outside them where all are on one side of it."""
    return f", between which the median of all seeds lies with a confidence of {1 - 2 * 0.5**seeds:.0%}"


def smollm(result: dict[str, Any]) -> str:
    """A row per dataset and measure, and what the lights say."""
    s, rows = result["settings"], result["rows"]
    names = list(dict.fromkeys((row["dataset"], row["role"], row["measure"]) for row in rows))
    found = {(row["adapter"], row["dataset"], row["measure"]): row for row in rows}
    lines = []
    for dataset, role, measure in names:
        base, mine = found.get(("base", dataset, measure)), found["adapter", dataset, measure]
        lines.append(
            (
                f"{dataset} ({role}, {mine['rows']:.0f})",
                f"`{measure}`",
                _interval(base, "value", "low", "high") if base else "–",
                _interval(mine, "value", "low", "high"),
                _interval(mine, "delta", "delta_low", "delta_high", "+") if "delta" in mine else "–",
                f"{mine['p']:.2g}" if "p" in mine else "–",
                f"{mine['detectable']:.3f}" if "detectable" in mine else "–",
            )
        )
    header = ("set (role, rows)", "measure", "base", "adapter", "difference", "p", "seen from")
    lit = "; ".join(f"*{light['what']}* on {light['dataset']} ({light['why']})" for light in s["lights"]) or "none"
    return (
        table(header, lines)
        + f"\nStop-lights: {lit}. {s['steps']} steps of {s['pairs_a_step']} pairs, rank {s['rank']}, learning rate {s['lr']:g}, "
        f"β = {s['beta']:g}, {s['stages']} stages: {s['train_seconds'] / 60:.1f} minutes of training and "
        f"{s['evaluate_seconds'] / 60:.1f} of evaluation on {result['machine']['cores']} cores, without a GPU.\n"
    )


def answers(result: dict[str, Any]) -> str:
    """What was said to each prompt before and after."""
    said: dict[str, list[str]] = {}
    for one in result["settings"]["said"]:
        said.setdefault(one["prompt"], []).append(" ".join(one["text"].split()))
    return table(("asked", "before", "after"), [(prompt, *texts) for prompt, texts in said.items()])


PARTS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "setting": ("preference", setting),
    "learnt": ("preference", learnt),
    "broken": ("preference", broken),
    "smollm": ("preference_smollm", smollm),
    "answers": ("preference_smollm", answers),
}


def page(text: str) -> str:
    """docs/preference.md with its tables as the records have them."""
    for name, (record, make) in PARTS.items():
        result = json.loads((RESULTS / f"{record}.json").read_text(encoding="utf-8"))
        place = re.compile(rf"(<!-- {name}: [^\n]*-->\n)(.*?)(<!-- /{name} -->)", re.DOTALL)
        assert len(place.findall(text)) == 1, f"one place for {name}"
        text = place.sub(lambda found: found[1] + make(result) + found[3], text)  # noqa: B023
    return text


def _by(key: str, rows: Rows) -> list[Rows]:
    return [[row for row in rows if row[key] == value] for value in dict.fromkeys(row[key] for row in rows)]


def _seeds(rows: Rows, datasets: Sequence[str]) -> list[Rows]:
    """By seed, the rows of these datasets."""
    return [[row for row in seed if row["dataset"] in datasets] for seed in _by("seed", rows)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _of(rows: Rows, dataset: str) -> Rows:
    return [row for row in rows if row["dataset"] == dataset]


def _hull(deltas: Sequence[Sequence[float]]) -> str:
    """Of differences with their intervals by prompts, one a seed: the mean, and the ends that hold all intervals."""
    if not deltas:
        return "–"
    values = [value for delta in deltas for value in delta]
    return f"{_mean([delta[0] for delta in deltas]):+.3f} [{min(values):+.3f}, {max(values):+.3f}]"


def _interval(row: dict[str, Any], value: str, low: str, high: str, sign: str = "") -> str:
    text = f"{row[value]:{sign}.3f}"
    return f"{text} [{row[low]:{sign}.3f}, {row[high]:{sign}.3f}]" if low in row else text


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is not up to date")
    check = parser.parse_args().check
    before = PAGE.read_text(encoding="utf-8")
    text = page(before)
    if check:
        print(f"{PAGE.name}: {'as it should be' if text == before else 'stale: run python -m docs.preference'}")
        return 0 if text == before else 1
    PAGE.write_text(text, encoding="utf-8")
    print(f"{PAGE.name}: written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
