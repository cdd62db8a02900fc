"""Training over a quantised base: adapters' gradients on any number of stages, every level of activation memory, real runs.

The oracle of the gradients is the same model with its weights dequantised to plain linear layers, by bitsandbytes.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.config import loading
from pipeline.console import UserError
from pipeline.model import quantized_bnb
from pipeline.model.memory import activation
from pipeline.model.memory.host_arena import HostArena
from pipeline.model.memory.levels import ActivationPolicy, RecomputeLevel
from pipeline.model.stage import Stage, empty_model, read_model_config
from pipeline.training.stage.meta_model import MetaModel
from pipeline.training.stage.spec import Trained
from pipeline.training.start import plan as planned
from pipeline.training.start import resolve
from tests.helpers import builders
from tests.helpers.quantization import NF4, adapt, build, chain, save_model, stored, theirs
from tests.helpers.stages import hidden, token_ids

EIGHT = NF4._replace(bits=8)
ADAPTED = {"multiplicative_lora": ["down_proj"], "lora": ["q_proj", "down_proj"]}
over_schemes = pytest.mark.parametrize(
    "scheme", [NF4, NF4._replace(double_quant=True), EIGHT], ids=["4", "double", "8"]
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: save_model(root / kind, kind) for kind in ("llama", "cohere")}


def gradients(stages: list[Stage], trained: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Of a fixed function of the hidden state, with the hidden state itself."""
    for parameter in trained.values():
        parameter.grad = None
    found = hidden(stages, token_ids())
    (found * torch.randn(found.shape, generator=torch.Generator().manual_seed(5))).sum().backward()
    assert all(p.grad is None for s in stages for p in s.parameters() if not p.requires_grad)
    return {"hidden": found.detach(), **{n: p.grad.clone() for n, p in trained.items() if p.grad is not None}}


def dequantised(stage: Stage) -> None:
    """In place: plain linear layers with what the quantised ones stand for."""
    for name, module in list(stage.model.named_modules()):
        if isinstance(module, bnb.nn.Linear4bit):
            weight = quantized_bnb.dequantised(module.weight.data, module.weight.quant_state)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            weight = bnb.functional.int8_vectorwise_dequant(module.weight.CB, module.weight.SCB)
        else:
            continue
        plain = nn.Linear(module.in_features, module.out_features, module.bias is not None)
        plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), module.bias
        stage.model.set_submodule(name, plain)


@over_schemes
@pytest.mark.parametrize("kind", ADAPTED)
def test_gradients_are_those_of_the_dequantised_model_on_any_number_of_stages(
    folders: dict[str, Path], kind: str, scheme: Any
) -> None:
    folder, layers = folders["llama"], [0, 1, 3]
    oracle = chain(folder, scheme, [0, 4])
    dequantised(oracle[0])
    expected = gradients(oracle, adapt(oracle, kind, ADAPTED[kind], layers, folder))
    assert len(expected) == 1 + 2 * 3 * len(ADAPTED[kind])
    for cuts in ([0, 4], [0, 2, 4], [0, 1, 3, 4]):
        stages = chain(folder, scheme, cuts)
        found = gradients(stages, adapt(stages, kind, ADAPTED[kind], layers, folder))
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            # fp32: the same products in another order of rounding, some forty of them behind one another.
            assert (found[name] - tensor).norm() <= 1e-5 * tensor.norm(), (name, cuts)


@pytest.mark.parametrize("scheme", [NF4, EIGHT], ids=["4", "8"])
def test_lora_is_pefts_own_over_quantised_weights(folders: dict[str, Path], scheme: Any) -> None:
    """PEFT's layer for quantised weights, and PEFT's model over transformers' quantised one computes the same."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import bnb as peft_bnb

    stages = chain(folders["cohere"], scheme, [0, 2, 4])
    trained = adapt(stages, "lora", ["o_proj", "up_proj"], [1, 2], folders["cohere"])
    layer = peft_bnb.Linear4bit if scheme.bits == 4 else peft_bnb.Linear8bitLt
    assert sum(isinstance(m, layer) for s in stages for m in s.modules()) == 4
    targets = [name.removesuffix(".A") for name in trained if name.endswith(".A")]
    whole = get_peft_model(theirs(folders["cohere"], scheme), LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            for letter in "AB":
                if f".lora_{letter}." in name:
                    plain = name.removeprefix("base_model.model.").split(".lora_")[0]
                    parameter.copy_(trained[f"{plain}.{letter}"])
    expected = whole.train().base_model.model.base_model(token_ids())[0]
    assert (hidden(stages, token_ids()) - expected).abs().max() <= 1e-5 * expected.abs().max()


class Products(TorchDispatchMode):
    """Counts products with quantised weights, by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counted[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ADAPTED)
