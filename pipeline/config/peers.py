"""Keys that axolotl, LLaMA-Factory, transformers, TRL and PEFT write, and what stands for them here.

Takes an unknown key; gives what to write instead, with the unit where it differs. This goes before the nearest spelling,
which for these keys would often be another thing altogether (`learning_rate` is not `logging_steps`).
"""

LR = "optimizer.lr"
QUANTISED = "[quantization.bnb] load_in_4bit = true"
ADAPTER = "adapter_type = 'multiplicative_lora', 'lora', …; or full_fine_tune = true"
DTYPE = "model_weight_dtype for the base and lora_weight_dtype for the adapter, 'bfloat16' or 'float32'"
PATH = "[[datasets]] with dataset_type, dataset_path and sequence_len"
LENGTH = "datasets.0.sequence_len (tokens per chunk, exactly; of chat and completion per row, at most)"
HELD_OUT = "datasets.0.eval_size (a fraction below 1, or a number of chunks)"
RECOMPUTE = "activation_checkpointing = true, 'unsloth' or 'auto'"
ATTENTION = "attn_implementation = 'flash_attention_2', 'sdpa' or 'eager'"
IN_FULL = "trainable_modules (trained in full beside the adapter)"
KERNELS = "kernels = 'all'"
STAGES = "pipeline_stages (and deepspeed --num_gpus N)"
PREFERENCE = "[objective] type = 'preference'"
TEMPLATE = "datasets.0.chat_template (a file, a text of Jinja, or 'chatml', 'llama3', …)"
TRACKERS = "trackers = ['wandb', 'mlflow', …] (TensorBoard's events are written anyway)"
PACKING = "datasets.0.packing = 'best_fit' or 'stream' (of chat, completion and pretokenized; books are a stream, in which document_mask = true keeps documents apart)"
FULL_CHUNKS = "no counterpart: books are cut into full chunks, nothing is padded"

MODEL = "model (a folder, or 'OWNER/NAME' on the Hub)"
REVISION = "model = 'OWNER/NAME@REVISION'"

