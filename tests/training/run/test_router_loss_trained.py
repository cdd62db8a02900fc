"""Runs with the routers' loss: two stages, two replicas, and transformers' own number on the unsplit model."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers import builders, stage_runs, unsplit
from tests.helpers.builders import metrics
from tests.helpers.stage_runs import STEPS, Case, Result
from tests.helpers.unsplit import GRADIENT_TOLERANCE, LOSS_TOLERANCE, size

pytestmark = pytest.mark.slow  # two processes, and the unsplit model

WEIGHT, ACCUMULATION = 0.3, 2
CASES = {
    "stages": [],
    "recompute": ["activation_checkpointing=true"],
    "replicas": ["pipeline_stages=1", "gradient_accumulation_steps=1"],
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("routers")
    builders.save_model(root / "mixtral", "mixtral", num_local_experts=4)
    builders.write_config(
        root / "c.toml",
        model=str(root / "mixtral"),
        output_dir=str(root / "runs"),
        target_modules=["experts", "o_proj"],
        layers_to_transform="0:3",
        load_balancing_loss_coef=WEIGHT,
        gradient_accumulation_steps=ACCUMULATION,
    )
    return root


@pytest.fixture(scope="module")
def results(root: Path) -> dict[str, Result]:
    cases = [Case(name, root / "c.toml", [f"output_dir='{root}/{name}'", *more]) for name, more in CASES.items()]
    return stage_runs.run(2, cases, root / "results")


def test_the_first_step_is_transformers(root: Path, results: dict[str, Result]) -> None:
    """Each row is a micro-batch: the loss is the tokens' mean plus the mean of the rows' router losses."""
    model = AutoModelForCausalLM.from_pretrained(root / "mixtral", dtype=torch.float32).eval()
    for name in CASES:
        replicas = 2 if name == "replicas" else 1
        training, _ = unsplit.rows(root / "c.toml", CASES[name], 1, replicas)
        tokens, routers, n = 0.0, [], 0
        for row in training[0]:
            with torch.no_grad():
                output = model(input_ids=row[None], labels=row[None], output_router_logits=True)
            tokens += float(output.loss - model.router_aux_loss_coef * output.aux_loss) * (len(row) - 1)
            n += len(row) - 1
            routers.append(float(output.aux_loss))
        assert len(routers) == 2
        right = tokens / n + WEIGHT * sum(routers) / len(routers)
        assert results[name].losses[0] == pytest.approx(right, rel=0, abs=LOSS_TOLERANCE)
        (run,) = (root / name).glob("2*")
        (first, *_) = metrics(run)
        assert first["train/router_loss"] == pytest.approx(sum(routers) / len(routers), rel=1e-5)
        for layer in range(4):
            assert 0 <= first[f"expert_load/{layer}/least"] <= 1 <= first[f"expert_load/{layer}/most"] <= 2


def test_stages_and_replicas_learn_the_same(results: dict[str, Result]) -> None:
    one = results["stages"]
    for name in ("recompute", "replicas"):
        assert results[name].losses == pytest.approx(one.losses, rel=0, abs=LOSS_TOLERANCE)
        for step in range(1, STEPS + 1):
            for parameter, gradient in one.gradients(step).items():
                off = size(results[name].gradients(step)[parameter] - gradient)
                assert off <= step * 10 * GRADIENT_TOLERANCE * size(gradient)
