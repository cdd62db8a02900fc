"""What a stage has besides the model's own weights: adapters (or weights set free to train) and our kernels.

The same for a stage with its weights and for one on `meta` that is only counted. The base model's weights are frozen.
"""

from collections import Counter
from typing import Any

from pipeline.kernels import dispatch
from pipeline.model.adapters.full import unfreeze, unfreeze_model
from pipeline.model.fusion import apply as fusion
from pipeline.model.quantized import Scheme
from pipeline.model.stage import Stage
from pipeline.model.structure.parts import layers_of_model
from pipeline.training.stage import families
from pipeline.training.stage.meta_model import MetaModel
from pipeline.training.stage.spec import Trained


def put_quantised(stage: Stage, scheme: Scheme | None) -> None:
    """Quantised layers, still empty, where `quantized.put_placeholders` has marked the stage's."""
    if scheme:
        from pipeline.model import quantized_bnb

        quantized_bnb.put_in(stage)


def put_trained(stage: Stage, trained: Trained) -> None:
    """The adapter on those of its modules that the stage owns, and those of the parameters `in_full` set free to train;
    without an adapter, the model's own weights that are trained.
    """
    if trained.adapter is None:
        unfreeze_model(stage, trained.own_weights)
        return
    families.inject(stage, trained.adapter)
    unfreeze(stage, trained.in_full)


def whole_on_meta(meta_model: MetaModel, trained: Trained) -> Stage:
    """The whole model as one stage on `meta`, with what is trained and without kernels: for counting and for names."""
    model = meta_model.make()
    stage = Stage(model.requires_grad_(False), 0, len(layers_of_model(model))).train()
    put_trained(stage, trained)
    return stage


def chosen_kernels(wanted: str | list[Any], on_gpu: bool) -> str | list[Any]:
    """What `wanted` asks for; for 'auto' all kernels where they were checked on every kind of device at hand, else none."""
    if wanted != "auto":
        return wanted
    return "all" if all(kind in dispatch.CHECKED for kind in dispatch.kinds(on_gpu)) else "none"


def put_kernels(stage: Stage, wanted: str | list[Any]) -> Counter[str]:
    """Our kernels where they fit; how many modules took each."""
    return fusion.apply(stage, frozenset(kernel_names(wanted)))


def kernel_names(wanted: str | list[Any]) -> tuple[str, ...]:
    """'all', 'none' or a list of names, as names."""
    return fusion.KERNELS if wanted == "all" else () if wanted == "none" else tuple(wanted)
