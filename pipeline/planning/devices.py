"""Devices that need not be there: `--devices 2x48GiB`, `2xA6000`, `24GiB,48GiB`, and what such devices can do.

Takes the text; gives each device's memory that a run can use, and rates for planning without measuring. The rates are
published figures times what is usually reached of them, and `Rates.source` says so: a plan made with them is an estimate.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from pipeline.console import UserError
from pipeline.planning.quantities import Link, Rates

GIB = 2**30

# What a program cannot use: the CUDA context with loaded kernels and cuBLAS workspaces, NCCL's buffers and channels, and
# the share that the allocator loses between blocks (a long run with expandable segments).
CONTEXT_BYTES = 600 * 2**20
NCCL_BYTES = 400 * 2**20
FRAGMENTATION_SHARE = 0.02

# Of the published dense peak, what large bf16 products reach: clocks fall under load and tiles do not fill the last wave.
GEMM_SHARE = 0.7
# Of the published bandwidth, what a kernel reaches that reads and writes once.
MEMORY_SHARE = 0.85
# Pinned copies over PCIe ×16, per direction: what bandwidth tests typically show (32 and 64 GB/s are the link's own).
PCIE_BYTES_PER_S = {4: 24e9, 5: 50e9}
NETWORK_GBIT_PER_S = 10.0  # between nodes, where nobody has said or measured it

EXAMPLES = "give for example 2x48GiB, 2xA6000, 24GiB,48GiB or, for two nodes, 2x48GiB+2x48GiB"


class Gpu(NamedTuple):
    """Published figures: memory as sold, dense bf16 tensor FLOPs with fp32 sums, memory bandwidth, PCIe generation.

    `memory_gib` is what the driver reports to a program, rounded down; `sold_gib` is the figure in the name.
    """

    name: str
    sold_gib: int
    memory_gib: float
    tflop_per_s: float
    gb_per_s: float
    pcie: int


# Of those with equal memory the first stands for it where only the memory is given.
GPUS = (
    Gpu("RTX 3090", 24, 23.6, 71, 936, 4),
    Gpu("RTX 4090", 24, 23.6, 165.2, 1008, 4),
    Gpu("RTX 5090", 32, 31.3, 209.5, 1792, 5),
    Gpu("A100 40GB", 40, 39.4, 312, 1555, 4),
    Gpu("A6000", 48, 47.5, 154.8, 768, 4),
    Gpu("L40S", 48, 44.4, 362, 864, 4),
    Gpu("A100 80GB", 80, 79.2, 312, 2039, 4),
    Gpu("H100 80GB", 80, 79.1, 989, 3350, 5),
    Gpu("RTX PRO 6000", 96, 94.9, 503.8, 1792, 5),
    Gpu("H200", 141, 139.7, 989, 4800, 5),
    Gpu("B200", 180, 178.3, 2250, 8000, 5),
    Gpu("MI300X", 192, 191.5, 1307, 5300, 5),
)


class Device(NamedTuple):
    """One device of a plan: memory that a run can use, and what it is called."""

    usable_bytes: int
    name: str
    gpu: Gpu  # whose figures are taken
    node: int = 0


def usable(total_bytes: float) -> int:
    """Of a device's memory, what is left for weights, activations and the rest of a run."""
    return int(total_bytes * (1 - FRAGMENTATION_SHARE)) - CONTEXT_BYTES - NCCL_BYTES


def parse(text: str) -> list[Device]:
    """Devices of `--devices`, in order: comma-separated `[COUNTx]SIZE` or `[COUNTx]NAME`, nodes with a `+` between them. GB is
    10⁹ bytes, GiB 2³⁰.

    Raises UserError for anything else, and for a device too small to hold its own reserve.
    """
    devices: list[Device] = []
    for node, part in ((node, part) for node, own in enumerate(text.split("+")) for part in own.split(",")):
        found = re.fullmatch(r"\s*(?:(\d+)\s*[x×*]\s*)?(.+?)\s*", part, re.IGNORECASE)
        if found is None:
            raise UserError(f"--devices '{text}': there is an empty part; {EXAMPLES}")
        count = int(found[1]) if found[1] is not None else 1
        if not 1 <= count <= 1024:
            raise UserError(f"--devices '{text}': {count} devices; from 1 to 1024 are possible")
        devices += [_device(found[2], text)._replace(node=node)] * count
    return devices


def _device(what: str, text: str) -> Device:
    if size := re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GiB|GB|G)", what, re.IGNORECASE):
        total = float(size[1]) * (1e9 if size[2].lower() == "gb" else GIB)
        if usable(total) <= 0:
            reserve = CONTEXT_BYTES + NCCL_BYTES
            raise UserError(
                f"--devices '{text}': {what} is less than the {reserve / GIB:.1f} GiB that CUDA and NCCL take"
            )
        return Device(usable(total), f"{float(size[1]):g} {'GB' if size[2].lower() == 'gb' else 'GiB'}", _like(total))
    named = [gpu for gpu in GPUS if _plain(what) in _names(gpu)]
    if not named:
        known = ", ".join(gpu.name for gpu in GPUS)
        raise UserError(f"--devices '{text}': '{what}' is neither a memory size nor a known GPU ({known}); {EXAMPLES}")
    return Device(usable(named[0].memory_gib * GIB), named[0].name, named[0])


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]|nvidia|geforce|gib|gb", "", name.lower())


def _names(gpu: Gpu) -> set[str]:
    """A6000, RTX A6000, 3090, A100, A100 80GB, H100 80GB …"""
    whole = _plain(gpu.name)
    return {whole, whole.removeprefix("rtx"), f"rtx{whole}", whole.removesuffix("80")}


def _like(total_bytes: float) -> Gpu:
    """The GPU whose memory is nearest, of those the first."""
    return min(GPUS, key=lambda gpu: abs(gpu.sold_gib * GIB - total_bytes))


def published_rates(devices: list[Device]) -> Rates:
    """Rates of the slowest of the devices, from published figures, with what is assumed said in `source`.

    Between devices a hidden state goes over PCIe: an NVLink bridge is faster, and not assumed.
    """
    each = [_rates(device.gpu) for device in devices]
    slowest = min(each, key=lambda r: r.flops_per_s)
    gpu = min(devices, key=lambda d: d.gpu.tflop_per_s).gpu
    by_memory = any(d.name.endswith(("GiB", "GB")) and d.name != d.gpu.name for d in devices)
    source = (
        f"not measured: {GEMM_SHARE:.0%} of the {gpu.name}'s published {gpu.tflop_per_s:g} TFLOP/s (bf16, dense), "
        f"{MEMORY_SHARE:.0%} of its {gpu.gb_per_s:g} GB/s, copies at {slowest.copy_out_bytes_per_s / 1e9:.0f} GB/s as is "
        f"typical of PCIe {gpu.pcie}.0 ×16"
    )
    return slowest._replace(source=source + (f"; {gpu.name} because of the memory size" if by_memory else ""))


def links_between(crosses: Sequence[bool], within: Rates, network_bytes_per_s: float, source: str) -> list[Link]:
    """A link for each of `crosses`: over the network at its rate, or `within` a node at that of the devices."""
    network, inside = Link(network_bytes_per_s, True, source), Link(within.link_bytes_per_s, False, within.source)
    return [network if over else inside for over in crosses]


def _rates(gpu: Gpu) -> Rates:
    copy = PCIE_BYTES_PER_S[gpu.pcie]
    return Rates(gpu.tflop_per_s * 1e12 * GEMM_SHARE, gpu.gb_per_s * 1e9 * MEMORY_SHARE, copy, copy, copy, "")
