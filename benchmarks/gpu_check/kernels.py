"""The kernels as this device runs them, against fp64."""

import torch

from benchmarks import correctness
from benchmarks.gpu_check.setting import Outcome, Setting
from pipeline.kernels import dispatch


def check(given: Setting) -> Outcome:
    """Results and gradients of every kernel in bf16 and fp32; on a GPU they must be the Triton kernels."""
    compiled = dispatch.takes_triton(torch.ones(1, device=given.device))
    rows = [
        {"dtype": dtype, **row}
        for dtype in ("bfloat16", "float32")
        for row in correctness.check(given.large._replace(dtype=dtype), given.device)
    ]
    return Outcome(
        passed=all(row["good"] for row in rows) and (compiled or given.device.type != "cuda"),
        compared=f"{'Triton' if compiled else 'PyTorch'} forms of the kernels, results and all gradients, with fp64",
        tolerance="‖error‖/‖exact‖ at most 1.5 × that of PyTorch's autograd in the same dtype, and half a unit in the last place",
        figures={"triton": compiled, "kernels": rows},
    )
