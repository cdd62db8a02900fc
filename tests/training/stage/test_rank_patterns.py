"""rank_pattern and alpha_pattern: PEFT's meaning in training, and on disk an adapter that stock PEFT runs as it was.

Oracles: PEFT's `get_pattern_key` and its own LoRA with both patterns over the unsplit model; PEFT's loading of the file.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config import loading
from pipeline.console import UserError
from pipeline.model.adapters.base import trainable, written
from pipeline.training.stage import families, initial_adapter, patterns
from pipeline.training.start import resolve, to_train
from tests.helpers.configs import problems, small
from tests.helpers.stages import chain, hidden, token_ids

TARGETS = [f"model.layers.{i}.{m}" for i in (0, 1, 3) for m in ("mlp.down_proj", "self_attn.o_proj")]
RANKS = {"layers.1.mlp.down_proj": 6, r"3\..*": 2, "o_proj": 3}
ALPHAS = {"o_proj": 12.0, "model.layers.0.mlp.down_proj": 2.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "multiplicative_lora": {},
    "lora": {"adapter_type": "lora"},
    "rslora": {"adapter_type": "lora", "use_rslora": True},
    "dora": {"adapter_type": "lora", "use_dora": True},
    "moslora": {"adapter_type": "moslora"},
    "pissa": {"adapter_type": "lora", "init_lora_weights": "pissa"},
}


def config_of(llama: Path, family: str, **changes: Any) -> Any:
    raw = small(
        **{
            "lora_weight_dtype": "float32",
            "model": str(llama),
            "rank_pattern": RANKS,
            "alpha_pattern": ALPHAS,
            **FAMILIES[family],
            **changes,
        }
    )
    return loading.validate(raw, "x.toml")


def trained(llama: Path, config: Any, cuts: list[int]) -> list[Any]:
    """Stages with adapters of known values, as if trained."""
    stages = chain(llama, cuts)
    for stage in stages:
        families.inject(stage, to_train.adapter_of(config, TARGETS))
        with torch.no_grad():
            for name, parameter in trainable(stage).items():
                g = torch.Generator().manual_seed(sum(map(ord, name)))
                parameter.add_(torch.randn(parameter.shape, generator=g) * 0.1)
        stage.eval()
    return stages


def parameters(stages: list[Any]) -> dict[str, Tensor]:
    return {name: p.detach() for stage in stages for name, p in trainable(stage).items()}


def expected_sizes() -> dict[str, tuple[int, float]]:
    from peft.utils.other import get_pattern_key

    return {m: (RANKS.get(get_pattern_key(RANKS, m), 4), ALPHAS.get(get_pattern_key(ALPHAS, m), 8.0)) for m in TARGETS}


def test_sizes_are_pefts() -> None:
    ours = {m: patterns.resolve(m, 4, 8.0, RANKS, ALPHAS) for m in TARGETS}
    assert ours == expected_sizes()
    found = patterns.groups(ours)
    assert len(found) == 5, "the patterns tell all modules apart but the o_proj of layers 0 and 1"
    assert {module: size for size, modules in found.items() for module in modules} == ours


@pytest.mark.parametrize("family", ["lora", "rslora"])
def test_lora_is_pefts_with_both_patterns(llama: Path, family: str) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    stages = trained(llama, config_of(llama, family), [0, 1, 4])
    own = parameters(stages)
    assert {m: own[f"{m}.A"].shape[0] for m in TARGETS} == {m: r for m, (r, _) in expected_sizes().items()}
    whole = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    settings = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=TARGETS,
        rank_pattern=RANKS,
        alpha_pattern=ALPHAS,
        use_rslora=family == "rslora",
    )
    peft = get_peft_model(whole, settings).eval()
    with torch.no_grad():
        for name, tensor in own.items():
            peft.base_model.model.get_submodule(f"{name[:-2]}.lora_{name[-1]}.default").weight.copy_(tensor)
        wanted = peft.base_model.model.model(token_ids())[0]
        # A normed hidden state of about 1 after four layers of sums of 64 products in fp32.
        torch.testing.assert_close(hidden(stages, token_ids()), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_peft_runs_what_is_saved(llama: Path, tmp_path: Path, family: str) -> None:
    """Of two stages; of one rank and one s in the file, the same function."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = config_of(llama, family)
    stages = trained(llama, config, [0, 2, 4])
    tensors: dict[str, Tensor] = {}
    for stage in stages:
        tensors |= written(stage)
    (tmp_path / "saved").mkdir()
    families.writer(to_train.adapter_of(config, TARGETS), resolve.base_of(config))(tmp_path / "saved", tensors)
    whole = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    plain = whole.model(token_ids())[0]
    peft = PeftModel.from_pretrained(whole, str(tmp_path / "saved")).eval()
    with torch.no_grad():
        wanted = peft.base_model.model.model(token_ids())[0]
        assert (wanted - plain).abs().max() > 1e-2
        torch.testing.assert_close(hidden(stages, token_ids()), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "pissa"])
