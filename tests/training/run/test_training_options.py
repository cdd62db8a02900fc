"""LoRA+, NEFTune, decay of the product, bounded norms and init_adapter in whole runs over two stages.

Oracle: the unsplit model in a plain loop, with torch's own parameter groups, transformers' own NEFTune hook, the decay by
autograd, and qlora-pipe's formula for the norms. All of them at once: stopped and resumed, bit-equal to the run that was
not.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.artifacts.adapter.write import save_adapter
from tests.helpers import builders, stage_runs, unsplit
from tests.helpers.stage_runs import STEPS, Case, Result
from tests.helpers.unsplit import GRADIENT_TOLERANCE, LOSS_TOLERANCE, size
from tests.training.checkpoint.test_resume import assert_equal, final_state, numbers, run_plan

pytestmark = pytest.mark.slow  # minutes: real processes for every case

LR, EPS, DECAY, CLIP, RANK, ALPHA = 1e-2, 1e-3, 0.1, 0.1, 4, 8
S = ALPHA / RANK
RATIO, NOISE, COMPOSITE, LARGEST = 4.0, 5.0, 0.5, 0.05
OPTIONS = {
    "loraplus": [f"optimizer.loraplus_lr_ratio={RATIO}"],
    "groups": [f"optimizer.groups=[{{names=['B'], lr_ratio={RATIO}, weight_decay=0.0, beta1=0.5}}]"],
    "neftune": [f"neftune_noise_alpha={NOISE}"],
    "composite": [f"composite_weight_decay={COMPOSITE}"],
    "norms": [f"scale_weight_norms={LARGEST}"],
}


class Decayed(torch.optim.AdamW):
    """AdamW without decay of its own; of each (A, B), lr·λ times the gradient of ½‖s·B·A‖² at the weights before."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        before: list[Tensor] = [p.detach().double().requires_grad_() for p in self.param_groups[0]["params"]]
        decays = torch.autograd.grad(
            torch.stack([0.5 * (S * B @ A).square().sum() for A, B in pairs(before)]).sum(), before
        )
        super().step()
        with torch.no_grad():
            for p, decay in zip(self.param_groups[0]["params"], decays, strict=True):
                p.sub_(LR * COMPOSITE * decay.float())


class Bounded(torch.optim.AdamW):
    """AdamW, and then qlora-pipe's `apply_max_norm_regularization`."""

    bounded = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        for A, B in pairs(self.param_groups[0]["params"]):
            norm = (S * (B @ A)).norm().clamp(min=LARGEST / 2)
            ratio = torch.clamp(norm, max=LARGEST) / norm
            Bounded.bounded += int(ratio != 1)
            A.mul_(ratio**0.5), B.mul_(ratio**0.5)


def pairs(leaves: list[Any]) -> list[tuple[Any, Any]]:
    """(A, B) of each module; the leaves come as A, B, A, B, …"""
    assert all(a.shape[0] == RANK and b.shape[1] == RANK for a, b in zip(leaves[::2], leaves[1::2], strict=True))
    return list(zip(leaves[::2], leaves[1::2], strict=True))


