"""GPUs and what runs on them: drivers, copies, bf16, and the libraries that are used where they are there.

Gives findings; where there is no GPU, of what a run uses then. Imports torch.
"""

import contextlib
import importlib
import importlib.util
import logging
import os
import shutil
import subprocess
from collections.abc import Iterator

import torch

from pipeline.console import gib
from pipeline.machine.findings import Finding
from pipeline.planning import link, rates

SLOW_COPY_BYTES_PER_S = 10e9  # PCIe 3.0 ×16 does 12, 4.0 ×16 24, a card on ×4 lanes 6 or less
SLOW_LINK_BYTES_PER_S = 5e9  # of neighbours: a hidden state of 128 MiB is then 27 ms
TESTED_CAPABILITIES = ((8, 0), (9, 0))  # of which Triton's code was compiled, from and to
PRODUCT = (2048, 2048, 256)  # in, out, rows: of the products that are compared


def look() -> Iterator[Finding]:
    """All of it."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus:
        yield driver()
        for number in range(gpus):
            yield gpu(number)
            yield copies(number)
    else:
        yield no_gpu()
    yield sixteen_bits(torch.device("cuda" if gpus else "cpu"))
    yield neighbours(gpus)
    yield bitsandbytes(torch.device("cuda" if gpus else "cpu"))
    yield triton(on_gpu=bool(gpus))
    yield flash_attention(on_gpu=bool(gpus))


def name_of(device: torch.device) -> str:
    """What the device is called, in plans and in what is remembered of it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"


def no_gpu() -> Finding:
    """Why there may be none."""
    if shutil.which("nvidia-smi") is None:
        return Finding("GPU", "none", f"there is none; runs take the CPU, {torch.get_num_threads()} threads")
    mend = (
        "install the CUDA build of torch, and look at CUDA_VISIBLE_DEVICES"
        if torch.version.cuda is None
        else "nvidia-smi says why: a driver too old for this build of torch, most often"
    )
    return Finding("GPU", "broken", f"torch {torch.__version__} finds none, though nvidia-smi is there", mend)


def driver() -> Finding:
    """The driver, and the CUDA that torch brings."""
    versions = _smi("driver_version")
    return Finding("driver", "ok", f"{versions[0] if versions else 'unknown'}, CUDA {torch.version.cuda} of torch")


def gpu(number: int) -> Finding:
    """One GPU."""
    properties = torch.cuda.get_device_properties(number)
    free, total = torch.cuda.mem_get_info(number)
    capability = (properties.major, properties.minor)
    what, told = (
        f"GPU {number}",
        f"{properties.name}, sm_{properties.major}{properties.minor}, {gib(free)} free of {gib(total)}",
    )
    if capability < TESTED_CAPABILITIES[0]:
        return Finding(
            what,
            "slow",
            told,
            "too old for bf16 and for our kernels: set model_weight_dtype = 'float32', kernels = 'none'",
        )
    if free < 0.9 * total:
        return Finding(what, "slow", told, "another program holds its memory: nvidia-smi shows which")
    return Finding(what, "ok", told)


def copies(number: int) -> Finding:
    """Between the GPU and pinned memory of the host, both ways."""
    device = torch.device("cuda", number)
    out, into = (rates.copy_rate(device, rates.COPY_BYTES, to_host=way) for way in (True, False))
    told = f"{out / 1e9:.1f} GB/s to the host, {into / 1e9:.1f} GB/s from it"
    widths = _smi("pcie.link.gen.max,pcie.link.width.current")
    told += f" (PCIe {widths[number].replace(', ', '.0 ×')})" if number < len(widths) else ""
    if min(out, into) < SLOW_COPY_BYTES_PER_S:
        return Finding(
            f"copies {number}",
            "slow",
            told,
            "the card has few lanes: another slot, or host_memory_gib = 0 and recomputation",
        )
    return Finding(f"copies {number}", "ok", told)


