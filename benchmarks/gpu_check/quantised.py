"""Training over 4 and 8 bits, against plain layers that hold what the quantised ones stand for."""

from pathlib import Path

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from benchmarks import correctness, variants
from benchmarks.gpu_check.setting import Outcome, Setting, base_folder
from pipeline.model import quantized, quantized_bnb, weights
from pipeline.model.adapters.multiplicative import inject_multiplicative
from pipeline.model.adapters.targets import resolve_targets
from pipeline.model.quantized import Scheme
from pipeline.model.stage import Stage, empty_model, read_model_config

NF4 = Scheme(4, "nf4", False, torch.float32, 6.0, ())
SCHEMES = {"nf4": NF4, "nf4, double": NF4._replace(double_quant=True), "8 bits": NF4._replace(bits=8)}
SAME_PRODUCTS = 1e-5
ROUNDED_INPUTS = 0.1


def check(given: Setting) -> Outcome:
    """The hidden state and the adapters' gradients of an fp32 model over each scheme."""
    folder = base_folder(given, given.small)
    on_gpu = given.device.type == "cuda"
    rows = []
    for name, scheme in SCHEMES.items():
        stage = build(folder, scheme, given)
        found = step(stage, given)
        layers = dequantise(stage)
        limit = ROUNDED_INPUTS if scheme.bits == 8 and on_gpu else SAME_PRODUCTS
        error = correctness.distance(found, step(stage, given))
        rows.append(
            {"scheme": name, "error": error, "allowed": limit, "layers": layers, "good": layers > 0 and error <= limit}
        )
        print(f"  {name:44} {error:10.2e} of {limit:.0e}  {'' if rows[-1]['good'] else 'WRONG'}", flush=True)
    return Outcome(
        passed=all(row["good"] for row in rows),
        compared="hidden state and adapters' gradients over quantised layers, fp32, with those over plain layers that hold the "
        "dequantised weights",
        tolerance=f"{SAME_PRODUCTS:.0e} of the norm: the same fp32 products, some tens one after another; on a GPU 8 bits round "
        f"a product's input to int8 too, {ROUNDED_INPUTS}: 7 products a layer, each off by its input's largest over 127·√12",
        figures={"schemes": rows},
    )


def build(folder: Path, scheme: Scheme, given: Setting) -> Stage:
    """The whole model with quantised layers and adapters on down_proj."""
    dtype = torch.float32
    whole = empty_model(read_model_config(str(folder)), dtype, None)
    targets = resolve_targets(whole, ["down_proj"], list(given.small.adapted))
    quantized.put_placeholders(whole, scheme)
    stage = Stage(whole, 0, given.small.layers)
    quantized_bnb.put_in(stage)
    weights.load(stage, str(folder), dtype, given.device)
    inject_multiplicative(stage, targets, given.small.rank, given.small.rank, 0.0, dtype, variants.SEED)
    pairs = variants.trained_in(stage)
    for index in given.small.adapted:
        variants.set_adapter(index, pairs[f"{index}.A"], pairs[f"{index}.B"])
    return stage.train()


def step(stage: Stage, given: Setting) -> list[Tensor]:
    """The hidden state, and the gradients of a fixed function of it."""
    trained = variants.trained_in(stage)
    ids = variants.tokens(given.small, given.device)
    positions = torch.arange(given.small.tokens, device=given.device).unsqueeze(0)
    hidden = stage((ids, positions))
    along = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(variants.SEED)).to(given.device)
    return [hidden.detach(), *torch.autograd.grad((hidden * along).sum(), [trained[n] for n in sorted(trained)])]


def dequantise(stage: Stage) -> int:
    """In place: plain linear layers with what the quantised ones stand for; how many."""
    replaced = 0
    for name, module in list(stage.model.named_modules()):
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
            weight = bnb.functional.int8_vectorwise_dequant(module.weight.data, scales)
        else:
            continue
        plain = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(weight.float(), requires_grad=False)
        stage.model.set_submodule(name, plain)
        replaced += 1
    return replaced
