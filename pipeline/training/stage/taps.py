"""[[objective.tap]]: the config's tables become taps, with rows and layers by their number.

Takes the tables and what is trained; gives the taps that `beside.py` puts on a stage's layers, or one UserError.
"""

from collections.abc import Sequence

from pipeline.config.objective_table import Tap as TapTable
from pipeline.console import CollectedErrors, UserError
from pipeline.data.units.store import slot_names
from pipeline.data.units.streams import STREAMS
from pipeline.objectives.distances import BETWEEN, Numbers
from pipeline.objectives.representation import Tap

BREAKERS = "circuit_breaker"


def taps_of(tables: Sequence[TapTable], kind: str, layers: int, trained: Sequence[int]) -> tuple[Tap, ...]:
    """The taps of an objective of this `kind`, on a model of so many layers, of which `trained` have an adapter.

    UserError with all that is amiss.
    """
    errors, found = CollectedErrors(), list[Tap]()
    if len({table.name for table in tables}) < len(tables):
        raise UserError("objective.tap: each has a name of its own")
    for number, table in enumerate(tables):
        with errors.collect():
            found.append(_tap(f"objective.tap.{number}", table, kind, layers, min(trained)))
    errors.raise_all()
    return tuple(found)


def _tap(where: str, table: TapTable, kind: str, layers: int, first: int) -> Tap:
    slots = STREAMS if kind == BREAKERS else slot_names("preference", 2)
    to = table.to or table.of
    if wrong := [slot for slot in (table.of, to) if slot not in slots]:
        raise UserError(f"{where}: '{wrong[0]}' is no row of type = '{kind}', which has {_listed(slots)}")
    if kind == BREAKERS and to != table.of:
        raise UserError(f"{where}.to: a row of one stream has nothing to do with the other's beside it; remove it")
    if table.distance in BETWEEN and to == table.of:
        raise UserError(f"{where}.to: '{table.distance}' is between two answers; name the other one")
    if table.relative and table.distance != "l2":
        raise UserError(f"{where}.relative: '{table.distance}' is not a length; it is for 'l2'")
    for key, distance in (("alpha", "combined"), ("threshold", "adaptive"), ("k", "top_k")):
        if key in table.model_fields_set and table.distance != distance:
            raise UserError(f"{where}.{key}: has a meaning for distance = '{distance}' only; remove it")
    return Tap(
        table.name,
        slots.index(table.of),
        slots.index(to),
        _layers(f"{where}.layers", table.layers, layers, first),
        table.distance,
        answers_only=table.mask == "completion",
        align=table.align,
        weight=table.weight,
        schedule=table.schedule,
        relative=table.relative,
        numbers=Numbers(table.alpha, table.threshold, table.k),
    )


def _layers(where: str, given: list[int | str] | str, layers: int, first: int) -> tuple[int, ...]:
    """The layers' numbers, ascending. UserError for one that is not there, and for one below all that is trained."""
    if given == "all":
        return tuple(range(first, layers))
    found = set()
    for one in given if isinstance(given, list) else [given]:
        if isinstance(one, str):
            try:
                part = float(one)
            except ValueError:
                part = -1.0
            if not 0 <= part < 1:
                raise UserError(f"{where}: '{one}' is no part of the depth, from '0' to below '1' ('0.33'), nor 'all'")
            one = int(part * layers)
        if not 0 <= one < layers:
            raise UserError(f"{where}: there is no layer {one}; the model's are 0 to {layers - 1}")
        if one < first:
            raise UserError(
                f"{where}: layer {one} is below layer {first}, the first that is trained: policy and reference are the same "
                "there, whatever is learnt; name later ones, or change layers_to_transform"
            )
        found.add(one)
    if not found:
        raise UserError(f"{where}: names none; give [10, 20], parts of the depth ['0.33'], or 'all'")
    return tuple(sorted(found))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def described_tap(tap: Tap) -> str:
    """In words: '1 · l2 at layers 10, 20 (reroute)'."""
    times = "" if tap.schedule == "constant" else f"({tap.schedule}) · "
    layers = f"{tap.layers[0]} to {tap.layers[-1]}" if len(tap.layers) > 4 else ", ".join(map(str, tap.layers))
    return f"{tap.weight:g} · {times}{tap.distance} at layer{'s' * (len(tap.layers) > 1)} {layers} ({tap.name})"
