"""The differences to the base with their intervals, a panel a dataset, as a picture.

Takes cells; gives bytes of a PNG. Needs no display.
"""

import io
from collections.abc import Sequence

from matplotlib.figure import Figure

from pipeline.evaluation.cells import BASE, ROLES, Cell
from pipeline.pages.drawing import shown

PANEL_INCHES, ROW_INCHES, EDGE_INCHES = 3.4, 0.34, 1.3
DPI = 130


def picture(found: Sequence[Cell]) -> bytes:
    """The main measure of every dataset, one line an adapter; the base's own figures where there is no adapter."""
    adapters = list(dict.fromkeys(cell.adapter for cell in found if cell.adapter != BASE)) or [BASE]
    mains = [cell for cell in found if cell.main and cell.adapter in adapters]
    datasets = sorted(dict.fromkeys((ROLES.index(cell.role), cell.dataset, cell.measure) for cell in mains))
    height = EDGE_INCHES + ROW_INCHES * len(adapters)
    figure = Figure(figsize=(PANEL_INCHES * len(datasets), height), layout="constrained")
    panels = figure.subplots(1, len(datasets), squeeze=False, sharey=True)[0]
    for panel, (role, dataset, measure) in zip(panels, datasets, strict=True):
        for cell in mains:
            if cell.dataset == dataset:
                value = cell.delta or cell.figure
                low, high = value.interval or (value.value, value.value)
                place = adapters.index(cell.adapter)
                panel.plot([low, high], [place, place], color="tab:blue")
                panel.plot([value.value], [place], "o", color="tab:blue")
        panel.set_title(f"{shown(dataset)}\n{ROLES[role]}", fontsize=9)
        panel.set_xlabel(measure if adapters == [BASE] else f"{measure}, difference to the base", fontsize=8)
        if adapters != [BASE]:
            panel.axvline(0, color="grey", linewidth=0.8)
    panels[0].set_yticks(range(len(adapters)), [shown(name) for name in adapters], fontsize=8)
    panels[0].set_ylim(len(adapters) - 0.5, -0.5)
    out = io.BytesIO()
    figure.savefig(out, dpi=DPI, format="png")
    return out.getvalue()
