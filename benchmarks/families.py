"""What each adapter family costs beside the frozen model: counted memory and FLOPs, measured time of a step.

    python -m benchmarks.families      → results/families.json; then `python -m docs.families` writes docs/families.md

All families sit on the down_proj of every layer but the first of one small Llama with random weights, put there by the
functions that train, in one process without DeepSpeed and without our kernels. A step is forward, loss and backward of one
row and the optimizer's update. `frozen` is the floor: the same forward and backward with nothing trained. Backward of every
variant goes down to the first layer's output, so that all adapted modules are alike. All variants live side by side and are
timed in turn, the fastest of the rounds: figures are ratios to be read within one run. What is counted (parameters, bytes,
FLOPs of products) is exact, and split into a part per token and one per micro-batch from two lengths.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import peft  # noqa: F401  # so that no family's start pays for it
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks import record
from pipeline.config import loading
from pipeline.config.schema import Config
from pipeline.formats.dtypes import DTYPES
from pipeline.model import quantized, weights
from pipeline.model.adapters.base import trainable
from pipeline.model.adapters.targets import resolve_targets
from pipeline.model.stage import Stage, empty_model, read_model_config
from pipeline.model.structure.build import logit_transform
from pipeline.objectives.language_modelling import LanguageModelling
from pipeline.training.optim.inner import make_inner
from pipeline.training.optim.pipeline_optimizer import PipelineOptimizer
from pipeline.training.stage import families as adapter_families
from pipeline.training.stage import parts
from pipeline.training.start import resolve, to_train

CPU = torch.device("cpu")


class Size(NamedTuple):
    """A Llama and a row of `tokens`; `rank` of families that have one, `block` inputs of OFT and BOFT."""

    hidden: int
    feed_forward: int
    heads: int
    layers: int
    vocabulary: int
    tokens: int
    rank: int
    block: int
    dtype: str = "bfloat16"

    @property
    def adapted(self) -> int:
        """Modules with an adapter: the down_proj of every layer but the first."""
        return self.layers - 1


TINY = Size(hidden=64, feed_forward=128, heads=4, layers=2, vocabulary=512, tokens=32, rank=4, block=8)
USUAL = Size(hidden=512, feed_forward=1408, heads=8, layers=4, vocabulary=4096, tokens=512, rank=16, block=32)

FROZEN = "frozen"
NO_RANK: dict[str, Any] = {"lora_rank": None, "lora_alpha": None}
BASES: dict[str, dict[str, Any] | None] = {
    "": None,
    ", nf4": {"load_in_4bit": True},
    ", 8 bits": {"load_in_8bit": True},
}


def families(size: Size) -> dict[str, dict[str, Any]]:
    """The keys of the configuration, by the family's name in the results."""
    lora: dict[str, Any] = {"adapter_type": "lora"}
    return {
        "multiplicative_lora": {},
        "control_adapter": {"adapter_type": "control_adapter", "lora_alpha": None},
        "lora": lora,
        "rslora": {**lora, "use_rslora": True},
        "moslora": {"adapter_type": "moslora"},
        "dora": {**lora, "use_dora": True},
        "pissa": {**lora, "init_lora_weights": "pissa"},
        "pissa_niter_4": {**lora, "init_lora_weights": "pissa_niter_4"},
        "olora": {**lora, "init_lora_weights": "olora"},
        "ia3": {"adapter_type": "ia3", **NO_RANK},
        "oft": {"adapter_type": "oft", **NO_RANK, "oft_block_size": size.block},
        "boft": {"adapter_type": "boft", **NO_RANK, "boft_block_size": size.block},
        "hra": {"adapter_type": "hra", "lora_alpha": None},
    }


def variants(size: Size) -> dict[str, dict[str, Any] | None]:
    """All that is measured: its keys, None for a frozen model; over nf4 and 8 bits what most runs would take there."""
    found: dict[str, dict[str, Any] | None] = {FROZEN: None, **families(size)}
    for suffix, bnb in BASES.items():
        if bnb:
            table = {"quantization": {"bnb": bnb}}
            found[f"{FROZEN}{suffix}"] = table
            found |= {f"{name}{suffix}": {**families(size)[name], **table} for name in ("multiplicative_lora", "lora")}
    return found


