"""Our kernels in a model: where each fits, found by what a module computes."""
