"""What the sections of a model card say, as plain text that the template (card.md.j2) puts in its place.

Takes `Facts`; gives lines and tables. A number that the run's folder does not tell is left out, and so is a section without any.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

from pipeline.console import duration, gib
from pipeline.families import chosen
from pipeline.formats.dtypes import name_of
from pipeline.names import layers_of
from pipeline.publishing.facts import Facts, Loss, unrecorded

MOST_ROWS = 12


class Table(NamedTuple):
    """A table, and what is said below it."""

    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    said: str


def family(facts: Facts) -> str:
    """The adapter's family in words, or the model itself."""
    if facts.config.get("full_fine_tune"):
        return "the model's own weights"
    return chosen(facts.config["adapter_type"], facts.config).card


def trained(facts: Facts) -> list[str]:
    """What was trained: base, family, modules, rank and s; a line each."""
    config = facts.config
    lines = [f"base: {facts.base}", f"trained: {family(facts)}"]
    if modules := facts.adapter.get("target_modules"):
        lines.append(f"modules: {modules_in_words(modules)}")
    if beside := config.get("trainable_modules"):
        lines.append(f"trained in full beside it: {', '.join(beside)}")
    if rank := config.get("lora_rank"):
        alpha, root = config.get("lora_alpha"), "√" if config.get("use_rslora") else ""
        s = rank**0.5 if root else rank
        lines.append(f"rank {rank}" + (f", s = {alpha:g}/{root}{rank} = {alpha / s:g}" if alpha else ""))
    for key in ("oft_block_size", "boft_block_size"):
        if size := config.get(key):
            lines.append(f"blocks of {size} inputs")
    if facts.values[0]:
        count, dtypes = facts.values
        lines.append(f"the adapter's file: {count:,} numbers, {', '.join(name_of(d) for d in dtypes)}")
    if bnb := config.get("quantization", {}).get("bnb", {}):
        bits = f"4 bits ({bnb['bnb_4bit_quant_type']})" if bnb.get("load_in_4bit") else "8 bits"
        lines.append(f"the base's linear layers were held in {bits} in training; a fold is into the original weights")
    if (scale := config.get("train_logit_scale", 1.0)) != 1:
        lines.append(
            f"in training the logits were multiplied by {scale:g} (train_logit_scale); nothing here does that, and the "
            "evaluations below were without it"
        )
    return lines


def modules_in_words(modules: Sequence[str]) -> str:
    """`down_proj of layers 0 to 38 (39 modules)`."""
    names = list(dict.fromkeys(module.rpartition(".")[2] for module in modules))
    layers = layers_of(modules)
    words = ", ".join(names)
    if layers:
        starts = [layers[0], *(b for a, b in pairwise(layers) if b != a + 1)]
        ends = [*(a for a, b in pairwise(layers) if b != a + 1), layers[-1]]
        ranges = [str(a) if a == b else f"{a} to {b}" for a, b in zip(starts, ends, strict=True)]
        words += f" of layer{'s' * (len(layers) > 1)} {', '.join(ranges)}"
    return f"{words} ({len(modules)} module{'s' * (len(modules) > 1)})"


def data(facts: Facts) -> Table | None:
    """The sets by name: documents (conversations, rows), tokens, what they were made into, and how much of that was used."""
    rows = [
        (
            d["name"],
            d["use"],
            f"{d['documents']:,}",
            f"{d['tokens']:,}",
            _rows(d),
            _used(d),
        )
        for d in facts.data
    ]
    head: tuple[str, ...] = ("data", "for", "documents", "tokens", "chunks × tokens", "chunks used")
    said = "Documents, tokens (without BOS and EOS) and chunks are of the whole text of a set."
    if any("chunks" not in d for d in facts.data):
        head = ("data", "for", "documents or conversations", "tokens", "rows × tokens", "rows used")
        said = "All but what was used is of the whole of a set; tokens of books are without BOS and EOS."
    if facts.epochs is not None:
        said += f" The run read {facts.epochs:.4g} times what is used for training."
    return Table(head, rows, said) if rows else None


