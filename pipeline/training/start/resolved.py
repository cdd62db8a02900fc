"""`Resolved`: a run in plain values, all that is known of it before a weight or a row is read.

`resolve.py` makes it of the config; what follows takes it, or the part of it that concerns it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.config.data_tables import Dataset, EvalDataset
from pipeline.config.tables import Optimizer
from pipeline.generation.sampling import Sampling
from pipeline.model.structure.apart import Way
from pipeline.training.stage.meta_model import MetaModel
from pipeline.training.stage.spec import BaseModel, Trained
from pipeline.training.start.objective import ObjectiveSpec


@dataclass(frozen=True)
class Updates:
    """How parameters are updated: by what, with which gradient, at which rate.

    `product_decay`, `largest_norm`: of s·B·A (optim/regularisation.py). `warmup`: steps, below 1 a fraction of an epoch.
    `constant_lr`: the rate throughout, whatever else is said.
    """

    optimizer: Optimizer
    clip: float
    product_decay: float | None
    largest_norm: float | None
    lr_shape: str
    warmup: float
    constant_lr: float | None


@dataclass(frozen=True)
class SampleSpec:
    """What the model is asked while it is trained, and when. `folder`: the model's, with its tokenizer and stop ids.

    `chat`: through `chat_template`, which with its kwargs and `merge_system` is that of the first chat dataset, else the
    tokenizer's own (None), after `system`'s message. `compare`: the base beside it. Steps are optimizer steps; 0 is never.
    """

    folder: str
    prompts: tuple[str, ...]
    chat: bool
    system: str
    chat_template: str | None
    template_kwargs: dict[str, Any]
    merge_system: bool
    sampling: Sampling
    max_new_tokens: int
    compare: bool
    every_steps: int
    at_start: bool
    at_end: bool


@dataclass(frozen=True)
class GenerationSpec:
    """How the model answers prompts that it is trained on. `max_new_tokens`: None is what sequence_len leaves."""

    sampling: Sampling
    max_new_tokens: int | None


@dataclass(frozen=True)
class DataSpec:
    """What is read, evaluated on and asked, how it is mixed and put into micro-batches, and for how long.

    `cache`: a folder. `processes`: how many prepare the data, None is one a core. `mix_by`: None is by rows, and by tokens in
    the mean with `batch_size_tokens`. `stops`: ids at which the model stops beside the tokenizer's EOS. `rope_switch`: tokens
    beyond which the model's rotary embedding is another, if it is of such a kind. `generation`: where the model
    gives rejected answers.
    """

    datasets: list[Dataset]
    eval_datasets: list[EvalDataset]
    cache: Path
    processes: int | None
    stops: list[int]
    combination: Literal["concatenate", "interleave"]
    stopping: Literal["first_exhausted", "all_exhausted"]
    mix_by: Literal["rows", "tokens", "targets"] | None
    seed: int
    micro_batch_size: int
    batch_size_tokens: int | None
    accumulation: int
    group_by_length: bool
    epochs: int | None
    max_steps: int | None
    samples: SampleSpec | None = None
    generation: GenerationSpec | None = None
    rope_switch: int | None = None

    @property
    def in_streams(self) -> bool:
        """Whether rows of two streams are trained on together (data/units/streams.py)."""
        return any(dataset.stream for dataset in self.datasets)


@dataclass(frozen=True)
class Layout:
    """How the work is laid out: stages, the largest micro-batch (`rows` of `tokens`), what layers keep for backward.

    `layers`: of each stage, where the user says so. `checkpointing`: activation_checkpointing. `host_gib`: host_memory_gib.
    `link_gbit_per_s`: of the network between nodes, where the user says so.
    """

    stages: int
    layers: list[int] | None
    rows: int
    tokens: int
    accumulation: int
    checkpointing: bool | str
    host_gib: float
    link_gbit_per_s: float | None
    kernels: str | list[Any]


@dataclass(frozen=True)
class Intervals:
    """When things happen, in optimizer steps, epochs or minutes; None is never. Names and meanings are the config's."""

    logging_steps: int
    steps_per_print: int
    eval_steps: int | None
    eval_before_first_step: bool
    eval_after_last_step: bool
    early_stopping_patience: int | None
    early_stopping_min_delta: float
    save_steps: int | None
    save_every_n_epochs: int | None
    save_checkpoint_on_epoch_end: bool
    checkpoint_every_n_minutes: float | None
    checkpoint_on_save: bool


@dataclass(frozen=True)
class Resolved:
    """A run in plain values. `meta_model`: makes the model without weights; `ranges`: each stage's layers, [first, end).
    `router_loss`: the weight of a mixture's loss of its routers, 0 for none. `kept_apart_by`: what the model needs beside
    positions to keep documents that share a row apart. `objective`: None for language modelling."""

    base: BaseModel
    meta_model: MetaModel
    trained: Trained
    ranges: list[tuple[int, int]]
    updates: Updates
    layout: Layout
    data: DataSpec
    intervals: Intervals
    router_loss: float = 0.0
    objective: ObjectiveSpec | None = None
    kept_apart_by: Way = "positions"
