"""The forward pass a few layers at a time, against forward hooks on the unsplit Hugging Face model: difference 0."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.console import UserError
from pipeline.model import layerwise
from pipeline.model.layerwise import mean_hidden_states, run_layerwise
from pipeline.model.stage import Stage
from pipeline.model.weights import load
from tests.helpers.builders import save_model
from tests.helpers.stages import CPU, token_ids

# cohere: parallel blocks, tied; llama; granite multiplies inputs_embeds; gemma2: windows, scaled embedding; mixtral is
# stored expert by expert.
FAMILIES: dict[str, dict[str, Any]] = {
    "cohere": {},
    "llama": {},
    "granite": {"embedding_multiplier": 3.0},
    "gemma2": {"sliding_window": 8},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
ROWS = [token_ids(1, length, seed=length)[0] for length in (24, 5, 1, 17)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Folder and whole model of each family."""
    root = tmp_path_factory.mktemp("models")
    return {kind: (root / kind, save_model(root / kind, kind, **changes)) for kind, changes in FAMILIES.items()}


def wanted(name: str) -> bool:
    """The embedding, each layer, what each writes, a norm inside it, and the last norm."""
    last = name.rsplit(".", 1)[-1]
    return last in ("embed_tokens", "o_proj", "down_proj", "input_layernorm", "norm") or last.isdigit()


@torch.no_grad()
def hooked(model: Any, rows: list[Tensor]) -> dict[tuple[int, str], Tensor]:
    """What the unsplit model's modules give for each row, by its own forward."""
    found: dict[tuple[int, str], Tensor] = {}
    for row, ids in enumerate(rows):
        handles = []
        for name, module in model.named_modules():
            if wanted(name):

                def keep(_: Any, __: Any, output: Any, key: tuple[int, str] = (row, name)) -> None:
                    found[key] = (output[0] if isinstance(output, tuple) else output)[0].clone()

                handles.append(module.register_forward_hook(keep))
        model(input_ids=ids.unsqueeze(0), use_cache=False)
        for handle in handles:
            handle.remove()
    return found


def tapped(folder: Path, rows: list[Tensor], **how: Any) -> dict[tuple[int, str], Tensor]:
    found: dict[tuple[int, str], Tensor] = {}

    def tap(row: int, name: str, output: Tensor) -> None:
        assert (row, name) not in found, "once for every row"
        found[row, name] = output.clone()

    run_layerwise(str(folder), rows, **{"modules": wanted, "tap": tap, "device": CPU, "dtype": torch.float32, **how})
    return found


@pytest.mark.parametrize("layers_at_once", [1, 3, 4])
@pytest.mark.parametrize("kind", FAMILIES)
def test_every_output_is_the_unsplit_models(models: dict, kind: str, layers_at_once: int) -> None:
    folder, whole = models[kind]
    expected, found = hooked(whole, ROWS), tapped(folder, ROWS, layers_at_once=layers_at_once)
    assert found.keys() == expected.keys()
    assert len(expected) >= 4 * (1 + 4 * 3 + 1)
    for key, right in expected.items():
        assert found[key].shape == right.shape == (len(ROWS[key[0]]), right.shape[-1]), key
        assert (found[key] - right).abs().max() == 0.0, key


@pytest.mark.parametrize("layers_at_once", [1, 2])
def test_no_more_layers_are_alive_than_asked_for(
    models: dict, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, layers_at_once: int
) -> None:
    """Counted while each row goes through: every tensor that was loaded, by its weak reference."""
    alive: weakref.WeakValueDictionary[tuple[int, str], Tensor] = weakref.WeakValueDictionary()
    groups = 0

    def counting_load(stage: Stage, folder: str, dtype: torch.dtype, device: torch.device) -> None:
        nonlocal groups
        assert not alive, f"still there while the next group is loaded: {sorted(alive)[:4]}"
        load(stage, folder, dtype, device)
        alive.update({(groups, name): p for name, p in stage.model.named_parameters()})
        groups += 1

    most: set[int] = set()

    def tap(row: int, name: str, output: Tensor) -> None:
        layers = {int(name.split(".")[2]) for _, name in alive if name.startswith("model.layers.")}
        most.add(len(layers))
        heads = [name for _, name in alive if name.startswith("lm_head")]
        embeddings = [name for _, name in alive if "embed_tokens" in name]
        assert not heads, "no head ever; the embedding with layer 0 alone"
        assert len(embeddings) == (0 in layers), "no head ever; the embedding with layer 0 alone"

    monkeypatch.setattr(layerwise, "load", counting_load)
    gc.disable()  # weights go when they are no longer needed, not when the collector next looks for cycles
    request.addfinalizer(gc.enable)
    run_layerwise(
        str(models["llama"][0]),
        ROWS,
        modules=wanted,
        tap=tap,
        layers_at_once=layers_at_once,
        device=CPU,
        dtype=torch.float32,
    )
    assert most == {layers_at_once}
    assert groups == 4 // layers_at_once
    assert not alive


