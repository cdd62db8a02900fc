"""The fold of DoRA, IA³, OFT, BOFT and HRA: stock PEFT's merge and forward, and dense fp64 by hand, as oracles."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pipeline.artifacts.adapter import maps as weight_maps
from pipeline.artifacts.adapter.read import load_adapter
from pipeline.artifacts.fold import rows as fold_rows
from pipeline.artifacts.fold.merge import merge
from pipeline.artifacts.fold.plan import plan_fold
from pipeline.artifacts.fold.reference import recomputed
from pipeline.console import UserError
from pipeline.formats.base_model import read_base
from tests.helpers.artifacts import bytes_of, down_proj, fold64, load_model, logits, multiplicative, tensors_of
from tests.helpers.families import CONFIGS, TARGETS, by_peft, dense, loud_base, stored

pytestmark = pytest.mark.usefixtures("small_blocks")

# As in test_merge.py: logits of about 1 in fp32, and weights of about 1 changed by sums of some 50 products.
LOGIT_TOLERANCE, WEIGHT_TOLERANCE = 1e-5, 5e-6
FAMILIES = [case for case in CONFIGS if case != "lora"]
PLAIN = ["dora", "ia3", "oft", "boft", "hra"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With biases on every linear layer."""
    return loud_base(tmp_path_factory.mktemp("models") / "base", mlp_bias=True, attention_bias=True)


@pytest.fixture(scope="module")
def cohere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return loud_base(tmp_path_factory.mktemp("models") / "base", "cohere")


def modules_of(base: Path) -> list[str]:
    names = [name.removesuffix(".weight") for name in tensors_of(base)]
    return [name for name in names if name.rpartition(".")[2] in TARGETS]


def by_hand(base: Path, made: list[tuple[str, Path]], modules: list[str] | None = None) -> dict[str, torch.Tensor]:
    """All tensors in fp64 after the adapters in their order; 'multiplicative' is our own, with s = 1.5."""
    found = {name: tensor.double() for name, tensor in tensors_of(base).items()}
    for module in modules or modules_of(base):
        W, b = found[f"{module}.weight"], found.get(f"{module}.bias")
        for case, folder in made:
            t = stored(folder, module)
            if case == "multiplicative" and t:
                A, B = t["peanut_A.weight"], t["peanut_B.weight"]
                W = torch.from_numpy(fold64(W.numpy(), A, B, 1.5, multiplicative=True))
                b = None if b is None else b + 1.5 * B @ (A @ b)
            elif t:
                W, b = dense(case, t, W, b)
        found[f"{module}.weight"] = W
        if b is not None:
            found[f"{module}.bias"] = b
    return found


def check(base: Path, out: Path, expected: dict[str, torch.Tensor], tolerance: float = WEIGHT_TOLERANCE) -> None:
    found, before = tensors_of(out), tensors_of(base)
    assert found.keys() == before.keys()
    for name, tensor in found.items():
        assert (tensor.double() - expected[name]).abs().max() < tolerance, name
    assert any((tensor - before[name]).abs().max() > 1e-2 for name, tensor in found.items())


@pytest.mark.parametrize("family", ["llama", "cohere"])
@pytest.mark.parametrize("case", FAMILIES)
def test_the_fold_is_pefts_merge_and_its_forward(request, tmp_path: Path, family: str, case: str) -> None:
    base = request.getfixturevalue(family)
    model = by_peft(base, tmp_path / "adapter", case)
    with torch.no_grad():
        live = logits(model)
    merge(base, tmp_path / "adapter", tmp_path / "out")
    merged = model.merge_and_unload()
    check(base, tmp_path / "out", {name: t.double() for name, t in merged.state_dict().items()})
    assert (logits(load_model(tmp_path / "out")) - live).abs().max() < LOGIT_TOLERANCE
    assert (logits(load_model(base)) - live).abs().max() > 1e-2


@pytest.mark.parametrize("case", PLAIN)
def test_the_fold_is_the_formula_in_fp64(llama: Path, tmp_path: Path, case: str) -> None:
    by_peft(llama, tmp_path / "adapter", case)
    merge(llama, tmp_path / "adapter", tmp_path / "out")
    check(llama, tmp_path / "out", by_hand(llama, [(case, tmp_path / "adapter")]), 2e-6)


ORDERS = [
    ["dora", "multiplicative"],
    ["multiplicative", "dora"],
    ["ia3", "multiplicative", "oft"],
    ["hra", "lora", "boft"],
    ["multiplicative", "lora", "ia3", "multiplicative", "dora"],
    ["dora", "dora"],
]


