"""Memory, work and time of a run, known before it starts: counting on fake tensors, solving, simulating, showing."""
