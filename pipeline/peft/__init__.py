"""PEFT's own types of adapters: what they are, without PEFT (types.py), and PEFT's layers (layers.py), which is imported late."""
