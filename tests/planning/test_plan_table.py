"""What the planner shows: the table against the plan it came from, the sentence that says what would fit, and where the
figures of devices come from."""

import re
from itertools import pairwise

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.console import UserError
from pipeline.model.memory.levels import ActivationPolicy, RecomputeLevel
from pipeline.planning import nearest as nearest_file
from pipeline.planning import rates
from pipeline.planning.devices import links_between, parse, published_rates, usable
from pipeline.planning.nearest import nearest
from pipeline.planning.quantities import Plan, Shape, StagePlan, Work
from pipeline.planning.solve import solve
from pipeline.planning.table import compare, describe, kept_in_words
from tests.helpers.planning import A6000, GIB, command_r

SHAPE = Shape(8192, 16, 2)


def stage_plan(first: int, end: int, keeping: list[ActivationPolicy], **changes: object) -> StagePlan:
    plan = StagePlan(first, end, keeping, 2, 30 * GIB, GIB, 4 * GIB, 2 * GIB, GIB, 5 * GIB, 40 * GIB, 1.25, 2.5, 80e9)
    return plan._replace(**changes)  # type: ignore[arg-type]


def by_hand(**changes: object) -> Plan:
    """Two stages of 20 layers; the first keeps everything of 0–12, on the host 0–5, and recomputes gate and up of 13–19."""
    kept, less = ActivationPolicy(RecomputeLevel.EVERYTHING), ActivationPolicy(RecomputeLevel.PROJECTIONS)
    first = stage_plan(0, 20, [ActivationPolicy(RecomputeLevel.EVERYTHING, True)] * 6 + [kept] * 7 + [less] * 7)
    last = stage_plan(20, 40, [kept] * 20, in_flight=1, host_bytes=0)
    plan = Plan([first, last], 100.0, 0.0625, 1310.72, 160e9, 157.2e9, True)
    return plan._replace(**changes)  # type: ignore[arg-type]


def show(plan: Plan, **changes: object) -> str:
    how: dict = {"device_names": ["48 GiB"] * len(plan.stages), "total_steps": 90, **changes}
    return describe(plan, command_r(), SHAPE, A6000, **how)


def cells(line: str) -> list[str]:
    return re.split(r"\s{2,}", line.strip())


def test_table_shows_each_stages_bytes() -> None:
    head, first, last = (cells(line) for line in show(by_hand()).splitlines()[:3])
    assert head == [
        "stage",
        "layers",
        "device",
        "weights",
        "adapters + optimizer",
        "activations",
        "working",
        "update",
        "total",
        "free",
        "on host",
    ]
    assert first == ["0", "0–19", "48 GiB", "30.00", "1.00", "4.00 (2 ×)", "2.00", "1.00", "37.00", "3.00", "5.00"]
    assert last == ["1", "20–39", "48 GiB", "30.00", "1.00", "4.00 (1 ×)", "2.00", "1.00", "37.00", "3.00", "0.00"]


def test_what_is_kept_in_words() -> None:
    assert kept_in_words(by_hand().stages[0], command_r()) == [
        "layers 0–12: everything kept, nothing recomputed",
        "layers 13–19: q, k, v kept too; gate and up recomputed",
        "on host: layers 0–5, 5 GiB",
    ]
    model = command_r()
    frozen = [c._replace(levels={}, backward=Work(0.0)) for c in model.layers[:3]]
    model = model._replace(layers=[*frozen, *model.layers[3:]], first_trained=3)
    assert kept_in_words(stage_plan(0, 4, [ActivationPolicy(RecomputeLevel.INPUT)] * 4), model) == [
        "layers 0–2: forward only, nothing kept",
        "layer 3: input kept, the whole layer recomputed",
    ]


def test_figures_of_the_step_and_the_run() -> None:
    text = show(by_hand())
    assert "1 min 40 s for 131 072 tokens" in text
    assert "6.2% of the stages' time is waiting" in text
    assert "160, 1.02 × the exact minimum of 157.2" in text
    assert "2 h 30 min (2.5 h) for 90 steps" in text
    assert "tokens per second  1311" in text
    assert "Rates: test." in text
    assert "tokens per second  2621" in show(by_hand(), replicas=2)
    assert "262 144 tokens" in show(by_hand(), replicas=2)
    assert "the run" not in show(by_hand(), total_steps=None)
    assert "does not fit" not in text


@pytest.mark.parametrize("stages", [1, 2, *(pytest.param(n, marks=pytest.mark.slow) for n in (4, 8))])
@pytest.mark.parametrize("name", ["48 GiB", pytest.param("RTX 4090", marks=pytest.mark.slow)])
def test_no_line_is_wider_than_a_terminal(stages: int, name: str) -> None:
    plan = solve(command_r(), [12 * GIB] * stages, A6000, Shape(8192, 16, stages), 64 * GIB)
    text = show(plan, device_names=[name] * stages, nearest="Use something else. " * 12)
    assert max(map(len, text.splitlines())) <= 130