INSTEAD: dict[str, str] = {
    # model
    "base_model": MODEL,
    "model_name_or_path": MODEL,
    "model_name": MODEL,
    "model_path": MODEL,
    "base_model_config": MODEL,
    "pretrained_model": MODEL,
    "model_revision": REVISION,
    "revision_of_model": REVISION,
    "revision": REVISION,
    "tokenizer": "no counterpart: the tokenizer in the model's folder is used",
    "tokenizer_name_or_path": "no counterpart: the tokenizer in the model's folder is used",
    "trust_remote_code": "no counterpart: code from a model's folder is never run",
    "torch_dtype": DTYPE,
    "dtype": DTYPE,
    "bf16": DTYPE,
    "fp16": DTYPE,
    "pure_bf16": DTYPE,
    "tf32": DTYPE,
    "bfloat16": DTYPE,
    "float16": DTYPE,
    "half": DTYPE,
    "load_in_8bit": "[quantization.bnb] load_in_8bit = true",
    "quantization_bit": QUANTISED,
    "bits": QUANTISED,
    "quantization_method": QUANTISED,
    "flash_attention": ATTENTION,
    "flash_attn": ATTENTION,
    "use_flash_attention_2": ATTENTION,
    "sdp_attention": ATTENTION,
    "xformers_attention": ATTENTION,
    "flex_attention": ATTENTION,
    # what is trained
    "adapter": ADAPTER,
    "finetuning_type": ADAPTER,
    "peft_type": ADAPTER,
    "use_peft": ADAPTER,
    "tuner_type": ADAPTER,
    "lora_r": "lora_rank",
    "r": "lora_rank",
    "rank": "lora_rank",
    "alpha": "lora_alpha",
    "lora_target_modules": "target_modules",
    "lora_target_parameters": "target_parameters",
    "router_aux_loss_coef": "load_balancing_loss_coef",
    "lora_target": "target_modules",
    "target_module": "target_modules",
    "lora_target_linear": "target_modules = 'all-linear'",
    "lora_modules_to_save": IN_FULL,
    "additional_target": IN_FULL,
    "unfrozen_parameters": IN_FULL,
    "lora_layers_to_transform": "layers_to_transform = '0:38' (both ends included)",
    "peft_layers_to_transform": "layers_to_transform = '0:38' (both ends included)",
    "peft_use_dora": "use_dora",
    "lora_use_dora": "use_dora",
    "peft_use_rslora": "use_rslora",
    "lora_use_rslora": "use_rslora",
    "peft_init_lora_weights": "init_lora_weights",
    "pissa_init": "init_lora_weights = 'pissa'",
    "lora_model_dir": "init_adapter (a folder)",
    "adapter_name_or_path": "init_adapter (a folder)",
    "noisy_embedding_alpha": "neftune_noise_alpha",
    # steps and batches
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "n_epochs": "epochs",
    "max_train_steps": "max_steps",
    "per_device_train_batch_size": "micro_batch_size_per_gpu",
    "micro_batch_size": "micro_batch_size_per_gpu",
    "batch_size": "micro_batch_size_per_gpu (rows per micro-batch and replica)",
    "train_batch_size": "micro_batch_size_per_gpu × gradient_accumulation_steps × replicas",
    "per_device_eval_batch_size": "no counterpart: evaluation takes micro_batch_size_per_gpu",
    "eval_batch_size": "no counterpart: evaluation takes micro_batch_size_per_gpu",
    "max_grad_norm": "gradient_clipping",
    "gradient_checkpointing": RECOMPUTE,
    "use_gradient_checkpointing": RECOMPUTE,
    "gradient_checkpointing_kwargs": RECOMPUTE,
    "activation_offloading": "activation_checkpointing = 'unsloth'",
    "data_seed": "seed",
    # optimizer and schedule
    "learning_rate": LR,
    "optim": "optimizer.type",
    "optimizer_type": "optimizer.type",
    "adam_beta1": "optimizer.beta1",
    "adam_beta2": "optimizer.beta2",
    "adam_epsilon": "optimizer.eps",
    "adam_eps": "optimizer.eps",
    "lr_scheduler_type": "lr_scheduler = 'constant' or 'cosine'",
    "scheduler": "lr_scheduler = 'constant' or 'cosine'",
    "warmup_ratio": "warmup_steps (steps; between 0 and 1 a fraction of an epoch, not of the run)",
    "num_warmup_steps": "warmup_steps",
    "lr_warmup_steps": "warmup_steps",
    "min_lr": "optimizer.lr_min",
    "cosine_min_lr_ratio": "optimizer.lr_min (a learning rate, not a ratio)",
    "min_lr_ratio": "optimizer.lr_min (a learning rate, not a ratio)",
    "loraplus_lr_embedding": "[[optimizer.groups]] with names and lr_ratio",
    # data
    "dataset": PATH,
    "dataset_name": PATH,
    "train_file": PATH,
    "train_data": PATH,
    "data_path": PATH,
    "dataset_dir": PATH,
    "test_datasets": "[[eval_datasets]]",
    "eval_dataset": "[[eval_datasets]]",
    "validation_file": "[[eval_datasets]]",
    "cutoff_len": LENGTH,
    "max_seq_length": LENGTH,
    "max_seq_len": LENGTH,
    "max_length": LENGTH,
    "block_size": LENGTH,
    "model_max_length": LENGTH,
    "seq_length": LENGTH,
    "seq_len": LENGTH,
    "val_set_size": HELD_OUT,
    "val_size": HELD_OUT,
    "test_size": HELD_OUT,
    "eval_split_size": HELD_OUT,
    "dataset_prepared_path": "no counterpart: the cache is OUTPUT_DIR/dataset_cache",
    "sample_packing": PACKING,
    "packing": PACKING,
    "pad_to_sequence_len": FULL_CHUNKS,
    "eval_sample_packing": "eval_datasets.0.packing = 'best_fit' (what datasets.0.eval_size holds out is packed as that is)",
    "dataset_text_field": "datasets.0.field_text",
    "text_column": "datasets.0.field_text",
    "chat_template": TEMPLATE,
    "chat_template_jinja": TEMPLATE,
    "template": TEMPLATE,
    "train_on_inputs": "no counterpart: of chat and completion only the answers are trained (datasets.0.train_on)",
    "assistant_only_loss": "no counterpart: of chat and completion only the answers are trained (datasets.0.train_on)",
    "completion_only_loss": "no counterpart: of chat and completion only the answers are trained (datasets.0.train_on)",
    "excess_length_strategy": "datasets.0.too_long",
    "dataset_exact_deduplication": "datasets.0.deduplicate",
    "mix_strategy": "dataset_combination_mode = 'interleave', mix_by and datasets.0.sample_weight",
    "interleave_probs": "datasets.0.sample_weight",
    "dataset_num_proc": "dataset_processes",
    "preprocessing_num_workers": "dataset_processes",
    "dataloader_num_workers": "no counterpart: chunks are read as they are needed",
    "streaming": "no counterpart: text is tokenised into a cache on disk",
    "max_samples": "datasets.0.subsample (a fraction)",
    # evaluation, saving, logging
    "evaluation_strategy": "eval_steps (optimizer steps)",
    "eval_strategy": "eval_steps (optimizer steps)",
    "evals_per_epoch": "eval_steps (optimizer steps)",
    "saves_per_epoch": "save_steps (optimizer steps)",
    "save_strategy": "save_steps (optimizer steps) or save_every_n_epochs",
    "save_total_limit": "keep_states",
    "auto_resume_from_checkpoints": "resume_from_checkpoint = true",
    "save_safetensors": "no counterpart: always safetensors",
    "push_to_hub": "after_training = ['push'] with hub_model_id",
    "load_best_model_at_end": "load_best_at_end",
    "early_stopping": "early_stopping_patience",
    "early_stopping_threshold": "early_stopping_min_delta",
    "metric_for_best_model": "no counterpart: the mean of the evaluation sets' losses decides",
    "greater_is_better": "no counterpart: the mean of the evaluation sets' losses decides",
    "report_to": TRACKERS,
    "use_wandb": TRACKERS,
    "wandb_project": "tracker_project (and trackers = ['wandb'])",
    "wandb_entity": "[tracker_options.wandb] entity",
    "wandb_name": "[tracker_options.wandb] name",
    "wandb_run_id": "[tracker_options.wandb] id",
    "wandb_mode": "[tracker_options.wandb] mode (or the variable WANDB_MODE)",
    "use_mlflow": TRACKERS,
    "mlflow_experiment_name": "tracker_project (and trackers = ['mlflow'])",
    "logging_dir": "no counterpart: TensorBoard's events are in the run's folder",
    "run_name": "[tracker_options.wandb] name; the run's folder is named by its start",
    # machines
    "deepspeed": "no key: --deepspeed_config JSON on the command line",
    "fsdp": STAGES,
    "fsdp_config": STAGES,
    "tensor_parallel_size": STAGES,
    "pipeline_parallel_size": STAGES,
    "pipeline_model_parallel_size": STAGES,
    "num_gpus": STAGES,
    "use_liger_kernel": KERNELS,
    "liger_rope": KERNELS,
    "liger_rms_norm": KERNELS,
    "lora_mlp_kernel": KERNELS,
    "lora_qkv_kernel": KERNELS,
    "lora_o_kernel": KERNELS,
    "unsloth": KERNELS,
    # other trainings
    "stage": f"{PREFERENCE} (or leave it out)",
    "pref_beta": f"{PREFERENCE} with beta",
    "beta": f"{PREFERENCE} with beta",
    "dpo_beta": f"{PREFERENCE} with beta",
    "loss": f"{PREFERENCE} with loss_type",
    "label_smoothing_factor": "no counterpart: the loss is plain cross-entropy",
}
# What axolotl and others write within a dataset.
IN_DATASETS: dict[str, str] = {
    "path": "dataset_path",
    "type": "dataset_type ('textfile', 'doclist', 'chat', 'completion', 'pretokenized', 'preference', 'unpaired' or 'ranked')",
    "ds_type": "dataset_type",
    "data_files": "dataset_path (a file or a glob)",
    "file": "dataset_path",
    "files": "dataset_path (a file or a glob)",
    "weight": "sample_weight",
    "probability": "sample_weight",
    "repeat": "num_repeats",
    "epochs": "num_repeats",
    "split": "no counterpart: name the file",
    "roles_to_train": "no counterpart: the assistant's turns are trained (train_on; `weight` or `train` of a message)",
    "field_instruction": "no counterpart: rows of instructions have instruction, input and output",
    "field_output": "field_completion (of prompts and completions)",
    "message_field_role": "message_property_mappings = { role = '…' }",
    "message_field_content": "message_property_mappings = { content = '…' }",
    "chat_template_jinja": "chat_template (a text of Jinja)",
    "drop_system_message": "no counterpart: leave it out of the rows",
    "field": "field_text (of a doclist)",
    "shards": "subsample (a fraction)",
}
IN_OPTIMIZER: dict[str, str] = {
    "betas": "beta1 and beta2",
    "name": "type",
    "optimizer": "type",
    "rate": "lr",
    "epsilon": "eps",
    "decay": "weight_decay",
    "lr_ratio": "loraplus_lr_ratio, or lr_ratio in [[optimizer.groups]]",
}


