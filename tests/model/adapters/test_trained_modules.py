"""Modules trained in full beside the adapter: which they are, their gradients, what is refused, what the planner counts.

Oracles: the unsplit Hugging Face model with the same adapter as hooks and autograd through its own logits (helpers/unsplit.py),
and counts by hand.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline.kernels.cross_entropy import LogitTransform
from torch import Tensor, nn

from pipeline.config import loading
from pipeline.console import UserError
from pipeline.model import neftune
from pipeline.model.adapters import full as trained_modules
from pipeline.model.adapters.base import trainable
from pipeline.model.adapters.multiplicative import inject_multiplicative
from pipeline.model.fusion import apply as fusion
from pipeline.model.memory import activation
from pipeline.model.memory.levels import ActivationPolicy, RecomputeLevel
from pipeline.model.stage import Stage, empty_model, tied_head
from pipeline.objectives.language_modelling import token_losses
from pipeline.training.optim.inner import bytes_per_parameter
from pipeline.training.start import plan as planned
from pipeline.training.start import resolve
from pipeline.training.start.resolved import Resolved
from tests.helpers import unsplit
from tests.helpers.builders import VOCABULARY, model_config, save_model
from tests.helpers.configs import problems, small
from tests.helpers.stages import chain, token_ids

NAMES = ["embed_tokens", "input_layernorm", "post_attention_layernorm", "norm"]
# Gradients of a sum of 46 losses, through four layers of some forty operations each in fp32, one order of rounding
# against another: tests/helpers/unsplit.py derives 200 units for a whole model.
TOLERANCE = 200 * 2**-24
CUTS = ([0, 4], [0, 2, 4], [0, 1, 3, 4])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Llama whose head is its own, and one whose head is its embedding; norms are not all ones."""
    root = tmp_path_factory.mktemp("models")
    for kind, tied in (("untied", False), ("tied", True)):
        model = save_model(root / kind, "llama", tie_word_embeddings=tied)
        g = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.copy_(1 + 0.2 * torch.randn(parameter.shape, generator=g))
        model.save_pretrained(root / kind)
    return {kind: root / kind for kind in ("untied", "tied")}


def targets_of(layers: tuple[int, ...] = (1, 2)) -> list[str]:
    return [f"model.layers.{i}.mlp.down_proj" for i in layers]


def stages_with(folder: Path, cuts: list[int], names: list[str]) -> list[Stage]:
    """Stages in training, with a multiplicative adapter that does something and `names` free to train."""
    stages = chain(folder, cuts)
    in_full = trained_modules.resolve(
        meta_model("llama", tie_word_embeddings=folder.name == "tied"), names, targets_of()
    )
    for stage in stages:
        inject_multiplicative(stage.train(), targets_of(), 4, 8.0, 0.0, torch.float32, 42)
        trained_modules.unfreeze(stage, in_full)
        with torch.no_grad():
            for name, parameter in trainable(stage).items():
                if name.endswith(".B"):
                    parameter.copy_(
                        0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
                    )
    return stages


def meta_model(kind: str, **changes: Any) -> Any:
    return empty_model(model_config(kind, 4, **changes), torch.float32, None)


def gradients(stages: list[Stage], ids_BT: Tensor) -> dict[str, Tensor]:
    """Of the summed loss; a tied weight's is the sum of both ends'."""
    positions = torch.arange(ids_BT.shape[1]).expand_as(ids_BT)
    carried: Any = (ids_BT, positions)
    for stage in stages:
        carried = stage(carried)
    token_losses(carried, ids_BT, stages[-1].head, LogitTransform()).sum().backward()
    found: dict[str, Tensor] = {}
    for stage in stages:
        assert all(p.grad is None for p in stage.parameters() if not p.requires_grad)
        for name, parameter in trainable(stage).items():
            own = (
                "model.embed_tokens.weight"
                if name == "lm_head.weight" and stage.model.config.tie_word_embeddings
                else name
            )
            assert parameter.grad is not None, name
            found[own] = found.get(own, 0) + parameter.grad
    return found


