"""Activation memory: what a layer keeps for backward, what it computes again, and what lies in host memory meanwhile."""
