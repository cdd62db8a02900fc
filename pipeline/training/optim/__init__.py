"""One optimizer step over all stages, the inner optimizers, and the learning rate of a step."""
