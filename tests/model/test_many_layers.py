"""Models of 80 and 200 layers over 8 and 16 stages: what a start makes, runs and copies before a weight is read, counted."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from pipeline.config import loading
from pipeline.model import cut_check
from pipeline.model.memory.levels import RecomputeLevel
from pipeline.training.start import plan as planned
from pipeline.training.start import resolve
from tests.helpers.builders import model_config
from tests.helpers.configs import small

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Layers that are made, run, and copied for a stage."""
    found: Counter[str] = Counter()
    make, run = LlamaDecoderLayer.__init__, LlamaDecoderLayer.forward

    def counting(kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counts(*given: Any, **named: Any) -> Any:
            found[kind] += 1
            return call(*given, **named)

        return counts

    def copied(thing: Any, *given: Any) -> Any:
        found["copied"] += isinstance(thing, LlamaDecoderLayer)
        return deepcopy(thing, *given)

    with (
        mock.patch.object(LlamaDecoderLayer, "__init__", counting("made", make)),
        mock.patch.object(LlamaDecoderLayer, "forward", counting("run", run)),
        mock.patch.object(cut_check, "deepcopy", copied),
    ):
        yield found


@pytest.mark.parametrize("stages", [8, 16])
def test_what_a_start_does_grows_with_the_layers(tmp_path: Path, stages: int) -> None:
    starts, plans = {}, {}
    for layers in (80, 200):
        model_config("llama", layers).save_pretrained(tmp_path / str(layers))
        given = {"model": str(tmp_path / str(layers)), "model_weight_dtype": "float32", "pipeline_stages": stages}
        config = loading.validate(small(**given), "x.toml")
        with counted() as starts[layers]:
            resolved = resolve.resolve(config, resumes=False)
        assert len(resolved.ranges) == stages
        with counted() as plans[layers]:
            planned.costs(resolved, list(RecomputeLevel), on_gpu=False)(resolved.layout.rows * 64)
    assert starts[80]["run"] >= 4 * 80, "whole, as one stage, cut, and with adapters"
    for kind, number in starts[200].items():
        assert number * 80 == starts[80][kind] * 200, f"{kind}: {starts}"
    assert starts[80]["copied"] <= 3 * 80, "a layer is copied for its own stage alone, however many there are"
    assert plans[200]["run"] - plans[80]["run"] == 200 - 80, "each layer is run once, and those of a kind counted once"
    assert plans[200]["made"] == 200 * plans[80]["made"] / 80
