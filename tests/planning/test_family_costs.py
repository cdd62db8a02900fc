"""The costs of adapter families: what the benchmark counts are the formulas, and the page says what the results say.

Letters: i inputs, o outputs, R rank, k inputs of a block, of one adapted module; numbers take 2 bytes. Products take 2 FLOPs
a multiplication; a trained matrix is multiplied once forward and twice backward, a frozen one once and once.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks import families as benchmark
from benchmarks import peft_types
from docs import families as docs
from pipeline.console import UserError
from pipeline.peft.types import LOCAL

SIZE = benchmark.TINY
Formula = Callable[[int, int, int, int], float]
# Of a module: numbers that are trained; bytes kept for backward and FLOPs of products, both a token.
LORA: dict[str, Formula] = {
    "trained": lambda i, o, R, k: (i + o) * R,
    "kept_bytes_a_token": lambda i, o, R, k: 2 * (i + R),  # x, which W itself does not need, and A·x
    "flops_a_token": lambda i, o, R, k: 6 * (i + o) * R,
}
FROM_WEIGHT = {**LORA, "flops_a_token": lambda i, o, R, k: (6 + 4) * (i + o) * R}  # and the frozen start
FORMULAS: dict[str, dict[str, Formula]] = {
    "multiplicative_lora": {
        "trained": lambda i, o, R, k: 2 * o * R,
        "kept_bytes_a_token": lambda i, o, R, k: 2 * (o + R),  # h, A·h
        "flops_a_token": lambda i, o, R, k: 12 * o * R,
        "flops_a_micro_batch": lambda i, o, R, k: 0,
    },
    "control_adapter": {
        "trained": lambda i, o, R, k: o * R + R,
        "kept_bytes_a_token": lambda i, o, R, k: 2 * (o + R),
        "kept_bytes_a_micro_batch": lambda i, o, R, k: 2 * (o * R + R),  # Q·diag(e^S − 1), e^S − 1
        "flops_a_token": lambda i, o, R, k: 12 * o * R,
    },
    "lora": LORA,
    "rslora": LORA,
    "pissa": FROM_WEIGHT,
    "pissa_niter_4": FROM_WEIGHT,
    "olora": FROM_WEIGHT,
    "moslora": {
        "trained": lambda i, o, R, k: (i + o) * R + R * R,
        "kept_bytes_a_token": lambda i, o, R, k: 2 * (i + 2 * R),
        "flops_a_token": lambda i, o, R, k: 6 * ((i + o) * R + R * R),
    },
    "dora": {
        "trained": lambda i, o, R, k: (i + o) * R + o,
        "kept_bytes_a_token": lambda i, o, R, k: 2 * (i + R + o),
        "flops_a_token": LORA["flops_a_token"],
        "flops_a_micro_batch": lambda i, o, R, k: 2 * R * i * o + 2 * R * R * (i + o),  # A·Wᵀ, A·Aᵀ, B·(A·Aᵀ)
    },
    "ia3": {  # on a module of feedforward_modules
        "trained": lambda i, o, R, k: i,
        "kept_bytes_a_token": lambda i, o, R, k: 2 * i,
        "flops_a_token": lambda i, o, R, k: 0,
    },
    "oft": {
        "trained": lambda i, o, R, k: i // k * (k * (k - 1) // 2),
        "kept_bytes_a_token": lambda i, o, R, k: 2 * i,
        "flops_a_token": lambda i, o, R, k: 6 * i * k,
    },
    "boft": {
        "trained": lambda i, o, R, k: i * k + o,
        "kept_bytes_a_token": lambda i, o, R, k: 2 * (i + o),  # x, h
        "flops_a_token": lambda i, o, R, k: 6 * i * k,
    },
    "hra": {"trained": lambda i, o, R, k: i * R, "flops_a_token": lambda i, o, R, k: 12 * i * R},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """The base's folder, and the counts of the frozen model."""
    base = tmp_path_factory.mktemp("base")
    benchmark.save_base(SIZE, base)
    frozen = benchmark.Variant(benchmark.FROZEN, None, SIZE, base)
    return {"base": base, "floor": benchmark.counts_of(frozen, SIZE, plain=True)}