IN_OBJECTIVE: dict[str, str] = {
    "taps": "[[objective.tap]]",
    "sync_ref_model": "no counterpart: the reference stays as it was at the start",
    "ref_model_sync_steps": "no counterpart: the reference stays as it was at the start",
    "ref_model_mixup_alpha": "no counterpart: the reference stays as it was at the start",
    "ref_model": "reference = { model = '…' }",
    "reference_free": "loss_type = 'simpo', 'cpo' or 'orpo', which read no reference",
    "precompute_ref_log_probs": "reference = { precompute_ref_log_probs = true }, which is the default",
    "ld_alpha": "no counterpart: LD-DPO weighs tokens, and losses here take rows' sums",
    "use_weighting": "no counterpart: WPO weighs tokens, and losses here take rows' sums",
    "padding_free": "no counterpart: rows of a micro-batch are padded; group_by_length puts like lengths together",
    "rpo_alpha": "loss_type = ['sigmoid', 'sft'] with loss_weights = [1.0, rpo_alpha]",
    "max_length": "datasets.0.sequence_len",
    "max_prompt_length": "no counterpart: rows lose their end (datasets.0.truncation_mode)",
    "truncation_mode": "datasets.0.truncation_mode",
    "disable_dropout": "no counterpart: lora_dropout is 0 unless it is given",
    "gamma": "simpo_gamma",
    "method": "loss_type",
}


def in_table(table: str, key: str) -> str | None:
    """What to write for `key`, which other trainers write in the table `table`; None if it is not known."""
    own = (
        IN_DATASETS
        if table.endswith("datasets")
        else {"optimizer": IN_OPTIMIZER, "objective": IN_OBJECTIVE}.get(table, {})
    )
    return _sentence(own, key)


def anywhere(key: str) -> str | None:
    """What to write for `key`, which other trainers write somewhere; None if it is not known."""
    return _sentence(INSTEAD, key)


def _sentence(table: dict[str, str], key: str) -> str | None:
    answer = table.get(key.lower().replace("-", "_"))
    if answer is None:
        return None
    explains = answer.startswith("no ")
    return f"{answer[0].upper()}{answer[1:]}." if explains else f"Use {answer}."