@pytest.mark.parametrize("cases", ORDERS, ids=" ".join)
def test_mixed_families_in_order(llama: Path, tmp_path: Path, cases: list[str], capsys: pytest.CaptureFixture) -> None:
    """Each sees the weight as the one before left it; the opposite order is another result."""
    for n, case in enumerate(cases):
        if case == "multiplicative":
            multiplicative(tmp_path / f"{n}", seed=n)
        else:
            by_peft(llama, tmp_path / f"{n}", case, seed=n)
    made = [(case, tmp_path / f"{n}") for n, case in enumerate(cases)]
    figures = merge(llama, [folder for _, folder in made], tmp_path / "out")
    expected = by_hand(llama, made)
    check(llama, tmp_path / "out", expected)
    assert "; W' = " in capsys.readouterr().out
    down = next(figure for figure in figures if figure.name == "model.layers.1.mlp.down_proj.weight")
    before = tensors_of(llama)[down.name].double()
    assert sorted(down.parts) == list(range(len(cases)))
    for n in range(len(cases)):  # each adapter's own change, in fp64
        first, last = (by_hand(llama, made[:end])[down.name] for end in (n, n + 1))
        assert down.share(n) == pytest.approx(float((last - first).norm() / before.norm()), rel=1e-5)
    if cases != cases[::-1]:
        other = by_hand(llama, made[::-1])
        assert max((other[name] - tensor).abs().max() for name, tensor in expected.items()) > 1e-3


