"""What a model says to a prompt: token after token, in one process or over the stages of a pipeline."""
