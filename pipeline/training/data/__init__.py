"""A run's data: what the config's tables ask for, read, checked against the model, and dealt out as micro-batches."""
