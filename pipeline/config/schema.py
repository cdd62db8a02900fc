"""The schema of a run: every key, its default, unit, bound and meaning, once.

Takes a plain dictionary (from `config_sources`), gives a validated `Config`. The vocabulary is qlora-pipe's; the tables
are in config/tables.py, keys of qlora-pipe that have no sound meaning here in config/qlora_pipe.py. Docs and
`configs/schema.json` are generated from the descriptions.
"""

import os
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from pipeline.config import data_tables, rules
from pipeline.config.data_tables import Dataset, EvalDataset
from pipeline.config.objective_table import Objective, Rl
from pipeline.config.qlora_pipe import with_rejected_sampling
from pipeline.config.tables import (
    Bnb,
    Optimizer,
    Peft,
    Quantization,
    Samples,
    Sampling,
    Section,
    Tracker,
    conflicts_of_bits,
    not_built,
    regular_expression,
)
from pipeline.families import CONFIGURED, MULTIPLICATIVE, AdapterType
from pipeline.formats.choices import Dtype
from pipeline.names import as_ranges, layer_ranges
from pipeline.peft import types as peft_types

Pattern = Annotated[str, AfterValidator(regular_expression)]


class Config(Section):
    """The whole run."""

    model: str = Field(
        description="folder of the base model: config.json, tokenizer, safetensors; or its name on the Hub, 'OWNER/NAME' or 'OWNER/NAME@REVISION', from which it is downloaded into the Hub's cache (HF_HUB_CACHE)"
    )
    output_dir: str = Field(description="each run makes a folder named by its UTC start time in here")

    adapter_type: Annotated[
        AdapterType,
        BeforeValidator(rules.known_family),
    ] = Field(
        MULTIPLICATIVE,
        description="what is trained: " + ", ".join(f"'{name}' ({row.computes})" for name, row in CONFIGURED.items()),
    )
    full_fine_tune: bool = Field(False, description="train the model's own weights, no adapter")
    lora_rank: PositiveInt | None = Field(
        None, description="rank R of the adapter; required unless full_fine_tune, ia3, oft or boft"
    )
    lora_alpha: PositiveFloat | None = Field(
        None, description="s = lora_alpha / lora_rank; required for multiplicative_lora, lora, moslora and flora"
    )
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on what the adapter reads")
    use_rslora: bool = Field(False, description="s = lora_alpha / √lora_rank; of 'lora', 'moslora' and 'flora'")
    use_dora: bool = Field(
        False, description="'lora' with a trained magnitude for each output's row of the merged weight (DoRA); slower"
    )
    init_lora_weights: Annotated[bool | str, AfterValidator(rules.known_start)] = Field(
        True, json_schema_extra=rules.STARTS_SCHEMA, description="how a 'lora' starts: true (A random, B zero), or from the weight's largest singular vectors ('pissa', or 'pissa_niter_4', which finds them by 4 subspace iterations, in seconds where the exact ones take minutes) or its QR factors ('olora'), which are taken out of the weight and saved as what changed")  # fmt: skip
    oft_block_size: PositiveInt | None = Field(
        None, description="of 'oft': inputs that are rotated among each other; must divide a module's inputs"
    )
    boft_block_size: PositiveInt | None = Field(None, description="as oft_block_size, of 'boft'")
    feedforward_modules: list[str] | None = Field(
        None, description="of 'ia3': those of target_modules with a factor for each input instead of each output; default down_proj")  # fmt: skip
    target_modules: list[str] | Literal["all-linear"] | None = Field(
        None, description="names of the modules to adapt ('experts': what a layer's routed experts write, for multiplicative_lora and control_adapter; on a mixture 'down_proj' means that too); default ['down_proj'] for multiplicative_lora and control_adapter, ['k_proj', 'v_proj', 'down_proj'] for ia3, everything for full_fine_tune, 'all-linear' for the others")  # fmt: skip
    target_parameters: list[str] = Field(
        [], description="of 'lora': parameters that are no linear module's weight, above all a mixture's experts (['mlp.experts.gate_up_proj', 'mlp.experts.down_proj']), by a name or its end after a dot, as in PEFT: each matrix of them gets a pair of its own; beside target_modules, of which [] names none")  # fmt: skip
    layers_to_transform: str | None = Field(
        None, description="decoder layers to adapt, both ends included: '0:38' is layers 0 to 38, '0:3,7' is 0, 1, 2, 3 and 7; default all")  # fmt: skip
    trainable_modules: list[str] = Field(
        [], description="modules trained in full beside the adapter, in all layers whatever layers_to_transform says: a full name, or the end of one after a dot (['embed_tokens', 'input_layernorm', 'norm']); they keep model_weight_dtype")  # fmt: skip
    load_balancing_loss_coef: NonNegativeFloat | None = Field(
        None, description="weight of a mixture's load-balancing loss (transformers' router_aux_loss_coef), of all layers together, added to each micro-batch's loss in training; 0 for none; default what the model's config.json asks for with output_router_logits = true")  # fmt: skip
    train_logit_scale: PositiveFloat = Field(
        1.0, description="multiplies the logits before the softmax in training; recorded in the adapter"
    )
    rank_pattern: dict[Pattern, PositiveInt] = Field(
        {}, description="lora_rank of some modules, by a name, the end of one, or a regular expression for it, as in PEFT: { 'layers.0.mlp.down_proj' = 128 }")  # fmt: skip
    alpha_pattern: dict[Pattern, PositiveFloat] = Field(
        {}, description="lora_alpha of some modules, as rank_pattern; saved with zeros up to the largest rank and with one s, which is the same function")  # fmt: skip
    init_adapter: str | None = Field(
        None, min_length=1, description="folder of an adapter of the same kind, modules, ranks and s, whose weights this run begins with; not read when resuming")  # fmt: skip
    neftune_noise_alpha: PositiveFloat | None = Field(
        None, description="NEFTune: in training, noise of U(−1, 1)·alpha/√(T·D) on a row's T embeddings of width D"
    )
    composite_weight_decay: PositiveFloat | None = Field(
        None, description="λ of a decoupled weight decay of ½·λ·‖s·B·A‖² instead of optimizer.weight_decay on A and B, per unit of learning rate")  # fmt: skip
    scale_weight_norms: PositiveFloat | None = Field(
        None, description="largest Frobenius norm of a module's s·B·A: above it A and B are scaled down alike after each step")  # fmt: skip

    epochs: PositiveInt | None = Field(None, description="passes over the training data; this or max_steps")
    max_steps: PositiveInt | None = Field(
        None, description="optimizer steps after which the run ends, also within an epoch"
    )
    lr_scheduler: Literal["constant", "none", "cosine"] = Field(
        "constant", description="after warmup: constant, or cosine down to lr_min at the end of the run"
    )
    warmup_steps: NonNegativeFloat = Field(
        0,
        description="optimizer steps of linear warmup from lr/warmup_steps to lr; between 0 and 1, a fraction of an epoch",
    )
    force_constant_lr: PositiveFloat | None = Field(
        None, description="use this learning rate throughout, whatever schedule or checkpoint say"
    )
    micro_batch_size_per_gpu: PositiveInt = Field(
        1, description="rows (units of preference data) per micro-batch and replica; not used with batch_size_tokens"
    )
    batch_size_tokens: PositiveInt | None = Field(
        None, description="tokens, padding included, per micro-batch and replica"
    )
    gradient_accumulation_steps: PositiveInt = Field(1, description="micro-batches per optimizer step and replica")
    gradient_clipping: NonNegativeFloat = Field(
        1.0, description="largest norm of the gradient over all stages; 0 for no clipping"
    )
    group_by_length: bool = Field(False, description="put rows of similar length in one micro-batch")
    seed: int = Field(42, ge=0, le=2**32 - 1, description="of shuffling, initialisation and dropout")

    pipeline_stages: PositiveInt = Field(
        description="parts the model is cut into; must divide the number of processes, what is left is data parallel"
    )
    layers_per_stage: list[PositiveInt] | None = Field(
        None, description="decoder layers per stage, e.g. [21, 19]; default: balanced by a cost model"
    )
    use_column_major_topology: bool | None = Field(
        None,
        description="neighbouring stages on neighbouring ranks, so that they are on one node as far as it goes, and replicas across nodes; false: the replicas of a stage are neighbours; default true on several nodes. No number depends on it",
    )
    link_gbit_per_s: PositiveFloat | None = Field(
        None,
        description="Gbit/s of the network between two nodes, for plans; default: measured at the start of a run over nodes, 10 for --plan",
    )
    activation_checkpointing: Annotated[bool | Literal["unsloth", "auto"], BeforeValidator(not_built)] = Field(
        False, description="true recomputes each decoder layer in backward; 'unsloth' also keeps the layer inputs in pinned host memory; 'auto' lets the planner choose the stages' layers and what each layer keeps, recomputes or puts into host memory (--plan shows it)")  # fmt: skip
    host_memory_gib: NonNegativeFloat = Field(
        0.0, description="GiB of pinned host memory for kept activations, of each node, all its processes together; for 'auto', and for 'unsloth' a limit (0: what it needs)")  # fmt: skip
    kernels: Literal["auto", "all", "none"] | list[Literal["norm", "rope", "swiglu", "multiplicative", "parallel_block", "shared_input"]] = Field(
        "auto", description="our own forward and backward of norms, rotary embeddings, gated MLPs, MLPs with a multiplicative adapter and, with those, the sum of a parallel block, and of linear layers that read one input, which keep the least an exact backward needs (172 KB a token and layer of Command-R where transformers keeps 284); 'auto': 'all' on devices on which they were checked (the CPU; a GPU once `make gpu-check` has passed on its kind and its results are committed), else 'none'")  # fmt: skip
    model_weight_dtype: Dtype = Field("bfloat16", description="of the base weights")
    lora_weight_dtype: Dtype = Field(
        "float32",
        description="of the adapter and its optimizer state; its gradients accumulate in float32 whatever this says",
    )
    attn_implementation: str | None = Field(
        None,
        description="attention by transformers' name: 'flash_attention_2', 'flash_attention_3', 'flex_attention', 'sdpa', 'eager', or a kernel of the Hub's ('kernels-community/flash-attn2', with the package kernels); tried against eager on a tiny copy of the model first; default: sdpa where the model supports it",
    )

    logging_steps: PositiveInt = Field(1, description="optimizer steps between lines of metrics")
    steps_per_print: PositiveInt = Field(1, description="optimizer steps between lines on the console")
    grad_norm_steps: PositiveInt | None = Field(
        None, description="optimizer steps between lines of metrics with the gradient's norm by layer (grad_norm/<layer>); default never")  # fmt: skip
    trackers: list[Tracker] = Field(
        [], description="what follows the run beside metrics.jsonl and TensorBoard's events, each by its own package: 'wandb', 'trackio', 'mlflow', …")  # fmt: skip
    tracker_project: str = Field("mulora-pipe", min_length=1, description="the project (experiment) in them")
    tracker_options: dict[str, dict[str, Any]] = Field(
        {}, description="by tracker, what its package's init is given: { wandb = { entity = 'us', tags = ['books'] } }"
    )
    eval_steps: PositiveInt | None = Field(None, description="optimizer steps between evaluations")
    eval_before_first_step: bool = Field(False, description="evaluate before training; not after a resume")
    eval_after_last_step: bool = Field(False, description="evaluate at the end of the run")
    early_stopping_patience: PositiveInt | None = Field(
        None, description="evaluations in a row without a better loss after which the run ends, as if this had been its last step; the loss is the mean of the sets' losses; default never")  # fmt: skip
    early_stopping_min_delta: NonNegativeFloat = Field(
        0.0, description="how much lower a loss has to be, in nats, to be better for early_stopping_patience"
    )
    load_best_at_end: bool = Field(
        False, description="what follows the run (after_training, the commands that it ends with) takes best_loss/ instead of what was saved at the last step")  # fmt: skip
    eval_gradient_accumulation_steps: PositiveInt = Field(
        1, description="accepted, without effect: an evaluation set always goes through one full pipeline, and its loss does not depend on how it is cut")  # fmt: skip
    report_every_minutes: NonNegativeFloat = Field(
        5, description="minutes between reports, report.html in the run's folder, while the run goes on; also written at its end; 0 for none")  # fmt: skip
    save_steps: PositiveInt | None = Field(None, description="optimizer steps between saves of the adapter (step<N>/)")
    save_every_n_epochs: PositiveInt = Field(
        1, description="epochs between saves of the adapter (epoch<N>/); the end of a run is always saved"
    )
    save_checkpoint_on_epoch_end: bool = Field(True, description="write a checkpoint at the end of each epoch")
    checkpoint_every_n_minutes: PositiveFloat | None = Field(
        None, description="minutes between checkpoints (global_step<N>/)"
    )
    checkpoint_on_save: bool = Field(
        False, description="write a checkpoint with each save of the adapter; then not by the minute"
    )
    hang_timeout_minutes: NonNegativeFloat = Field(
        10, description="without progress on any process, and three times the longest step (evaluation, save) so far, the run says which process hangs, saves what can be saved and ends with exit code 6; six times this for the first of each; 0 never")  # fmt: skip
    keep_states: int = Field(-1, ge=-1, description="newest step<N>/ and global_step<N>/ to keep, each; -1 keeps all")
    save_dtype: Dtype | None = Field(None, description="of a saved adapter or model; default as trained")
    resume_from_checkpoint: bool | str = Field(
        False, description="true: the newest complete checkpoint under output_dir; or the path of a run or a checkpoint"
    )
    load_optimizer_states: bool = Field(True, description="false starts the optimizer afresh on resuming")
    after_training: list[rules.Part] = Field(
        [], description="what follows a run that reached its end, with what was saved at the last step, in this order whatever the list's: 'merge' (merged/ in the run's folder), 'export:peft' (peft/), 'export:gguf' (gguf/), 'card' (README.md in each of them, or in step<N>/ where there is none), 'push' (the first of merged/, peft/, gguf/ and step<N>/ that there is, to hub_model_id)")  # fmt: skip
    hub_model_id: Annotated[str, AfterValidator(rules.hub_id)] | None = Field(
        None, description="OWNER/NAME of the repository on the Hub; required by 'push', which needs a token as well"
    )
    hub_private_repo: bool = Field(True, description="the repository is private; one that is public is then refused")
    hub_base_model: Annotated[str, AfterValidator(rules.hub_id)] | None = Field(
        None, description="OWNER/NAME of the base model on the Hub, which cards and adapters then name; default: known if model is in a Hub cache")  # fmt: skip

    dataset_combination_mode: Literal["concatenate", "interleave"] = Field(
        "concatenate", description="how several [[datasets]] become one"
    )
    dataset_interleave_stopping_strategy: Literal["first_exhausted", "all_exhausted"] = Field(
        "first_exhausted", description="when an interleaved epoch ends"
    )
    mix_by: Literal["rows", "tokens", "targets"] | None = Field(
        None, description="what sample_weight weighs when datasets are interleaved: 'rows' by chance; 'tokens' or 'targets' (trained tokens) by turns, each dataset's share kept to within one row all through an epoch (docs/mixing.md); default 'rows', with batch_size_tokens the chance of a token")  # fmt: skip
    dataset_processes: PositiveInt | None = Field(
        None,
        description="processes that prepare the data; default one for each core, and one for less than 16 MiB of text",
    )
    optimizer: Optimizer
    quantization: Quantization | None = Field(None, description="of the base weights; default none")
    peft: Peft | None = Field(
        None, description="of adapter_type = 'peft': the type and PEFT's own keys for it; default none"
    )
    samples: Samples | None = Field(None, description="what the model says while it is trained; default none")
    objective: Objective | None = Field(None, description="what is minimised; default the next token")
    rl: Rl | None = Field(None, description="qlora-pipe's name for [objective]; one of the two")
    sampling: Sampling | None = Field(
        None,
        description="how answers are drawn that are trained on (rejected = 'generate'); default all of their defaults",
    )
    rejected_sampling: bool = Field(
        False,
        description="qlora-pipe's: rejected = 'generate' for each of [[datasets]] that is of pairs and says nothing else",
    )
    rejected_sampling_max_new_tokens: PositiveInt | None = Field(
        None, description="qlora-pipe's name for sampling.max_new_tokens"
    )
    datasets: list[Dataset] = Field(min_length=1)
    eval_datasets: list[EvalDataset] = Field([])

    @field_validator("model", "output_dir")
    @classmethod
    def _home_is_known(cls, value: str) -> str:
        return os.path.expanduser(value)

    @model_validator(mode="before")
    @classmethod
    def _rejected_sampling_is_of_datasets(cls, raw: Any) -> Any:
        return with_rejected_sampling(raw) if isinstance(raw, dict) else raw

    @field_validator("layers_to_transform")
    @classmethod
    def _layers_are_ranges(cls, value: str | None) -> str | None:
        if value is not None:
            layer_ranges(value)
        return value

    @field_validator("layers_to_transform", mode="before")
    @classmethod
    def _layers_are_text(cls, value: Any) -> Any:
        if isinstance(value, list) and value and all(type(layer) is int and layer >= 0 for layer in value):
            raise ValueError(f"layers are written as text: layers_to_transform = '{as_ranges(value)}'")
        return value

    @field_validator("resume_from_checkpoint", mode="before")
    @classmethod
    def _resume_is_no_word(cls, value: Any) -> Any:
        if isinstance(value, str) and value.strip().lower() in ("true", "false", "yes", "no", "none", "null", ""):
            raise ValueError("write true or false without quotes; text is the path of a run or a checkpoint")
        return value

    @field_validator("datasets", "eval_datasets", mode="before")
    @classmethod
    def _datasets_are_several(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, dict):
            raise ValueError(f"is one table; write [[{info.field_name}]] with double brackets, once for each dataset")
        return value

    @model_validator(mode="after")
    def _rules_between_keys(self) -> Self:
        problems = list(self._conflicts())
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _conflicts(self) -> Any:
        """What single keys cannot say: one line per broken rule."""
        values = {key: getattr(self, key) for key in (*rules.FAMILY_KEYS, *rules.OF_ADAPTERS)}
        loraplus = self.optimizer.loraplus != 1
        if not self.full_fine_tune:
            yield from rules.family_conflicts(
                self.adapter_type,
                self.model_fields_set,
                values,
                quantised=self.quantization is not None,
                loraplus=loraplus,
            )
            if self.peft is not None and self.adapter_type == peft_types.PEFT:
                yield from peft_types.conflicts(
                    self.peft.model_dump(),
                    quantised=self.quantization is not None,
                    dropout=self.lora_dropout,
                    dtypes=(self.lora_weight_dtype, self.model_weight_dtype),
                )
        else:
            for key in ("layers_to_transform", "adapter_type", "use_dora", "peft", "target_parameters"):
                if key in self.model_fields_set and getattr(self, key):
                    yield f"{key}: has no meaning with full_fine_tune = true; remove one of them"
            yield from rules.full_fine_tune_conflicts(values, loraplus=loraplus)
        yield from rules.after_training_conflicts(self.after_training, self.hub_model_id, self.full_fine_tune)
        if self.samples is not None:
            yield from rules.samples_conflicts(
                self.samples.model_dump(), full_fine_tune=self.full_fine_tune, in_full=self.trainable_modules
            )
        yield from rules.tracker_conflicts(self.trackers, self.tracker_options)
        if self.target_modules == [] and not self.target_parameters:
            yield "target_modules: names no module; leave the key out for the default"
        yield from (*self._conflicts_of_generation(), *self._conflicts_of_streaming())
        if self.epochs is None and self.max_steps is None:
            yield "epochs: give epochs, max_steps, or both"
        evaluates = self.eval_datasets or any(dataset.eval_size for dataset in self.datasets)
        yield from rules.evaluation_conflicts({k: getattr(self, k) for k in rules.OF_EVALUATION}, bool(evaluates))
        if self.mix_by is not None and self.dataset_combination_mode != "interleave":
            yield "mix_by: only applies when dataset_combination_mode is 'interleave'; set that, or remove it"
        if self.mix_by in ("tokens", "targets") and self.group_by_length:
            yield f"mix_by: '{self.mix_by}' has an order of its own, which group_by_length = true would undo; remove one of them"
        if self.layers_per_stage is not None and len(self.layers_per_stage) != self.pipeline_stages:
            yield f"layers_per_stage: has {len(self.layers_per_stage)} entries, but pipeline_stages = {self.pipeline_stages}"
        if self.warmup_steps > 1 and self.warmup_steps != int(self.warmup_steps):
            yield f"warmup_steps: {self.warmup_steps} is neither a whole number of steps nor a fraction of an epoch below 1"
        if self.optimizer.lr_min > self.optimizer.lr:
            yield f"optimizer.lr_min: {self.optimizer.lr_min} is above optimizer.lr = {self.optimizer.lr}"
        for key in ("model_weight_dtype",) if self.full_fine_tune else ("model_weight_dtype", "lora_weight_dtype"):
            if getattr(self, key) == "float16":
                yield f"{key}: float16 gradients below 6e-8 vanish, and nothing here scales losses; use bfloat16 or float32"
        if self.host_memory_gib and self.activation_checkpointing not in ("auto", "unsloth"):
            yield "host_memory_gib: only applies when activation_checkpointing is 'auto' or 'unsloth'"
        if self.quantization is not None:
            yield from self._conflicts_of_quantization(self.quantization.bnb)
        if self.keep_states == 0:
            yield "keep_states: 0 would keep nothing; -1 keeps all, 1 the newest"
        datasets: list[Dataset | EvalDataset] = [*self.datasets, *self.eval_datasets]
        implicit = [f"dataset{i}" for i in range(len(self.datasets))] + [
            f"eval{i}" for i in range(len(self.eval_datasets))
        ]
        names = [d.name or default for d, default in zip(datasets, implicit, strict=True)]
        for number, dataset in enumerate(self.datasets):
            yield from data_tables.conflicts(f"datasets.{number}", dataset)
            if dataset.eval_split == "document" and not dataset.eval_size:
                yield f"datasets.{number}.eval_split: 'document' holds nothing out without eval_size"
        for number, held_out in enumerate(self.eval_datasets):
            yield from data_tables.conflicts(f"eval_datasets.{number}", held_out)
        for name in sorted({n for n in names if names.count(n) > 1}):
            yield f"datasets.name: '{name}' is used more than once; metrics need one name per dataset"

    def _conflicts_of_streaming(self) -> Iterator[str]:
        if not any(dataset.streaming for dataset in self.datasets):
            return
        if len(self.datasets) > 1:
            yield "datasets: one with streaming = true is a run's only one; remove the others, or have all of them prepared"
        if self.max_steps is None:
            yield "max_steps: required with streaming = true, as nobody knows how many rows there are"
        if self.epochs is not None:
            yield "epochs: with streaming = true nobody knows where an epoch ends; remove it: max_steps ends the run"
        if self.save_every_n_epochs != 1:
            yield "save_every_n_epochs: with streaming = true there are no epochs; use save_steps"
        if 0 < self.warmup_steps < 1:
            yield f"warmup_steps: {self.warmup_steps} is a part of an epoch, and with streaming = true there are none; give a number of steps"

    def _conflicts_of_generation(self) -> Iterator[str]:
        if self.rejected_sampling and not any(dataset.generates for dataset in self.datasets):
            yield "rejected_sampling: none of [[datasets]] is of pairs (dataset_type = 'preference') whose rejected answer could be given"
        if self.sampling is not None and not any(dataset.generates for dataset in self.datasets):
            yield "sampling: has a meaning with rejected = 'generate' of a dataset only; [samples] shows what the model says"

    def _conflicts_of_quantization(self, bnb: Bnb) -> Iterator[str]:
        if self.full_fine_tune:
            yield "quantization: 4-bit and 8-bit weights cannot be trained; remove it or full_fine_tune"
        yield from conflicts_of_bits(bnb)
        if bnb.load_in_8bit and self.activation_checkpointing == "auto":
            yield "activation_checkpointing: 'auto' is not built over 8-bit weights; write true, false or 'unsloth'"
