"""The report itself: report.html in the run's folder, and its pictures as SVG and PNG under report/.

Takes a run's folder, during a run or after it; gives files that are whole or as they were.
"""

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import tomli_w

from pipeline.console import duration, gib
from pipeline.files import atomic_file
from pipeline.generation.shown import ending
from pipeline.pages import drawing, templates
from pipeline.publishing import card_text, next_steps
from pipeline.publishing.report import pictures
from pipeline.publishing.report.read import Run, read

PAGE, FOLDER = "report.html", "report"
GIB = 2**30


class Picture(NamedTuple):
    """`name`: of its files. `svg`: as it stands in the page."""

    name: str
    caption: str
    svg: str
    png: bytes


def write(folder: Path) -> Path:
    """Write the report of the run in `folder`; the page's path."""
    run = read(folder)
    drawn = list(_pictures(run))
    (folder / FOLDER).mkdir(exist_ok=True)
    for picture in drawn:
        for suffix, content in ((".svg", drawing.alone(picture.svg)), (".png", picture.png)):
            _put(folder / FOLDER / f"{picture.name}{suffix}", content)
    _put(folder / PAGE, page(run, drawn).encode())
    return folder / PAGE


def page(run: Run, drawn: list[Picture]) -> str:
    """The page's HTML."""
    facts = run.facts
    return (
        environment()
        .get_template("page.html.j2")
        .render(
            name=run.name,
            base=facts.base,
            family=card_text.family(facts),
            modules=card_text.modules_in_words(facts.adapter["target_modules"])
            if facts.adapter.get("target_modules")
            else "",
            step=facts.step,
            tiles=list(_tiles(run)),
            pictures=drawn,
            samples=_samples(run),
            data=facts.data,
            parts=facts.parts,
            config=tomli_w.dumps(facts.config),
            versions=facts.parts[-1].get("versions", {}) if facts.parts else {},
            commands=next_steps.after_run(
                run.folder,
                run.published.folder,
                facts.base_folder,
                is_adapter=not facts.config.get("full_fine_tune"),
            ),
        )
    )


def environment() -> jinja2.Environment:
    """Templates of this folder."""
    made = templates.environment(Path(__file__).parent)
    made.filters |= {"duration": duration, "gib": gib, "ending": ending, "number": lambda n: f"{n:,}"}
    return made


def _tiles(run: Run) -> Iterator[tuple[str, str]]:
    """What a run is first asked for: (figure, what it is)."""
    facts = run.facts
    if facts.training:
        yield f"{facts.training[-1].loss:.4f}", f"training loss at step {facts.training[-1].step:,}"
    for name, found in facts.evaluation.items():
        best = min(found, key=lambda loss: loss.loss)
        perplexity = f", perplexity {best.perplexity:.2f}" if best.perplexity is not None else ""
        yield f"{best.loss:.4f}", f"least loss of {name}, at step {best.step:,}{perplexity}"
    if facts.speeds:
        yield f"{statistics.median(facts.speeds):,.0f}", "tokens/s, the median of the logged steps"
    if facts.epochs is not None:
        yield f"{facts.epochs:.3g}", "epochs"
    if facts.parts:
        yield duration(sum(part["seconds"] for part in facts.parts)), "recorded time"
        yield gib(max(max(part["peak_bytes"]) for part in facts.parts)), "peak memory of a process"


def _pictures(run: Run) -> Iterator[Picture]:
    series = run.series
    losses = {"training": series.get("train/loss", [])}
    losses |= {
        tag.removeprefix("eval/").removesuffix("/loss"): found
        for tag, found in series.items()
        if tag.startswith("eval/") and tag.endswith("/loss")
    }
    yield _drawn("loss", "Loss in nats a token.", pictures.lines({n: f for n, f in losses.items() if f}, "loss"))
    for name, tag, unit, caption in (
        ("learning_rate", "train/lr", "learning rate", "Learning rate."),
        ("gradient_norm", "train/grad_norm", "norm", "Norm of the gradient over all stages, before clipping."),
        ("speed", "train/tokens_per_s", "tokens/s", "Tokens trained a second."),
        ("router_loss", "train/router_loss", "loss", "Loss of the routers, without its coefficient."),
    ):
        if series.get(tag):
            yield _drawn(name, caption, pictures.lines({tag: series[tag]}, unit))
    if run.norms:
        yield _drawn("norms", "How much each module's adapter changes, ‖B·A‖.", pictures.norms(run.norms))
    if stages := run.plan.get("stages"):
        both = [(stage["planned_bytes"] / GIB, stage["measured_bytes"] / GIB) for stage in stages]
        yield _drawn("memory", "Device memory of each stage, planned and measured.", pictures.memory(both))


def _drawn(name: str, caption: str, figure: Any) -> Picture:
    return Picture(name, caption, drawing.svg(figure, name, caption), drawing.png(figure))


def _samples(run: Run) -> list[dict[str, Any]]:
    """Each prompt with what was said to it first and last."""
    if not run.spoken:
        return []
    first, last = run.spoken[min(run.spoken)], run.spoken[max(run.spoken)]
    return [
        {"prompt": late["prompt"], "first": early if early["step"] != late["step"] else None, "last": late}
        for early, late in zip(first, last, strict=False)
    ]


def _put(file: Path, content: bytes) -> None:
    with atomic_file(file, replace=True) as unfinished:
        unfinished.write_bytes(content)
