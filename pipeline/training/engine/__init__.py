"""DeepSpeed's pipeline engine: the schedule, the wires and the launcher; nothing of the numerics."""