ADAMW: dict[str, Any] = {"lr": LR, "betas": (0.9, 0.99), "eps": EPS}
OPTIMIZERS: dict[str, Callable[[list[Tensor]], Any]] = {
    "loraplus": lambda leaves: torch.optim.AdamW(
        [{"params": leaves[::2]}, {"params": leaves[1::2], "lr": LR * RATIO}], weight_decay=DECAY, **ADAMW
    ),
    "groups": lambda leaves: torch.optim.AdamW(
        [
            {"params": leaves[::2]},
            {"params": leaves[1::2], "lr": LR * RATIO, "weight_decay": 0.0, "betas": (0.5, 0.99)},
        ],
        weight_decay=DECAY,
        **ADAMW,
    ),
    "neftune": lambda leaves: torch.optim.AdamW(leaves, weight_decay=DECAY, **ADAMW),
    "composite": lambda leaves: Decayed(leaves, weight_decay=0.0, **ADAMW),
    "norms": lambda leaves: Bounded(leaves, weight_decay=DECAY, **ADAMW),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("options")
    builders.save_model(root / "cohere")
    (root / "text.txt").write_text((builders.BOOKS / "the_salt_ledger.md").read_text(encoding="utf-8")[:6000])
    text = {"name": "book", "dataset_type": "textfile", "dataset_path": str(root / "text.txt"), "sequence_len": 64}
    builders.write_config(
        root / "config.toml",
        model=str(root / "cohere"),
        output_dir=str(root / "runs"),
        gradient_clipping=CLIP,
        optimizer={"type": "adamw", "lr": LR, "eps": EPS, "weight_decay": DECAY},
        datasets=[text],
    )
    save_adapter(
        root / "saved",
        earlier(),
        kind="multiplicative_lora",
        rank=RANK,
        alpha=ALPHA,
        dropout=0.0,
        base_model=str(root / "cohere"),
        train_logit_scale=1.0,
        biased_targets=False,
    )
    return root


def earlier() -> dict[str, Tensor]:
    """An adapter of an earlier run on layers 0 to 2, in bf16 as it may have been saved."""
    g = torch.Generator().manual_seed(7)
    shapes = {
        f"model.layers.{i}.mlp.down_proj.{x}": s for i in range(3) for x, s in (("A", (RANK, 32)), ("B", (32, RANK)))
    }
    return {name: (torch.randn(shape, generator=g) * 0.1).to(torch.bfloat16) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def results(root: Path) -> dict[str, Result]:
    cases = [
        *(Case(name, root / "config.toml", keys) for name, keys in OPTIONS.items()),
        Case(
            "continued",
            root / "config.toml",
            [f"init_adapter={str(root / 'saved')!r}", "layers_per_stage=[1, 3]"],
            steps=1,
        ),
    ]
    return stage_runs.run(2, cases, root / "results")


@pytest.mark.parametrize("name", OPTIONS)
def test_two_stages_are_the_plain_loop(name: str, root: Path, results: dict[str, Result]) -> None:
    from transformers.integrations.neftune import neftune_post_forward_hook

    result = results[name]
    steps, _ = unsplit.rows(root / "config.toml", OPTIONS[name], STEPS)
    model = unsplit.load(root / "cohere")
    initial = {n: result.initial[n] for n in sorted(result.initial)}
    leaves = unsplit.with_multiplicative(model, initial, S)
    if name == "neftune":
        embedding = model.get_input_embeddings().train()
        embedding.neftune_noise_alpha = NOISE
        embedding.register_forward_hook(neftune_post_forward_hook)
    torch.manual_seed(42)  # the run's seed; its first process, which has the embedding, begins with it
    Bounded.bounded = 0
    trace = unsplit.train(model, leaves, steps, OPTIMIZERS[name], CLIP)
    assert result.losses == pytest.approx(trace.losses, rel=0, abs=LOSS_TOLERANCE)
    assert result.agreed("norms") == pytest.approx(trace.norms, rel=STEPS * GRADIENT_TOLERANCE)
    for weight_name, weight in trace.weights.items():
        lr = LR * RATIO if name in ("loraplus", "groups") and weight_name.endswith(".B") else LR
        # Decay and clamp each add a few roundings of the weight, which the bound counts twice as it is.
        tolerance = 2 * unsplit.weight_tolerance(trace, weight_name, lr, EPS)
        moved = size(weight - result.initial[weight_name])
        assert size(result.weights[weight_name] - weight) <= tolerance < 0.02 * moved, weight_name
    if name == "norms":
        assert 0 < Bounded.bounded < 3 * STEPS, "some products reach the bound, and not all from the first step"


def test_options_change_what_is_trained(results: dict[str, Result]) -> None:
    """The oracles could agree with a run in which an option does nothing only if it did nothing there either."""
    weights = [torch.cat([t.flatten() for _, t in sorted(results[name].weights.items())]) for name in OPTIONS]
    for i, one in enumerate(weights):
        for other in weights[:i]:
            assert size(one - other) > 1e-3 * size(one)


def test_run_begins_with_the_saved_adapter(results: dict[str, Result]) -> None:
    """Under global names, whichever stage a layer is on; in the run's own dtype."""
    initial = results["continued"].initial
    assert initial.keys() == earlier().keys()
    for name, tensor in earlier().items():
        assert initial[name].dtype == torch.float32
        assert torch.equal(initial[name], tensor.float())
    assert all(not torch.equal(results["continued"].weights[name], initial[name]) for name in initial)


def test_all_of_them_stopped_and_resumed_are_bit_equal(root: Path, tmp_path: Path) -> None:
    """bf16 adapters with Kahan terms, dropout beside NEFTune's noise, recomputation, and an evaluation in between."""
    text = {
        "name": "book",
        "dataset_type": "textfile",
        "dataset_path": str(root / "text.txt"),
        "sequence_len": 64,
        "eval_size": 4,
    }
    toml = builders.write_config(
        tmp_path / "config.toml",
        model=str(root / "cohere"),
        output_dir=str(tmp_path / "runs"),
        max_steps=4,
        eval_steps=1,
        lora_dropout=0.2,
        lora_weight_dtype="bfloat16",
        activation_checkpointing=True,
        neftune_noise_alpha=NOISE,
        composite_weight_decay=COMPOSITE,
        scale_weight_norms=LARGEST,
        init_adapter=str(root / "saved"),
        optimizer={"type": "adamw_kahan", "lr": 1e-2, "loraplus_lr_ratio": RATIO},
        datasets=[text],
    )
    plan: list[dict[str, Any]] = [
        {"config": str(toml)},
        {"config": str(toml), "stop_after": 2},
        {"config": str(toml), "resume": 1},
    ]
    result = run_plan(tmp_path, 2, plan)
    assert result["codes"] == [0, 75, 0]
    whole, _, resumed = result["runs"]
    assert_equal(final_state(resumed, 4), final_state(whole, 4))
    assert numbers(resumed) == numbers(whole)
