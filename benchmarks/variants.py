"""What the training benchmarks compare: Hugging Face Trainer + PEFT with the founding method's change, and ours.

Takes a shape and a device; gives a model with random weights made by transformers, and around it the peer's or our
training step: forward, loss and backward of one row of tokens, without the optimizer's step on either side. Weights,
adapters and tokens are the same in every process, so that losses and gradients can be compared.

The peer is what the founding method asks for: PEFT's LoRA with two lines of its layer changed, so that the adapter reads
the output of the layer (jukofyork, creative-writer v0.1, "The multiplicative-LoRA method"), under transformers' Trainer.
Ours is a Stage with all layers, in one process without DeepSpeed. Adapters have the weights' dtype on both sides.
"""

import functools
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CohereConfig, PreTrainedModel, Trainer, TrainingArguments

from benchmarks.shapes import Shape, kept_bytes
from pipeline.formats.dtypes import DTYPES
from pipeline.model.adapters.base import trainable
from pipeline.model.adapters.multiplicative import inject_multiplicative
from pipeline.model.adapters.targets import resolve_targets
from pipeline.model.fusion import apply as fusion
from pipeline.model.memory import activation
from pipeline.model.memory.host_arena import HostArena
from pipeline.model.memory.levels import ActivationPolicy, RecomputeLevel
from pipeline.model.stage import Stage
from pipeline.model.structure.build import logit_transform
from pipeline.objectives.language_modelling import LanguageModelling

SEED = 0


class Variant:
    """One side of a comparison: a training step that can be looked into.

    `trained`: parameters by '<layer>.A' and '<layer>.B'. `decoder`: the module whose return ends the layers' forward.
    `before_backward` is called when the loss is there and nothing has been freed yet. `arena`: what it keeps on the host.
    """

    def __init__(self, run: Callable[[Tensor], Tensor], decoder: nn.Module, trained: dict[str, nn.Parameter]) -> None:
        self._run, self.decoder, self.trained = run, decoder, trained
        self.before_backward: Callable[[], None] = lambda: None
        self.arena: HostArena | None = None

    def step(self, ids_BT: Tensor) -> Tensor:
        """Forward, loss and backward on ids [B, T] int64; the loss, fp32 or the peer's dtype. Gradients start from none."""
        for parameter in self.trained.values():
            parameter.grad = None
        return self._run(ids_BT)


def tokens(shape: Shape, device: torch.device, length: int | None = None) -> Tensor:
    """Ids [1, T] int64, the same in every process; 3 and up, as the first are special."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(3, shape.vocabulary, (1, length or shape.tokens), generator=generator).to(device)


def model(shape: Shape, device: torch.device) -> PreTrainedModel:
    """A frozen Cohere model on `device` with transformers' own random weights, drawn in the shape's dtype."""
    config = CohereConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=max(8192, shape.tokens),
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        use_cache=False,
    )
    torch.manual_seed(SEED)
    with torch.device(device):
        made = AutoModelForCausalLM.from_config(config, dtype=DTYPES[shape.dtype], attn_implementation="sdpa")
    return made.requires_grad_(False).train()  # type: ignore[no-any-return]


@torch.no_grad()
def set_adapter(layer: int, A: nn.Parameter, B: nn.Parameter) -> None:
    """Values that a bf16 number holds exactly, and B not zero, so that every gradient has something to say."""
    generator = torch.Generator().manual_seed(SEED + 1 + layer)
    for parameter, bound in ((A, A.shape[1] ** -0.5), (B, B.shape[1] ** -0.5)):
        values = (torch.rand(parameter.shape, generator=generator) * 2 - 1) * bound
        parameter.copy_(values.bfloat16())


def peer_model(
    shape: Shape, device: torch.device, wide: bool = False
) -> tuple[Any, PreTrainedModel, dict[str, nn.Parameter]]:
    """PEFT's model with the founding change, the transformers model in it, and what is trained as in `Variant`."""
    import peft

    base = model(shape, device)
    if wide:
        base = base.float()
    config = peft.LoraConfig(
        r=shape.rank,
        lora_alpha=shape.rank,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        target_modules=["down_proj"],
        layers_to_transform=list(shape.adapted),
    )
    wrapped = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    trained: dict[str, nn.Parameter] = {}
    for index in shape.adapted:
        linear = base.base_model.layers[index].mlp.down_proj
        make_multiplicative(linear, base.dtype)
        pair = linear.lora_A["default"].weight, linear.lora_B["default"].weight
        set_adapter(index, *pair)
        trained |= {f"{index}.A": pair[0], f"{index}.B": pair[1]}
    return wrapped, base, trained


def peer(shape: Shape, device: torch.device, checkpointing: bool, wide: bool = False) -> Variant:
    """Trainer.training_step over PEFT with the founding change; `wide`: the same weights in fp32, the comparison's oracle."""
    wrapped, base, trained = peer_model(shape, device, wide)
    if checkpointing:  # what Trainer.train() does before its first step
        wrapped.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trainer = _Trainer(
        model=wrapped,
        args=TrainingArguments(
            output_dir=tempfile.gettempdir(),
            use_cpu=device.type == "cpu",
            report_to=[],
            disable_tqdm=True,
            per_device_train_batch_size=1,
            gradient_checkpointing=checkpointing,
        ),
    )
    trainer.current_gradient_accumulation_steps = 1
    made = Variant(
        lambda ids: trainer.training_step(wrapped, {"input_ids": ids, "labels": ids}), base.base_model, trained
    )
    trainer.on_loss = lambda: made.before_backward()
    return made


