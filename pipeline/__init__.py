"""mulora-pipe, in the order in which data flows.

    config.load              one TOML (and the command line) → one validated `Config`
    formats.base_model       a model's folder → its tensors' places, its config, which tensor is the head
    data.documents.read      files → documents
    data.chunks.build        documents → one token stream → chunks of `sequence_len` in a memory-mapped cache
    data.batches.MicroBatches  chunks → the micro-batches of a step, from nothing but a position
    training.planned         the model's structure → which stage owns which layers, and what each layer keeps for backward
    model.stage.Stage        the Hugging Face model without the parts its stage does not own
    model.weights.load       safetensors → the stage's own tensors, one at a time
    training.stage_parts     what is trained, and our kernels where they fit
    model.activation         each layer keeps, recomputes or puts into host memory what the plan says
    objectives.language_modelling   hidden state → loss, without the logits of a whole chunk
    training.engine.build    a stage → DeepSpeed's pipeline schedule
    training.optimizer       gradients in fp32 → one norm over all stages → Kahan-summed AdamW
    training.trainer.run     steps, evaluation, saves, stop signals
    training.checkpoint      the state of the last completed step → a folder that is whole or not there
    artifacts.merge          base + adapters → a merged model; artifacts.export: the exact additive form
    publishing               after a run: fold, exports, model card, upload to the Hub
    inspection               what an adapter does, in numbers, tokens and passages

Imports point one way: training → planning → objectives, model, data → config, console; `artifacts` needs neither DeepSpeed nor
transformers. Nothing below `training` sees the config object: it receives plain values.
"""