class Variant:
    """A stage with all layers, what is trained in it, and its optimizer. `start_s`: seconds of putting the adapters in."""

    def __init__(self, name: str, keys: dict[str, Any] | None, size: Size, base: Path) -> None:
        config = config_of(keys or {}, size, base)
        model = empty_model(read_model_config(str(base)), DTYPES[size.dtype], None)
        targets = resolve_targets(model, ["down_proj"], list(range(1, size.layers)))
        scheme = resolve.base_of(config).scheme
        if scheme:
            quantized.put_placeholders(model, scheme)
        self.stage = Stage(model, 0, size.layers)
        parts.put_quantised(self.stage, scheme)
        weights.load(self.stage, str(base), DTYPES[size.dtype], CPU)
        self.stage.train()
        self.transform = logit_transform(self.stage.model.config)
        layers: Any = self.stage.model.base_model.layers
        layers[0].register_forward_hook(_want_gradient)
        self.start_s = 0.0
        self.optimizer: PipelineOptimizer | None = None
        if name.startswith(FROZEN):
            return
        began = time.perf_counter()
        adapter = to_train.adapter_of(config, targets)
        if config.peft:
            asked = to_train.asked_of(config.peft.model_dump(), config.lora_dropout, targets, model)
            adapter = replace(adapter, by_peft=asked)
        adapter_families.inject(self.stage, adapter)
        self.start_s = time.perf_counter() - began
        trained = trainable(self.stage)
        inner = make_inner(
            "adamw_kahan", [{"params": list(trained.values())}], lr=1e-4, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.01
        )
        self.optimizer = PipelineOptimizer(trained, inner, clip=1.0)
        adapter_families.after_updates(self.stage, inner)

    def loss(self, ids_BT: Tensor) -> Tensor:
        """Of ids [1, T]; fp32."""
        positions = torch.arange(ids_BT.shape[1]).unsqueeze(0)
        hidden: Any = self.stage((ids_BT, positions))
        scale = torch.tensor(1 / (ids_BT.shape[1] - 1))
        return LanguageModelling(self.stage.head, self.transform).loss(hidden, {"labels": ids_BT, "loss_scale": scale})

    def step(self, ids_BT: Tensor) -> None:
        """Forward, loss, backward, update."""
        self.loss(ids_BT).backward()
        if self.optimizer:
            self.optimizer.step()


def config_of(keys: dict[str, Any], size: Size, base: Path) -> Config:
    """The configuration of a run with these keys; base and adapter in the size's dtype."""
    raw: dict[str, Any] = {
        "model": str(base),
        "output_dir": str(base),
        "lora_rank": size.rank,
        "lora_alpha": float(size.rank),
        "epochs": 1,
        "pipeline_stages": 1,
        "optimizer": {"type": "adamw_kahan", "lr": 1e-4},
        "model_weight_dtype": size.dtype,
        "lora_weight_dtype": size.dtype,
        "datasets": [{"dataset_type": "textfile", "dataset_path": "x.txt", "sequence_len": 64}],
        **keys,
    }
    return loading.validate({key: value for key, value in raw.items() if value is not None}, "benchmark")


def save_base(size: Size, folder: Path) -> None:
    """A Llama with transformers' own random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.feed_forward,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=4096,
    )
    AutoModelForCausalLM.from_config(config, dtype=DTYPES[size.dtype]).save_pretrained(folder)


def tokens(size: Size, length: int) -> Tensor:
    """Ids [1, length] int64."""
    return torch.randint(3, size.vocabulary, (1, length), generator=torch.Generator().manual_seed(0))


def _want_gradient(module: nn.Module, given: Any, output: Tensor) -> Tensor:
    return output.requires_grad_()


# What is counted


class Counts(NamedTuple):
    """Of a frozen model, at T and at T/2 tokens."""

    kept: tuple[int, int]
    flops: tuple[int, int] | None


def kept_bytes(variant: Variant, ids_BT: Tensor) -> int:
    """Of distinct storages that autograd saves in a forward, but for weights and what is trained."""
    own = {t.untyped_storage().data_ptr() for t in (*variant.stage.parameters(), *variant.stage.buffers())}
    saved: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        for part in (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,):
            saved[part.untyped_storage().data_ptr()] = part
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        variant.loss(ids_BT)
    return sum(t.untyped_storage().nbytes() for address, t in saved.items() if address not in own)


def flops(variant: Variant, ids_BT: Tensor) -> int:
    """Of matrix products and attention, forward and backward, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        variant.loss(ids_BT).backward()
    for parameter in variant.stage.parameters():
        parameter.grad = None
    return counter.get_total_flops()