@pytest.mark.parametrize(
    ("name", "groups"), [("model.embed_tokens", 1), ("model.layers.1.mlp.down_proj", 2), ("model.norm", 4)]
)
def test_layers_above_the_last_one_wanted_are_not_loaded(
    models: dict, monkeypatch: pytest.MonkeyPatch, name: str, groups: int
) -> None:
    loaded = []
    monkeypatch.setattr(
        layerwise, "load", lambda stage, *rest: (loaded.append(stage.layer_indices), load(stage, *rest))
    )
    assert {key[1] for key in tapped(models["llama"][0], ROWS, modules=name.__eq__)} == {name}
    assert loaded == [range(i, i + 1) for i in range(groups)]


def test_a_module_that_gives_a_tuple_is_tapped_for_its_first(models: dict) -> None:
    folder = models["llama"][0]
    name = "model.layers.2.self_attn"
    found = tapped(folder, ROWS[:1], modules=name.__eq__)[0, name]
    o_proj = tapped(folder, ROWS[:1])[0, f"{name}.o_proj"]
    assert torch.equal(found, o_proj)


def test_what_cannot_be_run_is_refused(models: dict) -> None:
    folder = models["llama"][0]
    for modules in (lambda name: False, "lm_head".__eq__, "model".__eq__):
        with pytest.raises(ValueError, match="no module is wanted"):
            tapped(folder, ROWS, modules=modules)
    with pytest.raises(ValueError, match="layers_at_once = 0"):
        tapped(folder, ROWS, layers_at_once=0)
    with pytest.raises(ValueError, match=r"row 1 is torch.int64 \[0\]"):
        tapped(folder, [ROWS[0], ROWS[0][:0]])
    with pytest.raises(UserError, match="token 4000, but the model's vocabulary has 320"):
        tapped(folder, [torch.tensor([3, 4000])])


def test_a_model_that_changes_what_it_is_given_is_refused(models: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Granite scales what it is given: the second group would scale the hidden state again."""
    monkeypatch.setattr("pipeline.model.structure.stand_ins.Arrival.hidden", lambda self, given: given)
    folder = models["granite"][0]
    with pytest.raises(UserError, match=r"only all 4 at once: model_type 'granite' cannot be cut"):
        tapped(folder, ROWS)
    assert tapped(folder, ROWS, layers_at_once=4)


@pytest.mark.parametrize("counted", [slice(1, None), slice(-1, None)], ids=["all but the first", "last"])
@torch.no_grad()
def test_means_are_those_of_the_unsplit_models_hidden_states(models: dict, counted: slice) -> None:
    """Against output_hidden_states, whose last entry is after the norm: so up to the last layer but one."""
    folder, whole = models["cohere"]
    sets = [[token_ids(1, n, seed=n)[0] for n in lengths] for lengths in ((24, 9), (7, 2, 11))]
    found = mean_hidden_states(
        str(folder), sets, counted=counted, layers=[0, 2], layers_at_once=2, device=CPU, dtype=torch.float32
    )
    for rows, means in zip(sets, found, strict=True):
        states = [whole(input_ids=ids.unsqueeze(0), output_hidden_states=True).hidden_states for ids in rows]
        assert list(means) == [0, 2]
        for layer, mean in means.items():
            tokens = torch.cat([each[layer + 1][0].double()[counted] for each in states])
            # Sums of the same fp64 numbers in another order: 33 of them, 2⁻⁵³ of their size each.
            assert (mean - tokens.mean(0)).abs().max() <= 64 * 2**-53 * tokens.abs().max()
            assert mean.dtype == torch.float64
            assert mean.abs().max() > 1e-2


def test_a_set_without_a_token_to_count_is_an_error(models: dict) -> None:
    with pytest.raises(ValueError, match=r"\[0, 23\] tokens"):
        mean_hidden_states(
            str(models["llama"][0]),
            [[ROWS[2]], [ROWS[0]]],
            counted=slice(1, None),
            layers=[0],
            layers_at_once=1,
            device=CPU,
            dtype=torch.float32,
        )
