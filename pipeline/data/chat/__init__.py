"""Conversations → rows of token ids with the runs of them that are trained, by rendering the model's own chat template."""
