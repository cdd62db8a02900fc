"""The run: engine, optimizer, steps, evaluation, checkpoints, metrics, stop signals. The only part that knows DeepSpeed."""
