"""A configuration made for a model, data and GPUs (new_config.py): choose.py lets the planner decide, write.py writes it down."""