@pytest.fixture(scope="module")
def every(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One adapter of each kind."""
    folder = tmp_path_factory.mktemp("every")
    for case in [*PLAIN, "lora"]:
        by_peft(llama, folder / case, case)
    multiplicative(folder / "multiplicative")
    return {case: folder / case for case in [*PLAIN, "lora", "multiplicative"]}


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_blocks_of_any_size_give_the_same_rows(llama: Path, every: dict[str, Path], data: st.DataObject) -> None:
    """Any adapters in any order, cut anywhere: the rows of W' in fp64 by hand, and the bound of the check holds."""
    cases = data.draw(st.lists(st.sampled_from(list(every)), min_size=1, max_size=4))
    module = data.draw(st.sampled_from(list(down_proj())))
    made = [(case, every[case]) for case in cases]
    plan = plan_fold(read_base(llama), [load_adapter(folder) for _, folder in made], scales=[1.0] * len(cases))
    change = plan.changes[f"{module}.weight"]
    expected = by_hand(llama, made, [module])[f"{module}.weight"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fold_rows, "BLOCK_ITEMS", data.draw(st.integers(1, 2000)))
        rows = [after for _, after in fold_rows.fold_rows(change, "F32", torch.device("cpu"), fold_rows.Survival("x"))]
    found = torch.cat(rows).double()
    assert (found - expected).abs().max() < WEIGHT_TOLERANCE
    numbers = data.draw(st.lists(st.integers(0, 31), min_size=1, max_size=8, unique=True))
    before = tensors_of(llama)[change.tensor.name].double()
    exact, bound = recomputed(change, before[numbers], numbers, data.draw(st.integers(1, 2000)))
    assert (exact - expected[numbers]).abs().max() < 1e-12 * 48
    assert ((found[numbers] - exact).abs() <= bound + 2.0**-24 * exact.abs()).all()
    assert bound.max() < 1e-2 * len(cases)  # it grows with each map, and is not so wide that it says nothing


@pytest.mark.parametrize("case", PLAIN)
@pytest.mark.parametrize("base_quant", [None, "nf4"])
def test_layers_dtypes_and_4_bits(llama: Path, tmp_path: Path, case: str, base_quant) -> None:
    by_peft(llama, tmp_path / "adapter", case)
    figures = merge(
        llama, tmp_path / "adapter", tmp_path / "out", layers="1:2", dtype="bfloat16", base_quant=base_quant
    )
    assert {figure.name.split(".")[2] for figure in figures} == {"1", "2"}
    assert all(0.9 < figure.gain < 1.1 for figure in figures)
    merge(llama, multiplicative_of_nothing(tmp_path), tmp_path / "plain", dtype="float32", base_quant=base_quant)
    quantised = tensors_of(tmp_path / "plain")
    found = tensors_of(tmp_path / "out")
    for module in modules_of(llama):
        W, b = quantised[f"{module}.weight"].double(), quantised[f"{module}.bias"].double()
        if ".layers.0." not in module:
            W, _ = dense(case, stored(tmp_path / "adapter", module), W, b)
        difference = (found[f"{module}.weight"].double() - W).abs()
        assert (difference <= 2.0**-8 * W.abs() + 1e-6).all()


def multiplicative_of_nothing(folder: Path) -> Path:
    multiplicative(folder / "nothing", size=0.0)
    return folder / "nothing"


@pytest.mark.parametrize("case", [case for case in FAMILIES if not case.startswith("dora")])
def test_unmerge_gives_the_base_back(llama: Path, tmp_path: Path, case: str) -> None:
    """κ is 1 for reflections and exact rotations, near 1 for series; l is 1 ± 0.1·N(0, 1)."""
    by_peft(llama, tmp_path / "adapter", case)
    merge(llama, tmp_path / "adapter", tmp_path / "merged")
    merge(tmp_path / "merged", tmp_path / "adapter", tmp_path / "back", unmerge=True)
    for name, tensor in tensors_of(llama).items():
        assert (tensors_of(tmp_path / "back")[name] - tensor).abs().max() < 3e-6, name


def test_several_families_are_taken_out_in_the_opposite_order(llama: Path, tmp_path: Path) -> None:
    cases = ["ia3", "oft", "boft", "hra"]
    for n, case in enumerate(cases):
        by_peft(llama, tmp_path / f"{n}", case, seed=n)
    multiplicative(tmp_path / "4", seed=4)
    folders = [tmp_path / f"{n}" for n in range(5)]
    merge(llama, folders, tmp_path / "merged")
    merge(tmp_path / "merged", folders, tmp_path / "back", unmerge=True)
    merge(tmp_path / "merged", folders[::-1], tmp_path / "wrong", unmerge=True)
    distances = [
        max((tensors_of(tmp_path / there)[name] - tensor).abs().max() for name, tensor in tensors_of(llama).items())
        for there in ("back", "wrong")
    ]
    assert distances[0] < 1e-5
    assert distances[1] > 1e-2


@pytest.mark.parametrize("case", [case for case in FAMILIES if not case.startswith("dora")])
def test_condition_numbers_against_dense_maps(llama: Path, tmp_path: Path, case: str) -> None:
    """Of what W is multiplied by from the right, by numpy; row factors multiply another, of their own."""
    by_peft(llama, tmp_path / "adapter", case, size=0.3)
    for module, maps in load_adapter(tmp_path / "adapter").maps.items():
        rows, columns = tensors_of(llama)[f"{module}.weight"].shape
        for one in maps:
            assert one.misfit(rows, columns) is None
            size = rows if isinstance(one, weight_maps.RowFactors) else columns
            # Dense, and through fp32: a relative 2⁻²⁴ of each value, times the condition number.
            full = np.array(one.on(torch.device("cpu"))(torch.eye(size), 0), dtype=np.float64)
            undone = one.undone()
            assert undone is not None
            back = np.array(undone.on(torch.device("cpu"))(torch.eye(size), 0), dtype=np.float64)
            assert one.condition() == pytest.approx(np.linalg.cond(full), rel=1e-5)
            assert np.abs(full @ back - np.eye(size)).max() < 1e-6 * np.linalg.cond(full)


def refused(words: str, base: Path, adapters: Path | list[Path], out: Path, **asked) -> None:
    with pytest.raises(UserError, match=words) as caught:
        merge(base, adapters, out, **asked)
    assert caught.value.exit_code == 2
    assert not out.exists()


def test_what_has_no_inverse_is_refused(llama: Path, tmp_path: Path) -> None:
    by_peft(llama, tmp_path / "dora", "dora")
    refused("is a dora adapter, which gives every row a length", llama, tmp_path / "dora", tmp_path / "o", unmerge=True)
    by_peft(llama, tmp_path / "ia3", "ia3")
    file = tmp_path / "ia3" / "adapter_model.safetensors"
    for value, said in ((0.0, "condition number inf, as its factors are between 0 and"), (1e-7, "condition number 1")):
        tensors = load_file(file)
        tensors["base_model.model.model.layers.1.mlp.down_proj.ia3_l"][0, 5] = value
        save_file(tensors, file)
        words = rf"out of 1 of 9 modules. Worst is model.layers.1.mlp.down_proj: .*{said}"
        refused(words, llama, tmp_path / "ia3", tmp_path / "o", unmerge=True)
    merge(llama, tmp_path / "ia3", tmp_path / "folded")  # folding it is no trouble


def test_a_strength_belongs_to_what_has_one(llama: Path, tmp_path: Path) -> None:
    by_peft(llama, tmp_path / "dora", "dora")
    merge(llama, tmp_path / "dora", tmp_path / "out", scale=0.5)
    module = "model.layers.1.mlp.down_proj"
    wanted, _ = dense(
        "dora", stored(tmp_path / "dora", module), tensors_of(llama)[f"{module}.weight"].double(), None, 0.75
    )
    assert (tensors_of(tmp_path / "out")[f"{module}.weight"].double() - wanted).abs().max() < WEIGHT_TOLERANCE
    for case in PLAIN[1:]:
        by_peft(llama, tmp_path / case, case)
        refused(f"--scale 0.5: .*a {case} adapter: it rotates or", llama, tmp_path / case, tmp_path / "o", scale=0.5)


def test_the_report_names_every_step(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for case in ("dora", "ia3"):
        by_peft(llama, tmp_path / case, case)
    merge(llama, [tmp_path / "dora", tmp_path / "ia3"], tmp_path / "out")
    said = capsys.readouterr().out
    assert "W₁ = m₁/‖W + s₁·B₁·A₁‖ ⊙ (W + s₁·B₁·A₁); W' = l₂ ⊙ W₁ in fp32" in said
    assert "dora, 9 modules, rank 4" in said
    assert "6 biases (b' = l·b)" in said
    report = json.loads((tmp_path / "out" / "fold_report.json").read_text())
    assert [entry["kind"] for entry in report["adapters"]] == ["dora", "ia3"]
    steps = {entry["name"]: entry["steps"] for entry in report["tensors"]}
    assert [s["scaling"] for s in steps["model.layers.0.mlp.down_proj.weight"]] == [1.5, None]
    assert bytes_of(tmp_path / "out").keys() == steps.keys() | bytes_of(llama).keys()
