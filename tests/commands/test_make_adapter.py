"""Adapters made of directions: folded, the direction is gone, mirrored, or weaker by the factor; PEFT reads the same.

The oracles are projections in fp64 on the written weights, the running model, and stock PEFT.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from pipeline.artifacts.adapter.read import load_adapter
from pipeline.artifacts.fold.merge import merge
from pipeline.console import UserError
from tests.helpers import mixtures
from tests.helpers.artifacts import files_of, load_model, tensors_of
from tests.helpers.builders import ROOT, environment
from tests.helpers.directions import LAYERS, D, Make, directions, maker, save_base, stored, unit
from tests.helpers.stages import token_ids

UNIT_ROUNDOFF = {torch.float32: 2**-24, torch.bfloat16: 2**-8}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {
        "llama": save_base(root / "llama"),
        "cohere": save_base(root / "cohere", "cohere"),
        "bfloat16": save_base(root / "bfloat16", dtype=torch.bfloat16),
        "biased": save_base(root / "biased", mlp_bias=True, attention_bias=True),
    }


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    return maker(tmp_path, monkeypatch)


def written(folder: Path, layers: range = range(LAYERS)) -> dict[str, tuple[int, Tensor]]:
    """Name → (layer, W fp64) of every weight that writes to the residual stream."""
    found = tensors_of(folder)
    names = [(i, f"model.layers.{i}.{end}.weight") for i in layers for end in ("mlp.down_proj", "self_attn.o_proj")]
    return {name: (i, found[name].double()) for i, name in names}


def fold_error(dtype: torch.dtype, folds: int = 1, strength: float = 1.0) -> float:
    """Bound on the error of a column w of W + B·(A·W), in units of ‖w‖, for each fold.

    In fp32, |fl(v·w) − v·w| ≤ D·2⁻²⁴·‖w‖ (Cauchy-Schwarz); v rounded to fp32 in A and in B, the product with B, the sum
    and the comparison's own fp64 direction add 8 roundings; all but the sum are multiplied by the strength, 1 or 2. At
    the end one rounding to the dtype, half a unit of its last place of each element.
    """
    return folds * (strength * (D + 8) * 2**-24 + UNIT_ROUNDOFF[dtype])


@pytest.mark.parametrize("name", ["llama", "cohere", "bfloat16"])
def test_abliteration_folded_leaves_nothing_of_the_direction(
    bases: dict[str, Path], make: Make, tmp_path: Path, name: str
) -> None:
    base, vectors = bases[name], directions(LAYERS)
    adapter = make(base, "--directions", stored(tmp_path, vectors))
    merge(base, adapter, tmp_path / "out")
    bound = fold_error(torch.bfloat16 if name == "bfloat16" else torch.float32)
    before = written(base)
    for weight, (layer, after) in written(tmp_path / "out").items():
        v, W = unit(vectors[layer]), before[weight][1]
        assert ((v @ after).abs() <= bound * W.norm(dim=0)).all(), weight
        assert (v @ after).norm() <= bound * W.norm()
        assert (v @ W).norm() > 20 * bound * W.norm(), "it was there before"
        rest = W - torch.outer(v, v @ W)
        assert ((after - rest).norm(dim=0) <= bound * W.norm(dim=0)).all(), "and nothing else has changed"
    unchanged = tensors_of(base).keys() - before.keys()
    assert all(torch.equal(tensors_of(base)[other], tensors_of(tmp_path / "out")[other]) for other in unchanged)


@pytest.mark.parametrize("name", ["llama", "cohere", "biased"])
@torch.no_grad()
def test_the_merged_model_writes_nothing_along_the_direction(
    bases: dict[str, Path], make: Make, tmp_path: Path, name: str
) -> None:
    """One direction for all layers, in the outputs of the running model, biases included."""
    vector = directions()
    merge(bases[name], make(bases[name], "--directions", stored(tmp_path, vector)), tmp_path / "out")
    v, shares = unit(vector).float(), {}
    for folder in (bases[name], tmp_path / "out"):
        model = load_model(folder)
        seen: list[float] = []
        for module_name, module in model.named_modules():
            if module_name.endswith(("down_proj", "o_proj")):
                # Relative to what the products are made of: |W|·|x| + |b| bounds every partial sum.
                def hook(module: Any, inputs: Any, output: Tensor, seen: list[float] = seen) -> None:
                    size = inputs[0].abs() @ module.weight.abs().T + (0 if module.bias is None else module.bias.abs())
                    seen.append(float(((output @ v).abs() / size.norm(dim=-1)).max()))

                module.register_forward_hook(hook)
        model(token_ids())
        assert len(seen) == 2 * LAYERS
        shares[folder.name] = max(seen)
    # The fold's error, and the sums of the model's own product (64 terms) and of the comparison (32 terms).
    assert shares["out"] <= fold_error(torch.float32) + (64 + 32) * 2**-24
    assert shares[name] > 1e-2


def test_householder_mirrors_and_twice_is_the_identity(bases: dict[str, Path], make: Make, tmp_path: Path) -> None:
    base, vectors = bases["llama"], directions(LAYERS)
    adapter = make(base, "--directions", stored(tmp_path, vectors), kind="householder")
    merge(base, adapter, tmp_path / "once")
    merge(tmp_path / "once", adapter, tmp_path / "twice")
    before, once, twice = written(base), written(tmp_path / "once"), written(tmp_path / "twice")
    bound = fold_error(torch.float32, strength=2)
    for name, (layer, W) in before.items():
        v, length = unit(vectors[layer]), W.norm(dim=0)
        assert ((v @ once[name][1] + v @ W).abs() <= bound * length).all(), "the component along v changes its sign"
        assert ((once[name][1].norm(dim=0) - length).abs() <= bound * length).all(), "a reflection keeps lengths"
        assert (once[name][1] - W).norm() > 0.1 * W.norm()
        assert ((twice[name][1] - W).norm(dim=0) <= 2 * bound * length).all()


def test_a_factor_takes_off_a_part(bases: dict[str, Path], make: Make, tmp_path: Path) -> None:
    base, vectors = bases["llama"], directions(LAYERS)
    file, bound = stored(tmp_path, vectors), fold_error(torch.float32)
    merge(base, make(base, "--directions", file, "--factor", 0.25), tmp_path / "out")
    for name, (layer, after) in written(tmp_path / "out").items():
        W, v = written(base)[name][1], unit(vectors[layer])
        assert ((v @ after - 0.75 * (v @ W)).abs() <= bound * W.norm(dim=0)).all()
    half = make(base, "--directions", file, "--factor", 0.5, kind="householder", output="half")
    whole = make(base, "--directions", file, output="whole")
    tensors = tensors_of(whole)
    assert tensors
    assert all(torch.equal(tensors[name], tensor) for name, tensor in tensors_of(half).items())


@pytest.mark.parametrize("kind", ["abliteration", "householder"])
def test_several_directions_act_on_their_span(bases: dict[str, Path], make: Make, tmp_path: Path, kind: str) -> None:
    """Three that are far from orthogonal. The projector by the pseudo-inverse, not by QR."""
    vectors = directions(LAYERS, 3)
    vectors[:, 1] = vectors[:, 0] + 0.1 * vectors[:, 1]
    adapter = make(bases["llama"], "--directions", stored(tmp_path, vectors), "--layers", "1:2", kind=kind)
    assert {pair.A.shape for pair in load_adapter(adapter).pairs.values()} == {(3, D)}
    merge(bases["llama"], adapter, tmp_path / "out")
    strength = 1 if kind == "abliteration" else 2
    before = written(bases["llama"])
    for name, (layer, after) in written(tmp_path / "out").items():
        W = before[name][1]
        V = torch.from_numpy(vectors[layer])
        projector = torch.linalg.pinv(V) @ V if layer in (1, 2) else torch.zeros(D, D, dtype=torch.float64)
        right = W - strength * projector @ W
        # Each of three directions has a bound of its own; they add up as one vector's errors would.
        assert ((after - right).norm(dim=0) <= 3 * fold_error(torch.float32, strength=2) * W.norm(dim=0)).all()


@torch.no_grad()
def test_stock_peft_loads_it_and_computes_what_the_fold_does(
    bases: dict[str, Path], make: Make, tmp_path: Path
) -> None:
    adapter = make(bases["llama"], "--directions", stored(tmp_path, directions(LAYERS)), kind="householder")
    merge(bases["llama"], adapter, tmp_path / "out")
    adapted = PeftModel.from_pretrained(load_model(bases["llama"]), str(adapter)).eval()
    ids = token_ids()
    theirs, folded, plain = (m(ids).logits for m in (adapted, load_model(tmp_path / "out"), load_model(bases["llama"])))
    scale = plain.abs().max()
    # fp32 in another order, through four layers with sums of 64: about 4·64·2⁻²⁴ = 1.5e-5 of the largest.
    assert (theirs - folded).abs().max() <= 2e-5 * scale
    assert (theirs - plain).abs().max() > 1e-2 * scale


def test_what_the_folder_says(bases: dict[str, Path], make: Make, tmp_path: Path) -> None:
    folder = make(bases["biased"], "--directions", stored(tmp_path, directions()), "--layers", "0:2", "--factor", -0.5)
    adapter = load_adapter(folder)
    assert (adapter.kind, adapter.moves_bias, adapter.base_model) == ("multiplicative_lora", True, "biased")
    assert len(adapter.pairs) == 6
    assert {pair.scaling for pair in adapter.pairs.values()} == {1.0}
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "MULTIPLICATIVE_LORA"
    file = make(bases["llama"], "--directions", stored(tmp_path, directions()), output="plain") / "adapter_config.json"
    assert json.loads(file.read_text())["peft_type"] == "PEANUT"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--factor", "0"], "would change nothing"),
        (["--factor", "inf", "--layers-at-once", "0"], "(?s)--factor inf.*--layers-at-once 0"),
        (["--save-directions", "x.safetensors"], "are in a file already"),
        (["--layers", "2:4"], "'2:4': the model has layers 0 to 3"),
        (["--layers", ""], "--layers '': write layers as"),
        (["--layers", "2:1"], "'2:1' runs backwards"),
        (["--direction-layer", "4"], "--direction-layer 4: the model has layers 0 to 3"),
        (["--target-modules", "up_proj"], "up_proj gives 64 numbers, not the hidden size 32"),
        (["--target-modules", "down_porj"], "no linear module 'down_porj'"),
    ],
)
def test_requests_that_cannot_be_carried_out(
    bases: dict[str, Path], make: Make, tmp_path: Path, arguments: list[str], said: str
) -> None:
    file = stored(tmp_path, directions())
    with pytest.raises(UserError, match=said) as caught:
        make(bases["llama"], "--directions", file, *arguments)
    assert caught.value.exit_code == 2
    assert list(files_of(tmp_path)) == [file.name]


def test_a_norm_behind_the_target_modules_is_told(
    bases: dict[str, Path], make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = stored(tmp_path, directions())
    make(bases["cohere"], "--directions", file, output="cohere")
    assert not capsys.readouterr().err
    make(save_base(tmp_path / "base", "gemma2"), "--directions", file, output="gemma2")
    assert "a norm (post_feedforward_layernorm) stands between" in capsys.readouterr().err


def test_a_direction_leaves_what_a_mixtures_experts_write(make: Make, tmp_path: Path) -> None:
    """Each expert's own matrix; 'down_proj' means them too."""
    mixtures.save_mixture(tmp_path / "base", "mixtral")
    vectors = directions(mixtures.LAYERS)
    file = stored(tmp_path, vectors)
    adapter = make(tmp_path / "base", "--directions", file, "--target-modules", "experts")
    merge(tmp_path / "base", adapter, tmp_path / "out")
    before, after = tensors_of(tmp_path / "base"), tensors_of(tmp_path / "out")
    written_by = {name for name in before if name.endswith(".w2.weight")}
    assert len(written_by) == mixtures.LAYERS * 4
    for name in written_by:
        v, W = unit(vectors[int(name.split(".")[2])]), before[name].double()
        assert ((v @ after[name].double()).abs() <= fold_error(torch.float32) * W.norm(dim=0)).all(), name
        assert (v @ W).norm() > 20 * fold_error(torch.float32) * W.norm()
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - written_by)
    same = make(tmp_path / "base", "--directions", file, "--target-modules", "down_proj", output="same")
    assert files_of(same)["adapter_model.safetensors"] == files_of(adapter)["adapter_model.safetensors"]


def test_an_output_with_something_in_it_is_replaced_only_by_force(
    bases: dict[str, Path], make: Make, tmp_path: Path
) -> None:
    file = stored(tmp_path, directions())
    first = files_of(make(bases["llama"], "--directions", file))
    with pytest.raises(UserError, match="not empty"):
        make(bases["llama"], "--directions", file, kind="householder")
    assert files_of(tmp_path / "adapter") == first
    assert files_of(make(bases["llama"], "--directions", file, "--force", kind="householder")) != first


@pytest.mark.slow
def test_the_command_ends_with_one_message_and_code_2(bases: dict[str, Path], tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "make_adapter.py"),
        "--input",
        str(bases["llama"]),
        "--kind",
        "abliteration",
        "--output",
        str(tmp_path / "out"),
        "--directions",
        str(tmp_path / "v.pt"),
    ]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: --directions: there is no file")
    assert "Traceback" not in ended.stderr
    assert not files_of(tmp_path)