def of_the_whole_model(
    folder: Path, adapter: dict[str, Tensor], names: set[str], ids_BT: Tensor, noise: Any = 0
) -> dict[str, Tensor]:
    """The same by transformers, autograd and PyTorch's cross-entropy."""
    model = unsplit.load(folder)
    leaves = unsplit.with_multiplicative(model, adapter, 2.0)
    own = {n: p for n, p in model.named_parameters() if n in names}
    for parameter in own.values():
        parameter.requires_grad_(True)
    model.model.embed_tokens.register_forward_hook(lambda _m, _x, output: output + noise)
    sum(unsplit.summed_loss(model, row, 1.0) for row in ids_BT).backward()  # type: ignore[union-attr]
    return {name: leaf.grad for name, leaf in {**leaves, **own}.items()}  # type: ignore[misc]


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert unsplit.size(gradient) > 0, name
        assert unsplit.size(found[name] - gradient) <= TOLERANCE * unsplit.size(gradient), name


# Which modules


def test_names_are_whole_parts_and_in_every_layer() -> None:
    model = meta_model("llama")
    resolve = trained_modules.resolve
    assert resolve(model, ["norm"], []) == ["model.norm.weight"]
    assert resolve(model, ["model.norm", "norm"], []) == ["model.norm.weight"]
    assert resolve(model, ["layers.2.input_layernorm"], []) == ["model.layers.2.input_layernorm.weight"]
    found = resolve(model, ["norm", "input_layernorm", "embed_tokens"], targets_of((3,)))
    assert found == [
        "model.embed_tokens.weight",
        *(f"model.layers.{i}.input_layernorm.weight" for i in range(4)),
        "model.norm.weight",
    ]
    assert resolve(model, ["self_attn"], [])[:2] == [f"model.layers.0.self_attn.{m}_proj.weight" for m in "qk"]
    assert resolve(model, ["lm_head"], []) == ["lm_head.weight"]
    assert resolve(model, [], []) == []


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_naming_one_of_a_tied_pair_names_both(name: str) -> None:
    found = trained_modules.resolve(meta_model("cohere"), [name], [])
    assert found == ["model.embed_tokens.weight", "lm_head.weight"]
    assert tied_head(meta_model("cohere")) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert tied_head(meta_model("llama")) == {}


def test_the_first_layer_with_a_gradient() -> None:
    model = meta_model("llama")
    of = lambda *names: trained_modules.first_layer(model, trained_modules.resolve(model, names, []))  # noqa: E731
    assert of("embed_tokens", "norm") == 0
    assert of("layers.2.input_layernorm") == 2
    assert of("norm", "lm_head") == 4 == of()


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        (
            "llama",
            "layernorm",
            "no module 'layernorm'; those with weights are down_proj, embed_tokens, gate_proj, input_",
        ),
        ("llama", "model.norm.weight", "no module 'model.norm.weight'"),
        ("llama", "", "no module ''"),
        ("llama", "act_fn", "'act_fn' (model.layers.0.mlp.act_fn) has no weights to train"),
        ("llama", "down_proj", "in which model.layers.1.mlp.down_proj has an adapter"),
        ("llama", "mlp", "'mlp' names model.layers.1.mlp, in which model.layers.1.mlp.down_proj has an adapter"),
        ("llama", "model", "has an adapter"),
        (
            "mixtral",
            "experts",
            "stores model.layers.0.mlp.experts.gate_up_proj of model_type 'mixtral' in another form",
        ),
        ("mixtral", "gate", "stores model.layers.0.mlp.gate.weight of model_type 'mixtral'"),
    ],
)
def test_what_cannot_be_trained_in_full_is_refused(kind: str, name: str, said: str) -> None:
    targets = targets_of() if kind == "llama" else []
    with pytest.raises(UserError) as caught:
        trained_modules.resolve(meta_model(kind), ["norm", name], targets)
    assert said in str(caught.value)
    assert str(caught.value).startswith("trainable_modules: ")


