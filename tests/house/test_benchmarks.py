"""Every benchmark runs to its end at a tiny size and writes what it promises, and its formulas give the known figures.

What a tiny run measures means nothing; that ours and the peer are the same training is checked by the benchmark itself.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import correctness, cpu_training
from benchmarks.shapes import COMMAND_R, CPU, TINY, Ceilings, kept_bytes, peer_step, predicted_s, step
from pipeline.model.memory.levels import RecomputeLevel
from tests.helpers import builders


def benchmark(module: str, out: Path, *arguments: str) -> dict[str, Any]:
    """The JSON it wrote; fails with its output if it failed."""
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", "--tiny", "--out", str(out), *arguments],
        cwd=builders.ROOT,
        env=builders.environment(MALLOC_ARENA_MAX="1"),
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (written,) = out.glob("*.json")
    result: dict[str, Any] = json.loads(written.read_text())
    assert {"when", "cpu", "cores", "load_average", "versions"} <= set(result["machine"])
    assert result["rows"]
    return result


@pytest.mark.slow
def test_head(tmp_path: Path) -> None:
    rows = benchmark("head", tmp_path, "--rounds", "2")["rows"]
    assert {row["variant"] for row in rows} == {"ours", "whole logits", "torch"}
    assert all(row["seconds"] > 0 for row in rows)


@pytest.mark.slow
def test_preparing(tmp_path: Path) -> None:
    rows = benchmark("preparing", tmp_path)["rows"]
    tokens = {(row["kind"], row["variant"]): row["tokens"] for row in rows}
    assert tokens["text", "ours"] == tokens["text", "datasets.map"]
    # Ours ends behind the last answer: the line break that ChatML writes after it is one token a conversation less.
    assert 0 < tokens["chat", "datasets.map"] - tokens["chat", "ours"] < 0.01 * tokens["chat", "ours"]
    assert all(row["peak_bytes"] < 2**30 for row in rows)


@pytest.mark.slow
def test_fold(tmp_path: Path) -> None:
    rows = benchmark("fold", tmp_path)["rows"]
    assert {"hashed copy", "fold, multiplicative", "fold, additive", "export", "PEFT"} < {
        row["variant"] for row in rows
    }
    assert all(row["to_hashed_copy"] > 0 for row in rows)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_product(tmp_path: Path) -> None:
    rows = benchmark("product", tmp_path, "--rounds", "1", "--dtype", "float32")["rows"]
    assert {"peer", "train.py", "stage alone"} == {row["variant"].split(",")[0].split(" +")[0] for row in rows}
    assert all(len(row["all_seconds"]) in (1, 3) and row["seconds"] > 0 for row in rows)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_cpu_training(tmp_path: Path) -> None:
    """Levels and kernels are one line each in the same code: one of ours stands for them."""
    result = benchmark("cpu_training", tmp_path, "--rounds", "2", "--threads", "1", "--only", "ours everything")
    assert [row["variant"] for row in result["rows"]] == ["hf", "hf + checkpointing", "ours everything"]
    for row in result["rows"]:
        assert row["tokens_per_s"] > 0
        assert row["peak_mib"] > 0
        # bf16 has 8 bits; a gradient of many terms is off by about that, and an adapter in another place by about 1.
        assert 0 < row["gradient_error"] < 0.05


@pytest.mark.slow
def test_pipeline_schedule(tmp_path: Path) -> None:
    (row,) = benchmark("pipeline_schedule", tmp_path, "--rounds", "2", "--micro-batches", "3", "--threads", "1")["rows"]
    assert row["measured_s"] > 0
    for condition in ("together", "alone"):
        stages = list(zip(row[f"forward_s_{condition}"], row[f"backward_s_{condition}"], strict=True))
        # No schedule is faster than its busiest stage, or slower than everything in turn with 2 transfers a micro-batch.
        busiest, in_turn = max(3 * (f + b) for f, b in stages), sum(3 * (f + b) for f, b in stages)
        beside = row["optimizer_s"]
        assert busiest <= row[f"simulated_s_{condition}"] - beside <= in_turn + 6 * row["transfer_s"] + 1e-9
    assert len(row["forward_s_alone"]) == len(row["backward_s_alone"]) == 2


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_gpu_h200_on_the_cpu(tmp_path: Path) -> None:
    result = benchmark(
        "gpu_h200",
        tmp_path,
        "--device",
        "cpu",
        "--skip-checks",
        "--only",
        "hf + checkpointing",
        "ours everything, on the host",
    )
    for row in result["rows"]:
        assert len(row["all_seconds"]) == 5
        assert row["predicted_s"] > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_kernels_are_as_near_to_fp64_as_pytorch(dtype: str) -> None:
    rows = correctness.check(TINY._replace(dtype=dtype), torch.device("cpu"))
    assert len(rows) == 6
    assert all(row["good"] for row in rows), rows


def test_a_wrong_result_is_seen() -> None:
    """One element in 64 off by its own size is an eighth of the norm."""
    exact = [torch.ones(64)]
    wrong = torch.ones(64)
    wrong[3] = 2
    assert correctness.distance([wrong], exact) == pytest.approx(1 / 8)
    assert cpu_training.distance({"0.A": wrong}, {"0.A": exact[0]}) == pytest.approx(1 / 8)


@pytest.mark.slow
def test_the_wall_limit_skips_and_says_so(tmp_path: Path) -> None:
    result = benchmark("gpu_h200", tmp_path, "--device", "cpu", "--skip-checks", "--wall-limit", "0")
    assert all("skipped" in row["reason"] for row in result["rows"])


def test_formulas_give_the_table_of_docs_performance() -> None:
    """KB a token and layer, and GFLOP a token, of Command-R 35B, within the table's own rounding."""
    table = {
        RecomputeLevel.INPUT: (16.4, 226.6),
        RecomputeLevel.ADAPTER: (16.5, 206.9),
        RecomputeLevel.ATTENTION: (33.2, 201.7),
        RecomputeLevel.PROJECTIONS: (82.3, 186.0),
        RecomputeLevel.EVERYTHING: (172.4, 157.2),
    }
    for level, (kilobytes, gigaflops) in table.items():
        assert kept_bytes(COMMAND_R, level) / 1e3 == pytest.approx(kilobytes, rel=0.005)
        assert step(COMMAND_R, level).flops(COMMAND_R) / 8192 / 1e9 == pytest.approx(gigaflops, rel=0.003)
    # Checkpointing as the peer does it runs backward through the first layer too.
    assert peer_step(COMMAND_R, True).flops(COMMAND_R) / 8192 / 1e9 == pytest.approx(230.2, rel=0.003)
    assert peer_step(COMMAND_R, False).flops(COMMAND_R) == step(COMMAND_R, RecomputeLevel.EVERYTHING).flops(COMMAND_R)