def test_goes_on_from_what_is_saved(llama: Path, tmp_path: Path, family: str) -> None:
    config = config_of(llama, family)
    stages = trained(llama, config, [0, 4])
    (tmp_path / "saved").mkdir()
    families.writer(to_train.adapter_of(config, TARGETS), resolve.base_of(config))(
        tmp_path / "saved", written(stages[0])
    )
    again = config_of(llama, family, init_adapter=str(tmp_path / "saved"), seed=7)
    begun = chain(llama, [0, 2, 4])
    for stage in begun:
        families.inject(stage, to_train.adapter_of(again, TARGETS))
        initial_adapter.put(stage, families.saved(to_train.adapter_of(again, TARGETS), again.init_adapter))
        stage.eval()
    with torch.no_grad():
        # B went through two factors, each rounded.
        torch.testing.assert_close(hidden(begun, token_ids()), hidden(stages, token_ids()), rtol=0, atol=1e-5)
    other = config_of(llama, family, init_adapter=str(tmp_path / "saved"), rank_pattern={**RANKS, "o_proj": 2})
    with pytest.raises(UserError, match=r"makes use of more than rank 2"):
        families.saved(to_train.adapter_of(other, TARGETS), other.init_adapter)


@pytest.mark.parametrize("family", ["lora", "rslora"])
def test_goes_on_from_what_peft_saves(llama: Path, tmp_path: Path, family: str) -> None:
    """PEFT's own file, in which each module has its own rank and the patterns stand in the config: bit for bit."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    settings = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=TARGETS,
        rank_pattern=RANKS,
        alpha_pattern=ALPHAS,
        use_rslora=family == "rslora",
    )
    peft = get_peft_model(AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32), settings).eval()
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)
        peft.save_pretrained(tmp_path / "saved")
        wanted = peft.base_model.model.model(token_ids())[0]
    config = config_of(llama, family, init_adapter=str(tmp_path / "saved"))
    begun = chain(llama, [0, 2, 4])
    for stage in begun:
        families.inject(stage, to_train.adapter_of(config, TARGETS))
        initial_adapter.put(stage, families.saved(to_train.adapter_of(config, TARGETS), config.init_adapter))
        stage.eval()
    theirs = {
        name.removeprefix("base_model.model.").replace(".lora_A.default.weight", ".A"): p.detach()
        for name, p in peft.named_parameters()
        if ".lora_A." in name
    }
    own = parameters(begun)
    assert {n for n in own if n.endswith(".A")} == theirs.keys()
    assert all(torch.equal(own[name], tensor) for name, tensor in theirs.items())
    with torch.no_grad():
        # As above.
        torch.testing.assert_close(hidden(begun, token_ids()), wanted, rtol=0, atol=1e-5)
    for changes, said in (
        (
            {"rank_pattern": {**RANKS, "o_proj": 2}},
            r"0\.self_attn\.o_proj has rank 3, this run's has rank 2; set lora_rank",
        ),
        ({"alpha_pattern": {**ALPHAS, "o_proj": 6.0}}, r"0\.self_attn\.o_proj was trained with s = .* \(alpha"),
    ):
        other = config_of(llama, family, init_adapter=str(tmp_path / "saved"), **changes)
        with pytest.raises(UserError, match=said):
            families.saved(to_train.adapter_of(other, TARGETS), other.init_adapter)


@pytest.mark.parametrize("family", ["multiplicative_lora", "lora", "rslora"])
def test_norms_are_those_of_each_modules_own_scaling(llama: Path, family: str) -> None:
    config = config_of(llama, family)
    stages = trained(llama, config, [0, 4])
    own, found = parameters(stages), families.norms(stages[0], to_train.adapter_of(config, TARGETS))
    assert found.keys() == set(TARGETS)
    for module, (rank, alpha) in expected_sizes().items():
        s = alpha / (rank**0.5 if family == "rslora" else rank)
        product = s * own[f"{module}.B"].double() @ own[f"{module}.A"].double()
        # Gram matrices of fp32 sums of at most 64 products.
        assert found[module] == pytest.approx(float(torch.linalg.matrix_norm(product)), rel=100 * 2**-24)


def test_a_start_from_the_weight_has_no_more_than_its_rank(llama: Path) -> None:
    config = config_of(llama, "pissa", rank_pattern={"layers.3.mlp.down_proj": 33}, alpha_pattern={})
    with pytest.raises(UserError, match=r"rank_pattern = 33: model\.layers\.3\.mlp\.down_proj has a weight of rank 32"):
        resolve.resolve(config)


def test_patterns_that_match_nothing_or_mean_nothing(llama: Path) -> None:
    with pytest.raises(UserError, match="rank_pattern: 'no_such' matches none of the modules"):
        patterns.check({"rank_pattern": {"no_such": 3}}, TARGETS)
    patterns.check({"rank_pattern": RANKS, "alpha_pattern": ALPHAS}, TARGETS)
    (line,) = problems(small(rank_pattern={"(": 3}))
    assert line.startswith("rank_pattern")
    assert "not a valid regular expression" in line
    (line,) = problems(small(rank_pattern={"x": 0}))
    assert line.startswith("rank_pattern")
    (line,) = problems(small(adapter_type="hra", lora_alpha=None, rank_pattern={"x": 2}))
    assert line.startswith("rank_pattern: adapter_type = 'hra' has no rank and alpha by module")
