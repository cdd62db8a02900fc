"""Counts on fake tensors: operations, bytes and kept tensors of every part of a model, without computing any."""