def test_of_a_mixture_what_is_stored_as_it_runs_is_trained() -> None:
    assert len(trained_modules.resolve(meta_model("mixtral"), ["input_layernorm", "norm"], [])) == 5
    assert len(trained_modules.resolve(meta_model("qwen3_moe"), ["gate"], [])) == 4


def test_keys_that_contradict_it() -> None:
    (line,) = problems(small(full_fine_tune=True, lora_rank=None, lora_alpha=None, trainable_modules=["norm"]))
    assert line.startswith("trainable_modules: has no meaning with full_fine_tune = true")
    (line,) = problems(small(modules_to_save=["norm"]))
    assert "trainable_modules" in line


def plan(folder: Path, **changes: Any) -> tuple[Any, Resolved]:
    settings = {"model": str(folder), "layers_to_transform": "2:3", "model_weight_dtype": "float32", **changes}
    config = loading.validate(small(**settings), "x.toml")
    return config, resolve.resolve(config)


def test_a_run_says_what_is_trained_in_full(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    _, made = plan(folders["tied"], trainable_modules=NAMES)
    assert made.trained.targets == targets_of((2, 3))
    assert len(made.trained.in_full) == 2 + 4 + 4 + 1
    count = VOCABULARY * 32 + 9 * 32
    said = "embed_tokens (head and embedding are one), 4 × input_layernorm, 4 × post_attention_layernorm, norm"
    assert f"and in full, in float32: {said}: {count:,} parameters" in capsys.readouterr().out


def test_a_quantised_weight_is_refused_and_an_embedding_beside_it_is_not(folders: dict[str, Path]) -> None:
    four = {"quantization": {"bnb": {"load_in_4bit": True}}}
    with pytest.raises(UserError, match=r"'o_proj' names .*o_proj, whose weight is quantised"):
        plan(folders["tied"], trainable_modules=["o_proj"], **four)
    kept = {"quantization": {"bnb": {"load_in_4bit": True, "llm_int8_skip_modules": ["o_proj"]}}}
    assert len(plan(folders["tied"], trainable_modules=["o_proj"], **kept)[1].trained.in_full) == 4
    assert len(plan(folders["tied"], trainable_modules=NAMES, **four)[1].trained.in_full) == 11


# Gradients


@pytest.mark.parametrize("kind", ["untied", "tied"])
@pytest.mark.parametrize("names", [NAMES, ["lm_head", "norm", "o_proj"]], ids=["embedding", "head"])
def test_gradients_are_those_of_the_whole_model_on_any_number_of_stages(
    folders: dict[str, Path], kind: str, names: list[str]
) -> None:
    ids = token_ids()
    one = stages_with(folders[kind], [0, 4], names)
    trained = trainable(one[0])
    adapter = {n: p.detach().clone() for n, p in trained.items() if n.endswith((".A", ".B"))}
    in_full = trained.keys() - adapter.keys()
    assert len(in_full) == {"embed_tokens": 10, "lm_head": 6}[names[0]]
    assert len(adapter) == 4
    expected = of_the_whole_model(folders[kind], adapter, set(in_full), ids)
    for cuts in CUTS:
        assert_close(gradients(stages_with(folders[kind], cuts, names), ids), expected)


@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_noise_on_a_trained_embedding_leaves_its_gradient_right(folders: dict[str, Path], kind: str) -> None:
    """NEFTune adds a constant as far as the gradient is concerned, here on the second of three stages' sides too."""
    ids, names = token_ids(1), NAMES
    stages = stages_with(folders[kind], [0, 1, 3, 4], names)
    neftune.apply(stages[0], 5.0)
    caught: list[Tensor] = []
    stages[0].model.base_model.layers[0].register_forward_pre_hook(lambda _, given: caught.append(given[0].detach()))
    torch.manual_seed(1)
    found = gradients(stages, ids)
    noise = caught[0] - nn.functional.embedding(ids, stages[0].model.get_input_embeddings().weight.detach())
    assert 0.05 < float(noise.abs().max()) < 5 / (24 * 32) ** 0.5 * 1.001
    trained = {name: p.detach() for stage in stages for name, p in trainable(stage).items()}
    adapter = {n: p for n, p in trained.items() if n.endswith((".A", ".B"))}
    assert_close(found, of_the_whole_model(folders[kind], adapter, set(found) - set(adapter), ids, noise))


@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_our_kernels_give_the_same_gradients(folders: dict[str, Path], kind: str) -> None:
    ids = token_ids()
    expected = gradients(stages_with(folders[kind], [0, 2, 4], NAMES), ids)
    stages = stages_with(folders[kind], [0, 2, 4], NAMES)
    taken = sum(
        (fusion.apply(stage, frozenset(fusion.KERNELS)) for stage in stages),
        start=type(fusion.apply(stages[0], frozenset()))(),
    )
    assert taken["norm"] == 9
    assert taken["multiplicative"] == 2
    assert taken["swiglu"] == 2
    assert_close(gradients(stages, ids), expected)


@pytest.mark.parametrize(
    "level", [RecomputeLevel.INPUT, RecomputeLevel.ADAPTER, RecomputeLevel.ATTENTION, RecomputeLevel.PROJECTIONS]
)
@pytest.mark.parametrize("names", [NAMES, ["o_proj", "gate_proj", "norm"]], ids=["norms", "matrices"])
def test_recomputation_changes_no_bit(folders: dict[str, Path], level: RecomputeLevel, names: list[str]) -> None:
    """Also where the trained matrix's own product is one that need not run again."""
    ids = token_ids()
    expected = gradients(stages_with(folders["tied"], [0, 2, 4], names), ids)
    stages = stages_with(folders["tied"], [0, 2, 4], names)
    for stage in stages:
        activation.apply(
            stage, dict.fromkeys(stage.layers, ActivationPolicy(level)), gradients_enter=not stage.is_first
        )
    found = gradients(stages, ids)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# What the planner counts


@pytest.mark.slow
def test_the_planner_counts_what_is_trained_in_full(folders: dict[str, Path]) -> None:
    """To the byte: weights that are trained, their fp32 sums and the optimizer's state; and where backward ends."""
    keys = {"optimizer": {"type": "adamw_kahan", "lr": 1e-5}, "model_weight_dtype": "bfloat16"}
    _, made = plan(folders["tied"], trainable_modules=NAMES, **keys)
    _, bare = plan(folders["tied"], **keys)
    with_full = planned.costs(made, [RecomputeLevel.EVERYTHING], False)(64)
    without = planned.costs(bare, [RecomputeLevel.EVERYTHING], False)(64)
    each = bytes_per_parameter("adamw_kahan", 2)
    assert with_full.embedding_trained_bytes == VOCABULARY * 32 * each
    assert with_full.embedding_bytes == 0
    for ours, theirs in zip(with_full.layers, without.layers, strict=True):
        assert ours.trained_bytes - theirs.trained_bytes == 2 * 32 * each
        assert theirs.weight_bytes - ours.weight_bytes == 2 * 32 * 2
    assert with_full.head.trained_bytes == (VOCABULARY * 32 + 32) * each
    assert (with_full.first_trained, without.first_trained) == (0, 2)
    assert with_full.layers[0].backward.flops > 0 == without.layers[0].backward.flops


def test_work_of_trained_matrices_is_counted_in_the_cut() -> None:
    """2 operations a weight and token more for its gradient; below the first layer with any, no backward."""
    from pipeline.planning import formula

    model = meta_model("llama")

    def cost(*names: str, first: int = 4) -> formula.Costs:
        in_full = [model.get_parameter(name) for name in trained_modules.resolve(model, names, [])]
        return formula.costs(model, first_trained=first, recompute=False, sequence_len=8, in_full=in_full)

    bare = cost().layers[0]
    found = cost("layers.2.mlp.gate_proj", "lm_head", first=2)
    assert found.layers == [bare, bare, 2 * bare + 2 * 32 * 64, 2 * bare]
    assert found.head == 3 * 2 * 32 * VOCABULARY