@pytest.mark.parametrize("family", [pytest.param("llama", marks=pytest.mark.slow), "cohere"])
@pytest.mark.parametrize("scheme", [NF4, pytest.param(EIGHT, marks=pytest.mark.slow)], ids=["4", "8"])
def test_no_level_changes_a_bit(folders: dict[str, Path], scheme: Any, family: str, kind: str) -> None:
    def stages_of(keeping: ActivationPolicy) -> tuple[list[Stage], dict[str, Any]]:
        stages = chain(folders[family], scheme, [0, 2, 4])
        trained = adapt(stages, kind, ADAPTED[kind], [0, 1, 2], folders[family])
        for stage in stages:
            arena = HostArena(1 << 22, torch.device("cpu"))
            activation.apply(stage, dict.fromkeys(stage.layers, keeping), arena, gradients_enter=not stage.is_first)
        return stages, trained

    expected = gradients(*stages_of(ActivationPolicy(RecomputeLevel.EVERYTHING)))
    again: dict[RecomputeLevel, int] = {}
    for keeping in (*map(ActivationPolicy, RecomputeLevel), ActivationPolicy(RecomputeLevel.PROJECTIONS, on_host=True)):
        stages, trained = stages_of(keeping)
        with Products() as products:
            found = gradients(stages, trained)
        again[keeping.level] = products.counted["bitsandbytes.gemm_4bit.default"]
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), keeping
    if scheme.bits == 4:  # 28 products forward; the more is kept, the fewer run again
        counts = [again[level] for level in RecomputeLevel]
        assert again[RecomputeLevel.EVERYTHING] == 28
        assert counts == sorted(counts, reverse=True)
        assert again[RecomputeLevel.INPUT] > again[RecomputeLevel.ATTENTION] > again[RecomputeLevel.PROJECTIONS]


# The configuration


def written(folder: Path, bnb: dict[str, Any], **changes: Any) -> Path:
    """A run's TOML over a tiny model of its own in `folder`."""
    return builders.write_config(
        folder / "run.toml",
        **{"model": str(folder / "base"), "output_dir": str(folder / "runs"), "quantization": {"bnb": bnb}, **changes},
    )