def at_both(measure: Callable[[Variant, Tensor], int], variant: Variant, size: Size) -> tuple[int, int]:
    """What `measure` says of rows of T and of T/2 tokens."""
    return measure(variant, tokens(size, size.tokens)), measure(variant, tokens(size, size.tokens // 2))


def beyond(found: tuple[int, int], floor: tuple[int, int], size: Size) -> tuple[float, float]:
    """What a variant takes more than the floor, a token and a micro-batch of each adapted module, both from `at_both`."""
    long, short = (a - b for a, b in zip(found, floor, strict=True))
    a_token = (long - short) / (size.tokens - size.tokens // 2)
    return a_token / size.adapted, (long - a_token * size.tokens) / size.adapted


def counted(variant: Variant, floor: Counts, size: Size) -> dict[str, Any]:
    """Per adapted module; `trained_bytes` with gradient sums and optimizer state. FLOPs where the floor has them."""
    assert variant.optimizer
    trained = variant.optimizer.parameters_by_name.values()
    kept = beyond(at_both(kept_bytes, variant, size), floor.kept, size)
    variant.step(tokens(size, size.tokens))  # from here on the optimizer has its state
    held = (*trained, *variant.optimizer.held_tensors())
    found: dict[str, Any] = {
        "trained": sum(p.numel() for p in trained) / size.adapted,
        "trained_bytes": sum(t.numel() * t.element_size() for t in held) / size.adapted,
        "kept_bytes_a_token": kept[0],
        "kept_bytes_a_micro_batch": kept[1],
    }
    if floor.flops:
        work = beyond(at_both(flops, variant, size), floor.flops, size)
        found |= {"flops_a_token": work[0], "flops_a_micro_batch": work[1]}
    return found


def counts_of(floor: Variant, size: Size, plain: bool) -> Counts:
    """Of a frozen model. FLOPs over a plain base only: torch does not know bitsandbytes' products."""
    return Counts(at_both(kept_bytes, floor, size), at_both(flops, floor, size) if plain else None)


# What is measured


def times(made: dict[str, Variant], ids_BT: Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant's steps, one of each in a round, in turn; the first round is not counted."""
    found: dict[str, list[float]] = {name: [] for name in made}
    for counts in (False, *[True] * rounds):
        for name, variant in made.items():
            began = time.perf_counter()
            variant.step(ids_BT)
            if counts:
                found[name].append(time.perf_counter() - began)
    return found


def floor_of(name: str) -> str:
    """The frozen model over the same base: 'lora, nf4' → 'frozen, nf4'."""
    return FROZEN + "".join(name.partition(", ")[1:])


def reference_of(name: str) -> str:
    """multiplicative_lora over the same base."""
    return "multiplicative_lora" + "".join(name.partition(", ")[1:])


def measure(size: Size, rounds: int, wanted: Collection[str]) -> list[dict[str, Any]]:
    """A row for each of the variants `wanted`."""
    with tempfile.TemporaryDirectory() as folder:
        save_base(size, Path(folder))
        chosen = {name: keys for name, keys in variants(size).items() if name in wanted}
        made = {name: Variant(name, keys, size, Path(folder)) for name, keys in chosen.items()}
    floors = {name: counts_of(made[name], size, plain=name == FROZEN) for name in made if name.startswith(FROZEN)}
    counts = {n: counted(variant, floors[floor_of(n)], size) for n, variant in made.items() if variant.optimizer}
    measured = times(made, tokens(size, size.tokens), rounds)
    best = {name: min(seconds) for name, seconds in measured.items()}
    return [
        {
            "variant": name,
            "seconds": best[name],
            "all_seconds": seconds,
            "of_the_frozen_model": best[name] / best[floor_of(name)],
            "of_multiplicative_lora": best[name] / best[reference_of(name)],
            "start_s_a_module": made[name].start_s / size.adapted,
            **counts.get(name, {}),
        }
        for name, seconds in measured.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--tiny", action="store_true", help="to see that it runs")
    parser.add_argument(
        "--only", metavar="VARIANT", help="measure it again, beside what it is compared with, and put its row in"
    )
    parser.add_argument("--out", type=Path, help="folder of the JSON")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    size = TINY if given.tiny else USUAL
    wanted = (given.only, floor_of(given.only), reference_of(given.only)) if given.only else variants(size)
    rows = measure(size, given.rounds, wanted)
    for row in rows:
        print(
            f"{row['variant']:28} {row['seconds']:7.3f} s a step, {row['of_the_frozen_model']:5.2f} × the frozen model, "
            f"{row['of_multiplicative_lora']:5.2f} × multiplicative_lora"
        )
    settings = {**size._asdict(), "target_modules": ["down_proj"], "rounds": given.rounds, "optimizer": "adamw_kahan"}
    if given.only:
        again = next(row for row in rows if row["variant"] == given.only)
        print("written:", record.replace_row("families", "variant", {**again, "rounds": given.rounds}, given.out))
    else:
        print("written:", record.write("families", settings, rows, given.out))


if __name__ == "__main__":
    main()