@pytest.mark.parametrize("family", FORMULAS)
def test_counts_are_the_formulas(made: Mapping[str, Any], family: str) -> None:
    variant = benchmark.Variant(family, benchmark.families(SIZE)[family], SIZE, made["base"])
    found = benchmark.counted(variant, made["floor"], SIZE)
    for key, formula in FORMULAS[family].items():
        assert found[key] == formula(SIZE.feed_forward, SIZE.hidden, SIZE.rank, SIZE.block), key
    # Itself, the first moment: 2 bytes; the sum, the second moment, Kahan's term: 4; and a step count a tensor.
    assert 16 * found["trained"] < found["trained_bytes"] < 16 * found["trained"] + 8 * 4


def test_every_family_is_on_the_page_with_the_bases_it_trains_over(tmp_path: Path) -> None:
    families = benchmark.families(SIZE)
    measured = [row for row in docs.FAMILIES if row.keys not in docs.UNMEASURED]
    assert len(measured) == len(docs.FAMILIES) - len(docs.UNMEASURED)
    for (name, keys), row in zip(families.items(), measured, strict=True):
        for key, value in keys.items():
            special = key in ("use_rslora", "use_dora", "init_lora_weights")
            assert not special or (str(value) if isinstance(value, str) else key) in row.keys, name
        assert keys.get("adapter_type", "multiplicative_lora") in row.keys
        allowed = []
        for bits in (4, 8):
            try:
                benchmark.config_of({**keys, "quantization": {"bnb": {f"load_in_{bits}bit": True}}}, SIZE, tmp_path)
            except UserError:
                continue
            allowed.append(str(bits))
        assert row.quantised == (", ".join(allowed) or "no"), name


def test_the_page_says_what_the_results_say() -> None:
    result, of_peft = (
        json.loads((docs.RESULTS / f"{n}.json").read_text(encoding="utf-8")) for n in ("families", "peft_types")
    )
    assert docs.PAGE.read_text(encoding="utf-8") == docs.page(result, of_peft), "run python -m docs.families"
    assert [row["variant"] for row in of_peft["rows"]] == list(LOCAL)
    assert {row["variant"] for row in result["rows"]} == set(benchmark.variants(benchmark.USUAL))
    size = benchmark.USUAL
    assert {key: result["settings"][key] for key in size._fields} == size._asdict()
    for row in result["rows"]:
        for key, formula in FORMULAS.get(row["variant"].partition(", ")[0], {}).items():
            if key in row:
                assert row[key] == formula(size.feed_forward, size.hidden, size.rank, size.block), (row["variant"], key)


# Numbers that PEFT's types train in a module; what they keep and multiply is PEFT's own layers' affair.
OF_PEFT: dict[str, Formula] = {
    "ADALORA": lambda i, o, R, k: (i + o + 1) * R,
    "DELORA": lambda i, o, R, k: (i + o) * R + 1,
    "HIRA": lambda i, o, R, k: (i + o) * R,
    "LOHA": lambda i, o, R, k: 2 * (i + o) * R,
    "ROAD": lambda i, o, R, k: o,  # an angle and a length for each pair of outputs
    "SHIRA": lambda i, o, R, k: (i + o) * R,
    "VERA": lambda i, o, R, k: o + R,
}


@pytest.mark.slow
def test_what_pefts_types_take_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["peft_types", "--tiny", "--out", str(tmp_path)])
    peft_types.main()
    rows = {row["variant"]: row for row in json.loads((tmp_path / "peft_types.json").read_text())["rows"]}
    assert list(rows) == list(LOCAL)
    for name, formula in OF_PEFT.items():
        assert rows[name]["trained"] == formula(SIZE.feed_forward, SIZE.hidden, SIZE.rank, SIZE.block), name


@pytest.mark.slow
def test_the_benchmark_runs_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["families", "--tiny", "--rounds", "2", "--threads", "1", "--out", str(tmp_path)])
    benchmark.main()
    rows = json.loads((tmp_path / "families.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == list(benchmark.variants(SIZE))
    assert all(len(row["all_seconds"]) == 2 and row["seconds"] > 0 for row in rows)