def test_a_prediction_is_the_work_over_the_rates() -> None:
    rates = Ceilings(1e15, 1e30, 50e9, 50e9, 0.0, 0.0)
    work = step(COMMAND_R, RecomputeLevel.EVERYTHING)
    assert predicted_s(work, rates) == pytest.approx(work.linear_flops / 1e15)
    # 56 GB out and in again at 50 GB/s outlast the products.
    host = float(kept_bytes(COMMAND_R, RecomputeLevel.EVERYTHING)) * 8192 * 40
    assert predicted_s(work, rates, host) == pytest.approx(2 * host / 50e9)


def test_the_founding_change_is_the_multiplicative_adapter() -> None:
    """h + s·B·A·h of the layer's output, against the formula."""
    from peft import LoraConfig, inject_adapter_in_model

    from benchmarks.variants import make_multiplicative

    torch.manual_seed(0)
    holder = nn.Sequential(nn.Linear(6, 4, bias=False))
    weight = holder[0].weight
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=6, target_modules=["0"]), holder)
    layer: Any = holder[0]
    make_multiplicative(layer, torch.float32)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    nn.init.normal_(B)
    x = torch.randn(3, 6)
    expected = x @ weight.T @ (torch.eye(4) + 3.0 * B @ A).T
    torch.testing.assert_close(layer(x), expected)


def test_the_cpu_model_is_as_large_as_was_asked() -> None:
    """d ≥ 512, 8 layers, vocabulary ≥ 32 k, T ≥ 1024, rank 16 to 64; adapters on layers 0 to 6."""
    assert CPU.hidden >= 512
    assert CPU.layers == 8
    assert CPU.vocabulary >= 32_000
    assert CPU.tokens >= 1024
    assert 16 <= CPU.rank <= 64
    assert list(CPU.adapted) == list(range(7))
