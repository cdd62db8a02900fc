"""What the tests of the kernels share: the paths to test, the measure of error, what is saved, Triton without a GPU.

Each test file of a kernel runs twice. In an ordinary run its tests take the PyTorch path on the CPU and, where there is
a GPU, the compiled kernels. `through_interpreter` runs the same file once more in a process of its own with
TRITON_INTERPRET=1, which Triton reads when it is imported: there the tests take the Triton path on CPU tensors.
"""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.helpers.paths import ROOT

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = [torch.float32, torch.bfloat16]
# GPUs the project names: A100, A6000, H100 and H200.
COMPUTE_CAPABILITIES = [80, 86, 90]


class PathUnderTest(NamedTuple):
    """Where tensors live and whether the Triton kernels run."""

    device: str
    use_triton: bool

    def __str__(self) -> str:
        return f"{'triton' if self.use_triton else 'pytorch'}-{self.device}"


def _paths() -> list[PathUnderTest]:
    if INTERPRETED:
        return [PathUnderTest("cpu", True)]
    gpu = [PathUnderTest("cuda", True)] if torch.cuda.is_available() and importlib.util.find_spec("triton") else []
    return [PathUnderTest("cpu", False), *gpu]


PATHS = _paths()
every_path = pytest.mark.parametrize("path", PATHS, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# Nothing about these tests would be different in the interpreter's process.
once = pytest.mark.skipif(INTERPRETED, reason="does not depend on the interpreter")


def rounding(dtype: torch.dtype) -> float:
    """Largest relative error of one rounding to `dtype`: half a unit in the last place; a whole one in the interpreter.

    Triton's interpreter (3.7.1) cuts fp32 to bf16 off instead of rounding it. fp32 needs no cast.
    """
    whole = torch.finfo(dtype).eps
    return whole if INTERPRETED and dtype == torch.bfloat16 else whole / 2


def assert_no_worse(found: Tensor, theirs: Tensor, right: Tensor, margin: float) -> None:
    """‖found − right‖ ≤ ‖theirs − right‖ + margin, with everything of right's shape; margin in right's units."""
    assert found.shape == theirs.shape == right.shape
    right = right.double().cpu()
    ours, other = (float((t.double().cpu() - right).norm()) for t in (found, theirs))
    assert ours <= other + margin, f"error {ours:.3g}, transformers' {other:.3g}, margin {margin:.3g}"


def norm(x: Tensor) -> float:
    """‖x‖ in fp64."""
    return float(x.double().norm())


def kept_for_backward(function: Callable[[], Any]) -> list[Tensor]:
    """The tensors that `function` saves for backward; fails if its Function holds tensors beside them."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = function()
    node = (out[0] if isinstance(out, tuple) else out).grad_fn
    held = getattr(node, "__dict__", {}).values()
    assert not [v for v in held if isinstance(v, Tensor)], "tensors beside the saved ones"
    return kept


def n_bytes(tensors: list[Tensor], apart_from: tuple[Tensor, ...] = ()) -> int:
    """Bytes of the storages of `tensors`, each counted once, without those of `apart_from`; meta tensors too."""
    known = {t.untyped_storage()._cdata for t in apart_from}
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(size for storage, size in storages.items() if storage not in known)


def without_triton(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A second copy of kernels/`name`.py, imported as on a machine where Triton is not installed."""
    for module in [m for m in sys.modules if m in ("triton", "pipeline.kernels.dispatch") or m.startswith("triton.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "triton", None)  # `import triton` raises ImportError
    spec = importlib.util.spec_from_file_location(f"{name}_without_triton", ROOT / "kernels" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_fake_tensors_avoid_triton(kernel: ModuleType) -> None:
    """A fake tensor on a GPU, as planning has them, holds no data that a kernel could read."""
    with FakeTensorMode():
        assert not kernel.takes_triton(torch.empty(2, 3, 64, 8, device="cuda", dtype=torch.bfloat16))


def through_interpreter(test_file: str) -> None:
    """Run the tests of `test_file` with the Triton kernels interpreted on the CPU; fails with their output."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", test_file],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    counted = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert counted, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(counted[1]) > 0, done.stdout[-6000:] + done.stderr[-2000:]


def assert_compiles_lean(
    capability: int, kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int
) -> None:
    """`kernel`, compiled for a GPU that need not be here, spills no registers and moves 128 bits at a time.

    Integers and pointers count as divisible by 16, which they are at real dimensions. TRITON_CACHE_DIR must be set.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    at = {n: (i,) for i, n in enumerate(names)}
    divisible = {at[n]: [["tt.divisibility", 16]] for n in names if signature[n] not in ("constexpr", "fp32")}
    source = ASTSource(kernel, signature, {at[n]: v for n, v in constants.items()}, divisible)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    cubin = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
    cubin.write_bytes(made.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert "STACK:0 " in usage, usage
    assert "ld.global.v4" in made.asm["ptx"]
    assert "st.global.v4" in made.asm["ptx"]