@pytest.mark.parametrize(
    ("bnb", "changes", "said"),
    [
        ({}, {}, "needs one of load_in_4bit = true and load_in_8bit = true"),
        ({"load_in_4bit": True, "load_in_8bit": True}, {}, "needs one of load_in_4bit"),
        (
            {"load_in_4bit": True},
            {"full_fine_tune": True, "lora_rank": None, "lora_alpha": None, "layers_to_transform": None},
            "quantization: 4-bit and 8-bit weights cannot be trained",
        ),
        ({"load_in_8bit": True}, {"activation_checkpointing": "auto"}, "'auto' is not built over 8-bit weights"),
        (
            {"load_in_4bit": True, "bnb_4bit_quant_type": "int4"},
            {},
            r"quantization\.bnb\.bnb_4bit_quant_type.*'nf4' or 'fp4'",
        ),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": "float16"}, {}, r"bnb_4bit_compute_dtype = \"float16\""),
        ({"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"}, {}, "only FSDP needs another storage"),
        ({"load_in_8bit": True, "llm_int8_has_fp16_weight": True}, {}, "would save nothing"),
        ({"load_in_4bit": True, "bnb_4bit_use_doubel_quant": True}, {}, "Did you mean 'bnb_4bit_use_double_quant'"),
    ],
)
def test_settings_that_make_no_sense(tmp_path: Path, bnb: dict[str, Any], changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        loading.load(str(written(tmp_path, bnb, **changes)))


def test_other_quantisations_and_misplaced_keys_are_named(tmp_path: Path) -> None:
    path = written(tmp_path, {"load_in_4bit": True})
    with pytest.raises(UserError, match=r"quantization\.hqq.*HQQ is not built"):
        loading.load(str(path), None, ["quantization.hqq.nbits=4"])
    with pytest.raises(UserError, match=r"load_in_4bit = true: never had an effect.*\[quantization.bnb\]"):
        loading.load(str(path), None, ["load_in_4bit=true"])
    with pytest.raises(UserError, match=r"It belongs in \[quantization.bnb\]"):
        loading.load(str(path), None, ["load_in_8bit=true"])


# The plan


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{"load_in_4bit": True}, {"load_in_8bit": True}], ids=["4", "8"])
def test_the_plan_counts_quantised_weights_and_the_products_of_plain_ones(
    tmp_path: Path, keys: dict[str, bool]
) -> None:
    """Oracle: the bytes of the loaded layers; the FLOPs of the model as it is. A product has one dequantised weight alive.

    What is read and written more in a forward: in 4 bits the codes and scales, and the weights in fp32; in 8 bits nothing.
    """
    folder = save_model(tmp_path / "base", "llama")
    config = loading.load(str(written(tmp_path, keys)))
    made = resolve.resolve(config)
    base = made.base
    plain, quantised = (
        planned.costs(
            replace(
                made,
                base=replace(base, scheme=scheme),
                meta_model=MetaModel(made.meta_model.config, base.dtype, base.attn_implementation, scheme),
                trained=Trained(None, []),
            ),
            [RecomputeLevel.EVERYTHING],
            False,
        )(64)
        for scheme in (None, base.scheme)
    )
    stage = build(folder, NF4._replace(bits=4 if "load_in_4bit" in keys else 8), 0, 4)
    meta_model = empty_model(read_model_config(str(folder)), torch.float32, None)
    for index, layer in stage.layers.items():
        packed = [t for p in layer.parameters() if not p.is_floating_point() for t in stored(p).values()]
        tensors = [*packed, *(p for p in layer.parameters() if p.is_floating_point())]
        forward, before = quantised.layers[index].forward, plain.layers[index].forward
        assert quantised.layers[index].weight_bytes == sum(t.numel() * t.element_size() for t in tensors)
        assert forward.flops == before.flops
        weights = sum(p.numel() for name, p in meta_model.base_model.layers[index].named_parameters() if "proj" in name)
        moved = sum(t.numel() * t.element_size() for t in packed) + 4 * weights if "load_in_4bit" in keys else 0
        assert 64 * (forward.elementwise_bytes - before.elementwise_bytes) == pytest.approx(moved)
        extra = 64 * (quantised.layers[index].working_bytes - plain.layers[index].working_bytes)
        assert extra == pytest.approx(4 * 64 * 128), "fp32, of the largest weight"
    assert quantised.embedding_bytes == plain.embedding_bytes
    assert quantised.head.weight_bytes == plain.head.weight_bytes


# Runs


def outcome(run: Path) -> tuple[list[float], dict[str, Tensor]]:
    """The losses a run has written, and its last adapter."""
    losses = [line["train/loss"] for line in builders.metrics(run) if "train/loss" in line]
    return losses, load_file(run / "step4" / "adapter_model.safetensors")


@pytest.mark.slow
def test_two_stages_train_save_and_resume_on_one(tmp_path: Path) -> None:
    """The real command: two processes, a checkpoint in the middle; from there one process goes on to the same end."""
    save_model(tmp_path / "base", "llama")
    bnb_keys = {"load_in_4bit": True, "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "float32"}
    settings = {
        "max_steps": 4,
        "save_steps": 2,
        "checkpoint_on_save": True,
        "eval_before_first_step": True,
        "eval_steps": 4,
        "activation_checkpointing": True,
        "kernels": ["norm", "swiglu"],
    }
    path = written(tmp_path, bnb_keys, **settings)
    said = builders.train(2, "--config", str(path))
    assert "28 linear layers in 4-bit nf4, its scales quantised too, computing in float32" in said
    run = builders.only_run(tmp_path / "runs")
    first, one = outcome(run)
    before, after = (line["eval/book/loss"] for line in builders.metrics(run) if "eval/book/loss" in line)
    assert after < before
    checkpoint = ["--resume_from_checkpoint", str(run / "global_step2")]
    said = builders.train(1, "--config", str(path), "--set", "pipeline_stages=1", *checkpoint)
    assert "resumed:  after step 2" in said
    again, two = outcome(run)
    # fp32 sums in another order; Adam's steps of 1e-2 on rounding noise of 1e-7 are far below this.
    assert len(first) == 4
    assert again[-2:] == pytest.approx(first[-2:], rel=1e-4)
    assert one.keys() == two.keys()
    assert all(tensor.abs().max() > 0 for tensor in one.values())
    assert all((one[name] - two[name]).norm() <= 1e-2 * one[name].norm() for name in one)