def sixteen_bits(device: torch.device) -> Finding:
    """bf16 products beside fp32 ones."""
    n_in, n_out, rows = PRODUCT
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        weight, x = (torch.randn(n, n_in, device=device, dtype=dtype) for n in (n_out, rows))
        seconds[dtype] = rates.best_seconds(lambda w=weight, x=x: torch.nn.functional.linear(x, w), device, 3)  # type: ignore[misc]
    ratio = seconds[torch.float32] / seconds[torch.bfloat16]
    told = f"products are {ratio:.1f} × as fast as in fp32, on {name_of(device)}"
    if ratio >= 1:
        return Finding("bf16", "ok", told)
    return Finding("bf16", "slow", told, "model_weight_dtype = 'float32' is faster here, where there is room for it")


def neighbours(gpus: int) -> Finding:
    """Two processes that hand something to each other, as the stages of a run do; the rate is kept for plans."""
    if gpus == 1:
        return Finding("between stages", "none", "there is one GPU")
    device = torch.device("cuda", 0) if gpus else torch.device("cpu")
    try:
        found = link.measure(gpus or 2)
    except RuntimeError as error:
        mend = (
            "NCCL_DEBUG=INFO says more; NCCL_P2P_DISABLE=1 goes around a broken peer-to-peer path (IOMMU, ACS)"
            if gpus
            else "GLOO_SOCKET_IFNAME=lo, where the host's own name leads nowhere"
        )
        return Finding("between stages", "broken", str(error), mend)
    with contextlib.suppress(OSError, RuntimeError):  # without a cache plans take the rate of a copy instead
        link.remember(found, name_of(device))
    told = f"{found.bytes_per_s / 1e9:.1f} GB/s over {found.backend}"
    if gpus:
        peers = all(torch.cuda.can_device_access_peer(n, n + 1) for n in range(gpus - 1))
        told += ", peer to peer" if peers else ", through the host"
        if found.bytes_per_s < SLOW_LINK_BYTES_PER_S:
            return Finding("between stages", "slow", told, "an NVLink bridge, or slots on one root complex")
    return Finding("between stages", "ok", told)


def bitsandbytes(device: torch.device) -> Finding:
    """[quantization.bnb] and optimizer.type = 'adamw8bit'."""
    # On some processors it says on import that a faster kernel of the Hub's is not there, which is none of these lines.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        functional = importlib.import_module("bitsandbytes.functional")
        packed, state = functional.quantize_4bit(torch.ones(64, 64, device=device), quant_type="nf4")
        right = bool((functional.dequantize_4bit(packed, state) == 1).all())
    except Exception as error:  # a library of the machine's, which fails in as many ways as there are machines
        return Finding(
            "bitsandbytes", "broken", str(error).splitlines()[0], "pip install -c constraints.txt bitsandbytes"
        )
    if right:
        return Finding("bitsandbytes", "ok", f"packs 4 bits and unpacks them, on {name_of(device)}")
    return Finding(
        "bitsandbytes", "broken", "unpacks other numbers than it packed", "install the version of constraints.txt"
    )


def triton(*, on_gpu: bool) -> Finding:
    """Our kernels on a GPU."""
    if not on_gpu:
        return Finding("Triton", "none", "is for GPUs; our kernels take PyTorch's operations on the CPU")
    if importlib.util.find_spec("triton") is None:
        return Finding(
            "Triton",
            "broken",
            "is not installed",
            "install the CUDA build of torch, which brings it; or kernels = 'none'",
        )
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return Finding("Triton", "broken", "finds no C compiler", "install gcc, or set kernels = 'none'")
    return Finding("Triton", "ok", f"with {compiler}; `make gpu-check` compares our kernels with fp64")


def flash_attention(*, on_gpu: bool) -> Finding:
    """attn_implementation = 'flash_attention_2'."""
    if importlib.util.find_spec("flash_attn") is not None:
        return Finding("flash attention", "ok", "is installed")
    return Finding(
        "flash attention",
        "none",
        "is not installed; sdpa is used" + (", which for packed rows builds masks" if on_gpu else ""),
    )


def _smi(query: str) -> list[str]:
    """nvidia-smi's answer, a line a GPU; empty where it gives none."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []
