"""What is trained in full beside an adapter, with and without weight decay: what gets no gradient moves by the decay alone.

[[optimizer.groups]] gives norms and embeddings `weight_decay = 0`. The oracle is what AdamW's definition leaves of a zero
gradient: w ← (1 − lr·λ)·w, k times.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.training.optim.inner import make_inner
from pipeline.training.optim.parameter_groups import ParamGroupOverride, build
from pipeline.training.optim.pipeline_optimizer import PipelineOptimizer
from tests.helpers import builders, stage_runs, unsplit
from tests.helpers.stage_runs import STEPS, Case

LR, DECAY = 1e-2, 0.1
WIDTH = 256
EMBEDDING = "model.embed_tokens.weight"
UNDECAYED = ["embed_tokens.weight", ".*norm.weight"]
# AdamWKahan keeps w + kahan to some roundings of the change (1e-3 of w) a step, and w is that sum rounded once.
TOLERANCE = 1.01 * unsplit.UNIT


def decayed(weight: Tensor, steps: int) -> Tensor:
    """What decay alone leaves, in fp64."""
    return weight.double() * (1 - LR * DECAY) ** steps


@pytest.mark.parametrize("kind", ["adamw_kahan", "adamw", "adamw8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_rows_that_no_step_reads(kind: str, dtype: torch.dtype) -> None:
    """Of an embedding of 8192 elements (8-bit states begin at 4096), of which some rows are looked up, and a norm beside it.

    Rows are whole blocks of 256, in which bitsandbytes scales its 8-bit states, as at every real hidden size. In a block
    that is shared with a row that moves it codes 0 as the smallest positive number, and the row creeps by 0.4 % of lr a step.
    """
    generator = torch.Generator().manual_seed(0)
    start = {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, shape in {"m.embed_tokens.weight": (32, WIDTH), "m.norm.weight": (WIDTH,), "m.A": (4, WIDTH)}.items()
    }
    own = {name: nn.Parameter(tensor.clone()) for name, tensor in start.items()}
    groups = build(
        own, fast_ratio=1.0, weight_decay=DECAY, specials=[ParamGroupOverride(UNDECAYED, {"weight_decay": 0.0})]
    )
    inner = make_inner(kind, groups, lr=LR, betas=(0.9, 0.99), eps=1e-8, weight_decay=DECAY)
    optimizer = PipelineOptimizer(own, inner, 0.0)
    ids = torch.tensor([[3, 5, 7, 31], [0, 5, 9, 3], [16, 17, 5, 5]])
    for row in ids:
        embedded = own["m.embed_tokens.weight"][row]
        (embedded.float() @ own["m.A"].float().T).square().sum().backward()  # the norm has no gradient
        optimizer.set_lr(LR)
        optimizer.step()
    read = torch.zeros(32, dtype=torch.bool).index_fill(0, ids.flatten(), True)
    before, after = start["m.embed_tokens.weight"], own["m.embed_tokens.weight"].detach()
    assert torch.equal(after[~read], before[~read]), "a row without gradient moved"
    assert (after[read] != before[read]).any(dim=1).all()
    assert torch.equal(own["m.norm.weight"].detach(), start["m.norm.weight"])
    assert not torch.equal(own["m.A"].detach(), start["m.A"])


@pytest.mark.slow
def test_in_runs_over_two_stages(tmp_path: Path) -> None:
    """A llama with its embedding and norms beside the adapter: rows of tokens that no chunk has are bit-equal to the base's
    after five steps; without the group they have decayed five times; all others have moved in both.
    """
    builders.save_model(tmp_path / "base", "llama")
    text = tmp_path / "text.txt"
    text.write_text((builders.BOOKS / "the_salt_ledger.md").read_text(encoding="utf-8")[:12000])
    settings: dict[str, Any] = {
        "model": str(tmp_path / "base"),
        "output_dir": str(tmp_path / "runs"),
        "gradient_clipping": 0.0,
        "trainable_modules": ["embed_tokens", "input_layernorm", "norm"],
        "datasets": [{"dataset_type": "textfile", "dataset_path": str(text), "sequence_len": 64}],
    }
    optimizer = {"type": "adamw_kahan", "lr": LR, "weight_decay": DECAY}
    groups = {"groups": [{"names": UNDECAYED, "weight_decay": 0.0}]}
    cases = [
        Case(name, builders.write_config(tmp_path / f"{name}.toml", **settings, optimizer={**optimizer, **more}))
        for name, more in (("without", groups), ("with", {}))
    ]
    results = stage_runs.run(2, cases, tmp_path / "out")
    steps, _ = unsplit.rows(cases[0].config, [], STEPS)
    inputs = torch.cat([row[:-1] for step in steps for row in step])  # a row's last token is a target only
    read = torch.zeros(builders.VOCABULARY, dtype=torch.bool).index_fill(0, inputs, True)
    assert 10 < int(read.sum()) < builders.VOCABULARY - 10
    for name, result in results.items():
        before, after = result.initial, result.weights
        assert sorted(n for n in before if not n.endswith((".A", ".B"))) == sorted(
            [EMBEDDING, "model.norm.weight", *(f"model.layers.{i}.input_layernorm.weight" for i in range(4))]
        )
        unread = after[EMBEDDING][~read]
        if name == "without":
            assert torch.equal(unread, before[EMBEDDING][~read]), "a row without gradient moved"
        else:
            expected = decayed(before[EMBEDDING][~read], STEPS)
            assert ((unread.double() - expected).abs() <= TOLERANCE * expected.abs()).all()
            assert (unread != before[EMBEDDING][~read]).float().mean() > 0.99
        assert (after[EMBEDDING][inputs] != before[EMBEDDING][inputs]).any(dim=1).all()
        assert all(not torch.equal(after[n], before[n]) for n in before if "norm" in n)
