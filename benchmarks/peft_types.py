"""What PEFT's own types of adapters take beside the frozen model: counted numbers, memory and products, not times.

    python -m benchmarks.peft_types      → results/peft_types.json; then `python -m docs.families` writes docs/families.md

As benchmarks/families.py, whose modules and counters it takes, in fp32, which every type knows, and with few tokens: what is
counted a token and once a micro-batch is told apart by two lengths, and is the same for any other.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import families, record
from benchmarks.families import FROZEN, TINY, USUAL, Size, Variant

TOKENS = 64


def keys(size: Size) -> dict[str, dict[str, Any]]:
    """PEFT's keys by type: the rank of the other families where a type has one, and otherwise what PEFT's papers take."""
    rank = {"r": size.rank}
    block = size.hidden // 8
    return {
        "ADALORA": {"init_r": size.rank, "target_r": size.rank // 2, "total_step": 100, "lora_alpha": size.rank},
        "BEFT": {},
        "C3A": {"block_size": block},
        "DEFT": rank,
        "DELORA": rank,
        "FOURIERFT": {"n_frequency": 8 * block},
        "GLORA": rank,
        "GRALORA": rank,
        "HIRA": rank,
        "LOHA": rank,
        "LOKR": rank,
        "MISS": rank,
        "OSF": {},
        "PEANUT": {**rank, "depth": 1, "act_fn": "relu"},
        "PSOFT": rank,
        "PVERA": rank,
        "RANDLORA": rank,
        "ROAD": {"group_size": block},
        "SHIRA": rank,
        "SUPERTUNING": {},
        "VERA": rank,
        "TINYLORA": {"r": 2},
        "UNILORA": rank,
        "VBLORA": {"r": 4, "num_vectors": block, "vector_length": block},
        "WAVEFT": {"n_frequency": 8 * block},
    }


def measure(size: Size) -> list[dict[str, Any]]:
    """A row for each type."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        families.save_base(size, Path(folder))
        floor = families.counts_of(Variant(FROZEN, None, size, Path(folder)), size, plain=True)
        for name, own in keys(size).items():
            table = {"adapter_type": "peft", **families.NO_RANK, "peft": {"type": name, **own}}
            variant = Variant(name, table, size, Path(folder))
            rows.append({"variant": name, "keys": own, **families.counted(variant, floor, size)})
            print(f"{name:12} {rows[-1]['trained']:10,.0f} trained a module", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="to see that it runs")
    parser.add_argument("--out", type=Path, help="folder of the JSON")
    given = parser.parse_args()
    size = (TINY if given.tiny else USUAL)._replace(dtype="float32", tokens=TOKENS)
    settings = {**size._asdict(), "target_modules": ["down_proj"], "optimizer": "adamw_kahan"}
    print("written:", record.write("peft_types", settings, measure(size), given.out))


if __name__ == "__main__":
    main()