def _rows(entry: dict[str, Any]) -> str:
    """Chunks of one length, or rows up to one, with the part that is trained; the windows of a stream."""
    if streamed := entry.get("streaming"):
        return f"streamed, {streamed['windows']:,} windows of {streamed['window_rows']:,}"
    if "chunks" in entry:
        return f"{entry['chunks']:,} × {entry['sequence_len']:,}"
    packed = entry.get("packed")
    into = f", packed into {packed['rows']:,} × {packed['sequence_len']:,}" if packed else ""
    return f"{entry['made']:,} × ≤ {entry['longest']:,}, {entry['targets']:,} tokens trained{into}"


def _used(entry: dict[str, Any]) -> str:
    if "streaming" in entry:
        return "all that was read"
    repeated = entry["rows"] != entry["different"]
    return f"{entry['rows']:,}" + (f" an epoch, {entry['different']:,} different" if repeated else "")


def losses(facts: Facts) -> Table | None:
    """A table of the evaluated steps (of logged ones where nothing was evaluated)."""
    if not facts.training and not facts.evaluation:
        return None
    names = list(facts.evaluation)
    by_set = {name: {loss.step: loss for loss in found} for name, found in facts.evaluation.items()}
    training = {loss.step: loss for loss in facts.training}
    steps = sorted({step for found in by_set.values() for step in found}) or sorted(training)
    rows = []
    for step in thinned(steps):
        found = [by_set[name].get(step) for name in names]
        cells = [cell for loss in found for cell in _loss_cells(loss)]
        rows.append((str(step), f"{training[step].loss:.4f}" if step in training else "", *cells))
    head = ("step", "training loss", *(f"{name} {what}" for name in names for what in ("loss", "perplexity")))
    left_out = f" {len(rows)} of {len(steps)} steps are shown." if len(rows) < len(steps) else ""
    of_tokens = not facts.evaluation or any(loss.perplexity for found in facts.evaluation.values() for loss in found)
    meaning = "Losses are means over target tokens, in nats; perplexity is exp of that."
    if not of_tokens:
        meaning = "Losses are those of the run's objective, means over units of answers that are compared."
    return Table(head, rows, meaning + left_out)


def _loss_cells(loss: Loss | None) -> tuple[str, str]:
    if loss is None:
        return "", ""
    return f"{loss.loss:.4f}", "" if loss.perplexity is None else f"{loss.perplexity:.2f}"


def thinned(steps: Sequence[int]) -> list[int]:
    """At most MOST_ROWS of `steps`, the first and the last among them."""
    if len(steps) <= MOST_ROWS:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (MOST_ROWS - 1))] for i in range(MOST_ROWS)]


def about_samples(facts: Facts) -> str:
    """How the samples were drawn that are shown; empty where there are none."""
    if not facts.samples:
        return ""
    config, found = facts.config["samples"], facts.samples
    how = "greedily" if not config["temperature"] else f"at temperature {config['temperature']:g}"
    return (
        f"After {found[0]['step']:,} steps, {how}, {config['max_new_tokens']:,} tokens at most, not chosen among several; "
        f"{sum(sample['stopped'] for sample in found)} of {len(found)} stopped by themselves."
    )


def run(facts: Facts) -> Table:
    """Where the run ran, in which time and memory; one row for each start or resumption."""
    rows = [
        (
            f"{p['from_step'] + 1} to {p['to_step']}",
            f"{p['stages']} × {p['replicas']}",
            _devices(p["devices"]),
            ", ".join(gib(peak) for peak in p["peak_bytes"]),
            duration(p["seconds"]),
        )
        for p in facts.parts
    ]
    head = ("steps", "stages × replicas", "devices", "peak memory of each process", "time")
    return Table(head, rows, "\n".join(_about_run(facts)))


def _about_run(facts: Facts) -> Iterator[str]:
    if missing := unrecorded(facts.parts, facts.step) if facts.parts else []:
        ranges = ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in missing)
        yield f"Of the steps {ranges} time and memory were not recorded."
    elif len(facts.parts) > 1:
        yield f"In all {duration(sum(p['seconds'] for p in facts.parts))}."
    if facts.speeds:
        yield f"{median(facts.speeds):,.0f} tokens/s (the median of {len(facts.speeds)} logged steps)."


def _devices(names: Sequence[str]) -> str:
    return ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))


def versions(facts: Facts) -> dict[str, str]:
    """The libraries of the run's last part."""
    return facts.parts[-1].get("versions", {}) if facts.parts else {}