def test_misfit_names_the_stage_and_what_would_fit() -> None:
    short = by_hand().stages[1]._replace(device_bytes=36 * GIB)
    plan = by_hand(stages=[by_hand().stages[0], short], fits=False)
    text = " ".join(show(plan, nearest="The nearest that fits: host_memory_gib = 8.").split())
    assert "This does not fit: stage 1 needs 1 GiB more than its device has for the run." in text
    assert text.endswith("The nearest that fits: host_memory_gib = 8.")
    assert "Nothing near it fits" in show(plan)
    assert "keep 5 GiB on the host, more than it has" in " ".join(show(by_hand(fits=False)).split())


def test_planned_against_measured() -> None:
    rows = [cells(line) for line in compare(by_hand(), [36 * GIB, 74 * GIB], 110.0).splitlines()]
    assert rows == [
        ["planned", "measured", "measured / planned"],
        ["stage 0, memory", "37 GiB", "36 GiB", "0.97"],
        ["stage 1, memory", "37 GiB", "74 GiB", "2.00"],
        ["a step", "1 min 40 s", "1 min 50 s", "1.10"],
    ]


# What would fit


def near(device_gib: float, host_gib: int = 0, **how: object) -> tuple[str, nearest_file.Nearest] | None:
    arguments: dict = {"max_host_bytes": 64 * GIB, "chosen_already": True, "shape": SHAPE, **how}
    shape = arguments.pop("shape")
    found = nearest(command_r, int(device_gib * GIB), A6000, shape, host_gib * GIB, **arguments)
    if found is None:
        return None
    assert found.plan.fits
    assert len(found.plan.stages) == found.shape.stages
    return found.sentence.removeprefix("The nearest that fits: "), found


@pytest.mark.slow
def test_first_what_is_kept_then_host_memory_then_stages_then_length() -> None:
    """By descending memory of the two devices, each remedy in its turn; the ones before it must not do."""
    assert near(47, chosen_already=False)[0] == "activation_checkpointing = 'auto'."  # type: ignore[index]

    sentence, found = near(41.5)  # type: ignore[misc]
    needed = int(re.fullmatch(r"host_memory_gib = (\d+)\.", sentence)[1])  # type: ignore[index]
    device = [int(41.5 * GIB)] * 2
    assert solve(command_r(), device, A6000, SHAPE, needed * GIB).fits
    assert not solve(command_r(), device, A6000, SHAPE, (needed - 1) * GIB).fits, "as little as will do"

    sentence, found = near(36)  # type: ignore[misc]
    assert sentence == "pipeline_stages = 3 on as many of these devices."
    assert found.shape.stages == 3

    # Eight stages hold no less than five layers' weights and the embedding: below that, nothing is left but length.
    sentence, found = near(15, max_host_bytes=0, shape=SHAPE._replace(stages=8))  # type: ignore[misc]
    assert sentence == "batch_size_tokens = 4096 and sequence_len no longer."
    assert found.shape.tokens == 4096
    assert near(4) is None


def test_two_remedies_together_are_said_together() -> None:
    sentence, _ = near(47, chosen_already=False, shape=SHAPE._replace(stages=1))  # type: ignore[misc]
    assert sentence == "pipeline_stages = 2 on as many of these devices and activation_checkpointing = 'auto'."


# Devices


