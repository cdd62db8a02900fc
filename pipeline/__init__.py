"""mulora-pipe, in the order in which data flows.

    config.loading.load              one TOML (and the command line) → one validated `Config`
    formats.hub.model_folder         a model's name on the Hub → its folder in the Hub's cache, downloaded once
    formats.base_model.read_base     a model's folder → its tensors' places, its config, which tensor is the head
    training.start.resolve           the model's structure on `meta`, what is trained, each stage's layers: one `Resolved`
    training.data.read               the rows of a run: every dataset read by one of the next three, checked against the model
    data.reading.documents           files → documents
    data.chunks.build                documents → one token stream → chunks of `sequence_len` in a memory-mapped cache
    data.rows.build                  conversations, completions, token ids → rows with runs of targets, in the same cache
    data.batches.MicroBatches        rows of any store (data.row_store) → the micro-batches of a step, from nothing but a position
    training.start.plan              which stage owns which layers, and what each layer keeps for backward
    model.stage.Stage                the Hugging Face model without the parts its stage does not own
    model.weights.load               safetensors → the stage's own tensors, one at a time
    training.stage.parts             what is trained, put into the stage; model.fusion: our kernels, where they fit
    model.memory.activation          each layer keeps, recomputes or puts into host memory what the plan says
    objectives.language_modelling    an `Objective`: hidden state and named tensors → loss, without the logits of a whole chunk
    training.engine.engine.build     a stage → DeepSpeed's pipeline schedule
    training.optim.pipeline_optimizer  gradients in fp32 → one norm over all stages → Kahan-summed AdamW
    training.run.trainer.Trainer     steps, evaluation, saves, stop signals
    training.checkpoint.commit       the state of the last completed step → a folder that is whole or not there
    generation.decoding              prompts → answers through the stages, in a run's samples and in generate.py
    evaluation.scoring               rows → log-probabilities through the stages; evaluation.cells: figures, lights
    artifacts.fold.merge             base + adapters → a merged model; artifacts.export: the exact additive form
    publishing                       after a run: fold, exports, model card, upload to the Hub
    inspection                       what an adapter does, in numbers, tokens and passages

Imports point one way: evaluation → training → planning → objectives, generation → model, data → config, console; `artifacts`
needs neither DeepSpeed nor transformers. Past training.start.resolve only training.run.assemble.trainer sees the config: all
else receives plain values.
"""
