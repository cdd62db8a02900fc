"""What is minimised, as functions of a stage's normed hidden state and a micro-batch's labels."""