def test_devices_in_text() -> None:
    reserve = 1000 * 2**20  # context and NCCL, in MiB; and a fiftieth for the allocator
    assert usable(50 * GIB) == 49 * GIB - reserve
    assert [d.usable_bytes for d in parse("2x48GiB")] == [usable(48 * GIB)] * 2
    assert [d.usable_bytes for d in parse("48GiB, 80 gib")] == [usable(48 * GIB), usable(80 * GIB)]
    assert [d.usable_bytes for d in parse("2x48GB")] == [usable(48e9)] * 2
    assert [d.gpu.name for d in parse("2xA6000,rtx-4090,H100")] == ["A6000", "A6000", "RTX 4090", "H100 80GB"]
    assert [d.gpu.name for d in parse("24GiB,48GiB,80GiB,141GiB")] == ["RTX 3090", "A6000", "A100 80GB", "H200"]
    for name in ("RTX 5090", "L40S", "A100 40GB", "RTX PRO 6000", "B200", "MI300X"):
        (device,) = parse(name)
        assert device.gpu.name == name
        assert 0.85 * device.gpu.sold_gib * GIB < device.usable_bytes < device.gpu.sold_gib * GIB
    assert parse("A6000")[0].usable_bytes < parse("48GiB")[0].usable_bytes, "a driver leaves less than is sold"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty part"),
        ("2x48GiB,", "empty part"),
        ("48", "'48' is neither a memory size nor a known GPU.*2x48GiB"),
        ("2x", "'2x' is neither"),
        ("2xGTX580", "'GTX580' is neither.*A6000"),
        ("0x48GiB", "0 devices"),
        ("2x-48GiB", "'-48GiB' is neither"),
        ("2x0.5GiB", "less than the 1.0 GiB that CUDA and NCCL take"),
    ],
)
def test_nonsense_devices(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(text)


def test_published_rates_say_what_they_are() -> None:
    found = published_rates(parse("2xA6000"))
    assert found.flops_per_s == pytest.approx(0.7 * 154.8e12)
    assert found.memory_bytes_per_s == pytest.approx(0.85 * 768e9)
    assert found.copy_in_bytes_per_s == found.copy_out_bytes_per_s == 24e9
    assert found.source.startswith("not measured: 70% of the A6000's published 154.8 TFLOP/s")
    assert "because of the memory size" not in found.source
    assert published_rates(parse("2x48GiB")).source.endswith("A6000 because of the memory size")
    assert published_rates(parse("4090,3090")).flops_per_s == pytest.approx(0.7 * 71e12), "the slowest sets the pace"


# Calibration


def test_rates_count_what_was_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """With every measurement taken for one second, rates are the work itself: PyTorch's count, and bytes by hand."""
    counted = []

    def one_second(work: object, device: torch.device, repetitions: int = 1) -> float:
        with FlopCounterMode(display=False) as counter:
            work()  # type: ignore[operator]
        counted.append(counter.get_total_flops())
        return 1.0

    monkeypatch.setattr(rates, "best_seconds", one_second)
    monkeypatch.setattr(rates, "CPU_COPY_BYTES", 2**16)
    found = rates.measure(torch.device("cpu"), [(64, 96), (96, 32)], 128, torch.bfloat16)
    assert found.flops_per_s == sum(counted) / 2 == 128 * (64 * 96 + 96 * 32)  # over two seconds
    assert found.copy_out_bytes_per_s == found.copy_in_bytes_per_s == 2**16
    assert found.memory_bytes_per_s == 3 * 2**16
    assert found.source == "measured here, on the CPU"


def test_best_of_repetitions_is_the_shortest(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 5.0, 10.0, 12.0, 20.0, 29.0])  # three timed runs: 5, 2 and 9 seconds
    monkeypatch.setattr(rates.time, "perf_counter", lambda: next(clock))
    runs = []
    assert rates.best_seconds(lambda: runs.append(1), torch.device("cpu"), repetitions=3) == 2.0
    assert len(runs) == 4, "one to warm up"


def test_calibration_on_the_cpu_is_plausible() -> None:
    found = rates.measure(torch.device("cpu"), [(256, 256)], 256, torch.float32)
    assert all(1e6 < figure < 1e15 for figure in found[:5])
    with pytest.raises(ValueError, match="no products"):
        rates.measure(torch.device("cpu"), [], 256, torch.float32)


# Nodes


def test_links_between_nodes_have_their_own_rate_and_are_shown() -> None:
    """Two nodes of two: stage 1 to 2 goes over 1 Gbit/s, 128 MiB a transfer. Nothing goes back to stages that train nothing."""
    named = parse("2x80GiB+2x80GiB")
    assert [d.node for d in named] == [0, 0, 1, 1]
    crosses = [a.node != b.node for a, b in pairwise(named)]
    links = links_between(crosses, A6000, 1e9 / 8, "1 Gbit/s, as link_gbit_per_s says")
    model, shape, memory = command_r(), SHAPE._replace(stages=4), [d.usable_bytes for d in named]
    near, far = (solve(model, memory, A6000, shape, 0, links=given) for given in (None, links))
    transfer_s = model.hidden_bytes * shape.tokens * 8 / 1e9
    assert transfer_s == pytest.approx(2**27 * 8 / 1e9)
    assert far.step_s > near.step_s + shape.micro_batches * transfer_s, "each micro-batch crosses, there and back"
    text = describe(far, model, shape, A6000, device_names=["80 GiB"] * 4, total_steps=None, replicas=2, links=links)
    shown = [cells(line) for line in text.splitlines() if line.startswith("stage ") and " to " in line]
    assert shown[1] == ["stage 1 to 2", "between nodes", "1", "128 MiB", "128 MiB", "1.07 s"]
    assert [line[1] for line in shown] == ["within a node", "between nodes", "within a node"]
    assert "Between the 2 replicas, once a step: the gradients" in " ".join(text.split())
    frozen = [c._replace(levels={}, backward=Work(0.0)) for c in model.layers[:30]]
    last = model._replace(layers=[*frozen, *model.layers[30:]], first_trained=30)
    text = describe(far, last, shape, A6000, device_names=["80 GiB"] * 4, total_steps=None, links=links)
    assert next(cells(line)[4] for line in text.splitlines() if " to " in line and "a node" in line) == "nothing"
    assert "link" not in describe(near, model, shape, A6000, device_names=["80 GiB"] * 4, total_steps=None)


def test_no_stage_takes_more_host_memory_than_its_part_of_its_node() -> None:
    """Pooled, the first stage would take all; each may have half."""
    shape = SHAPE._replace(micro_batches=16)
    pooled = solve(command_r(), [48 * GIB] * 2, A6000, shape, 24 * GIB)
    apart = solve(command_r(), [48 * GIB] * 2, A6000, shape, 24 * GIB, 12 * GIB)
    assert max(s.host_bytes for s in pooled.stages) > 12 * GIB
    assert max(s.host_bytes for s in apart.stages) <= 12 * GIB
    assert apart.fits