class _Trainer(Trainer):
    """Tells when the loss is there."""

    on_loss: Callable[[], None]

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's own."""
        loss = super().compute_loss(*args, **kwargs)
        self.on_loss()
        return loss


def make_multiplicative(linear: Any, dtype: torch.dtype) -> None:
    """The founding method's change to a PEFT LoRA layer: lora_A takes the layer's output width, and reads its output."""
    old = linear.lora_A["default"]
    device = old.weight.device
    linear.lora_A["default"] = nn.Linear(linear.out_features, old.out_features, bias=False, device=device, dtype=dtype)
    linear.forward = functools.partial(_founding_forward, linear)


def _founding_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """PEFT's `lora.Linear.forward` as it is for an active, unmerged adapter, with `temp` where it had `x`."""
    result = self.base_layer(x, *args, **kwargs)
    torch_result_dtype = result.dtype
    for active_adapter in self.active_adapters:
        lora_A, lora_B = self.lora_A[active_adapter], self.lora_B[active_adapter]
        dropout, scaling = self.lora_dropout[active_adapter], self.scaling[active_adapter]
        temp = result.to(lora_A.weight.dtype)
        result = result + lora_B(lora_A(dropout(temp))) * scaling
    return result.to(torch_result_dtype)  # type: ignore[no-any-return]


def ours(
    shape: Shape,
    device: torch.device,
    level: RecomputeLevel,
    kernels: frozenset[str] | None = None,
    on_host: bool = False,
) -> Variant:
    """A Stage of all layers, each at `level`, with `kernels` (None: all of them)."""
    whole = model(shape, device)
    stage = stage_of(whole, shape, 0, shape.layers, frozenset(fusion.KERNELS) if kernels is None else kernels)
    keeping = dict.fromkeys(range(shape.layers), ActivationPolicy(level, on_host))
    on_the_host = arena(shape, level, device) if on_host else None
    activation.apply(stage, keeping, on_the_host)
    objective = LanguageModelling(stage.head, logit_transform(whole.config))
    positions = torch.arange(shape.tokens, device=device).unsqueeze(0)

    def run(ids: Tensor) -> Tensor:
        hidden = stage((ids, positions[:, : ids.shape[1]]))
        scale = torch.tensor(1 / (ids.shape[1] - 1), device=device)
        loss = objective.loss(hidden, {"labels": ids, "loss_scale": scale})  # type: ignore[arg-type]
        made.before_backward()
        loss.backward()
        return loss.detach()

    made = Variant(run, whole.base_model, trained_in(stage))
    made.arena = on_the_host
    return made


def stage_of(whole: PreTrainedModel, shape: Shape, first: int, end: int, kernels: frozenset[str]) -> Stage:
    """Layers [first, end) with adapters of known values and `kernels`, ready for training."""
    targets = resolve_targets(whole, ["down_proj"], list(shape.adapted))
    stage = Stage(whole, first, end).train()
    inject_multiplicative(stage, targets, shape.rank, shape.rank, 0.0, next(whole.parameters()).dtype, SEED)
    found = trained_in(stage)
    for index in sorted({int(name.split(".")[0]) for name in found}):
        set_adapter(index, found[f"{index}.A"], found[f"{index}.B"])
    fusion.apply(stage, kernels)
    return stage


def trained_in(stage: Stage) -> dict[str, nn.Parameter]:
    """'model.layers.3.mlp.down_proj.A' → '3.A'."""
    return {f"{n.split('.layers.')[1].split('.')[0]}.{n[-1]}": p for n, p in trainable(stage).items()}


def arena(shape: Shape, level: RecomputeLevel, device: torch.device) -> HostArena:
    """Host memory for all layers at `level`, and a tenth for the rounding of sizes."""
    return HostArena(int(1.1 * kept_bytes(shape, level) * shape.tokens * shape.layers) + 2**20, device)


def name(level: RecomputeLevel, kernels: str = "all", on_host: bool = False) -> str:
    """'ours everything', 'ours input, kernels none', 'ours projections, on the host'."""
    return (
        f"ours {level.name.lower()}"
        + ("" if kernels == "all" else f", kernels {kernels}")
        + (", on the host" if on_host else "")
    )


def kernel_sets() -> dict[str, frozenset[str]]:
    """None, each alone, all but each, all."""
    every = frozenset(fusion.KERNELS)
    sets = {"none": frozenset[str](), **{kernel: frozenset({kernel}) for kernel in fusion.KERNELS}}
    return {**sets, **{f"all but {kernel}": every - {kernel} for kernel in fusion.KERNELS}, "all": every}


Builder = Callable[[Shape, torch.device], Variant]
HF, HF_CHECKPOINTING, ORACLE = "hf", "hf + checkpointing", "hf fp32"
VARIANTS: dict[str, Builder] = {
    HF: functools.partial(peer, checkpointing=False),
    HF_CHECKPOINTING: functools.partial(peer, checkpointing=True),
    ORACLE: functools.partial(peer, checkpointing=False, wide=True),
    **{
        name(level, label, on_host): functools.partial(ours, level=level, kernels=chosen, on_host=on_host)
        for level in RecomputeLevel
        for label, chosen in kernel_sets().items()
        for on_host in (False, True)
    },
}
