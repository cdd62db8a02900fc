"""What [objective] may say, and with which data and keys; what is refused by name."""

import dataclasses
import re
from typing import Any, get_args

import pytest

from pipeline.config.data_tables import Dataset
from pipeline.config.objective_table import LossType, Objective, Rl
from pipeline.console import UserError
from pipeline.objectives.distances import DISTANCES
from pipeline.objectives.preference_losses import LOSSES
from pipeline.training.start.objective import Around, ObjectiveSpec, spec_of
from tests.helpers.configs import problems, small
from tests.helpers.paths import ROOT

RETAIN = {"name": "retain", "of": "chosen", "layers": [2], "distance": "l2"}
PLAIN = Around(
    2,
    in_full=False,
    starts_from=None,
    train_logit_scale=1.0,
    dropout=0.0,
    start_from_weight=False,
    layers=6,
    trained=(1, 2, 3),
)


def dataset(kind: str, **keys: Any) -> Dataset:
    return Dataset.model_validate({"dataset_type": kind, "dataset_path": "x", "sequence_len": 64, **keys})


def spec(kind: str = "preference", around: Around = PLAIN, **keys: Any) -> ObjectiveSpec | None:
    return spec_of(Objective.model_validate({"type": "preference", **keys}), None, [dataset(kind)], [], around)


def test_every_loss_is_in_the_config_and_on_the_page() -> None:
    assert set(get_args(LossType)) == set(LOSSES)
    page = (ROOT / "docs" / "preference.md").read_text(encoding="utf-8")
    table = "".join(re.findall(r"(?m)^\| `(?:loss_type|distance)` \| a .*\n(?:\|.*\n)+", page))
    assert set(re.findall(r"`(\w+)`", "\n".join(line.split("|")[1] for line in table.splitlines()))) == {
        *LOSSES,
        *DISTANCES,
    } | {
        "loss_type",
        "distance",
    }


def test_trls_keys_and_ours_are_as_the_page_says() -> None:
    """Each name on its left is a field of TRL's configurations or a class of it, each key on its right one of ours."""
    import trl
    from trl.experimental.cpo import CPOConfig
    from trl.experimental.orpo import ORPOConfig

    page = (ROOT / "docs" / "preference.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"(?m)^\| TRL \| here \|\n\|---\|---\|\n((?:\|.*\n)+)", page)
    rows = [[re.findall(r"`([\w.]+)`", cell) for cell in line.strip("|").split("|")] for line in table.splitlines()]
    configs = (trl.DPOConfig, trl.KTOConfig, CPOConfig, ORPOConfig)
    fields = {field.name for config in configs for field in dataclasses.fields(config)}
    gone = {"rpo_alpha", "ref_model"}  # the latter is an argument of the trainer
    theirs = {name for left, _ in rows for name in left}
    assert {name for name in theirs - fields if not name.endswith("Trainer")} == gone
    assert {"loss_type", "precompute_ref_log_probs", "max_length"} <= theirs
    keys = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    for name in {name for _, right in rows for name in right if not name.endswith("Trainer")}:
        assert f"| `{name.rpartition('.')[2]}` |" in keys, name
    same = next(left for left, _ in rows if "discopop_tau" in left)
    assert set(same) == Objective.model_fields.keys() - {"type", "tap", "reference"}


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_takes_its_data_and_no_other(name: str) -> None:
    loss, keys = LOSSES[name], {"label_smoothing": 1e-3} if name == "exo_pair" else {}
    found = spec(loss.data, loss_type=name, **keys)
    assert found is not None
    assert found.mixture.weights == {name: 1.0}
    assert found.reference == ("base" if loss.reference else None)
    other = "ranked" if loss.data == "preference" else "preference"
    with pytest.raises(UserError, match=f"dataset_type = '{other}': this loss_type is of dataset_type = '{loss.data}'"):
        spec(other, loss_type=name, **keys)


def test_qlora_pipes_table_is_the_same_run() -> None:
    rl = spec_of(None, Rl.model_validate({"method": "dpo", "dpo_beta": 0.3}), [dataset("preference")], [], PLAIN)
    assert rl == spec(loss_type="sigmoid", beta=0.3)
    with pytest.raises(UserError, match="remove one of them"):
        spec_of(
            Objective.model_validate({"type": "preference"}),
            Rl(method="dpo", dpo_beta=0.1),
            [dataset("preference")],
            [],
            PLAIN,
        )


def test_without_it_the_next_token_is_trained_of_rows_by_themselves() -> None:
    assert spec_of(None, None, [dataset("chat")], [], PLAIN) is None
    assert spec_of(Objective.model_validate({"type": "language_modelling"}), None, [dataset("chat")], [], PLAIN) is None
    with pytest.raises(UserError, match="dataset_type = 'preference': answers are compared with"):
        spec_of(None, None, [dataset("preference")], [], PLAIN)
    with pytest.raises(UserError, match="dataset_type = 'chat': this loss_type is of dataset_type = 'preference'"):
        spec("chat")


@pytest.mark.parametrize(
    ("keys", "around", "said"),
    [
        ({"loss_type": "exo_pair"}, {}, "objective.label_smoothing: 'exo_pair' takes its logarithm"),
        ({"label_smoothing": 0.1}, {}, "objective.label_smoothing: has no effect on 'sigmoid'"),
        (
            {"loss_type": "sppo_hard", "f_divergence_type": "forward_kl"},
            {},
            "objective.f_divergence_type: has no effect",
        ),
        ({"loss_type": "aot"}, {"units_at_once": 1}, "micro_batch_size_per_gpu: 'aot' compares the units"),
        ({"loss_type": ["sigmoid", "kto"]}, {}, "they cannot be added"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, {}, "1 for 2 losses"),
        ({"loss_type": ["sigmoid", "sigmoid"]}, {}, "each of loss_type is named once"),
        ({}, {"in_full": True}, "objective.reference.model: 'base' is the model with its adapters off"),
        ({}, {"starts_from": "adapter"}, "objective.reference: init_adapter goes on from an adapter"),
        ({}, {"start_from_weight": True}, "objective.reference.model: with this init_lora_weights"),
        ({}, {"train_logit_scale": 1.1}, "train_logit_scale: the reference's logits are not scaled"),
    ],
)
def test_what_does_not_go_together_is_refused(keys: dict[str, Any], around: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        spec(around=PLAIN.__class__(**{**PLAIN.__dict__, **around}), **keys)


def test_dropout_is_said_as_trl_turns_it_off(capsys: pytest.CaptureFixture[str]) -> None:
    spec()
    assert "dropout" not in capsys.readouterr().err
    spec(around=dataclasses.replace(PLAIN, dropout=0.1))
    assert "lora_dropout = 0.1: TRL turns dropout off in preference training" in capsys.readouterr().err


def tapped(kind: str = "representation", around: Around = PLAIN, **keys: Any) -> ObjectiveSpec:
    found = spec(around=around, **{"type": kind, "tap": [RETAIN], **keys})
    assert found is not None
    return found


def test_taps_have_their_rows_and_layers_by_number(capsys: pytest.CaptureFixture[str]) -> None:
    reroute = {"name": "reroute", "of": "rejected", "to": "chosen", "layers": ["0.5", 5], "distance": "l2"}
    both = tapped(tap=[{**reroute, "schedule": "1 - p/2"}, {**RETAIN, "layers": "all", "weight": 5.0}])
    assert (both.mixture, both.slots, both.reference, both.cached) == (None, 2, "base", False)
    assert [(tap.of, tap.to, tap.layers) for tap in both.taps] == [(1, 0, (3, 5)), (0, 0, (1, 2, 3, 4, 5))]
    said = capsys.readouterr()
    assert "1 · (1 - p/2) · l2 at layers 3, 5 (reroute) + 5 · l2 at layers 1 to 5 (retain)" in said.out
    assert "warning" not in said.err
    with_head = tapped(loss_type="sigmoid")
    assert with_head.mixture is not None
    assert with_head.cached
    capsys.readouterr()
    tapped()
    assert "no gradient reaches the adapters above layer 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("keys", "around", "said"),
    [
        ({"tap": []}, {}, "objective.tap: type = 'representation' needs one [[objective.tap]] or more"),
        ({"type": "preference"}, {}, "objective.tap: taps on hidden states are of type = 'representation'"),
        ({"tap": [RETAIN, RETAIN]}, {}, "each has a name of its own"),
        ({"tap": [{**RETAIN, "layers": [0]}]}, {}, "layer 0 is below layer 1, the first that is trained"),
        ({"tap": [{**RETAIN, "layers": [6]}]}, {}, "there is no layer 6; the model's are 0 to 5"),
        ({"tap": [{**RETAIN, "layers": ["1.5"]}]}, {}, "'1.5' is no part of the depth"),
        ({"tap": [{**RETAIN, "of": "breaker"}]}, {}, "'breaker' is no row of type = 'representation'"),
        ({"tap": [{**RETAIN, "distance": "projection"}]}, {}, "is between two answers; name the other one"),
        ({"tap": [{**RETAIN, "distance": "cosine", "relative": True}]}, {}, "'cosine' is not a length"),
        ({"tap": [{**RETAIN, "k": 3}]}, {}, "objective.tap.0.k: has a meaning for distance = 'top_k' only"),
        ({"loss_type": "kto"}, {}, "with taps, losses are of pairs"),
        ({"reference": {"model": "start"}}, {}, "what runs in every step is the base, or an adapter in a folder"),
        ({}, {"in_full": True}, "full_fine_tune and trainable_modules leave none"),
        (
            {},
            {"router_loss": True},
            "load_balancing_loss_coef: not built together with a reference that runs in every step",
        ),
        ({}, {"starts_from": "adapter"}, "objective.reference: init_adapter goes on from an adapter"),
    ],
)
def test_taps_that_do_not_go_with_the_rest_are_refused(keys: dict[str, Any], around: dict[str, Any], said: str) -> None:
    kind = "unpaired" if keys.get("loss_type") == "kto" else "preference"
    with pytest.raises(UserError, match=re.escape(said)):
        spec(
            kind, PLAIN.__class__(**{**PLAIN.__dict__, **around}), **{"type": "representation", "tap": [RETAIN], **keys}
        )


def breaking(*datasets: Dataset, **keys: Any) -> ObjectiveSpec | None:
    tap = {"name": "break", "of": "breaker", "layers": [2], "distance": "relu_cosine"}
    table = Objective.model_validate({"type": "circuit_breaker", "tap": [tap], **keys})
    return spec_of(table, None, list(datasets), [], PLAIN)


def test_circuit_breakers_take_two_streams_of_rows() -> None:
    bad, good = dataset("completion", stream="breaker"), dataset("textfile", stream="retain")
    found = breaking(bad, good)
    assert found is not None
    assert (found.mixture, found.slots, found.taps[0].of) == (None, 2, 0)
    for datasets, keys, said in (
        ([bad, dataset("chat")], {}, "datasets.1: circuit breakers take rows by themselves"),
        ([bad, dataset("preference")], {}, "datasets.1: circuit breakers take rows by themselves"),
        ([bad, good], {"loss_type": "sigmoid"}, "rows of two streams are not compared"),
        ([bad, good], {"tap": [{**RETAIN, "of": "breaker", "to": "retain"}]}, "has nothing to do with the other's"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            breaking(*datasets, **keys)
    with pytest.raises(UserError, match="rows of two streams are for"):
        spec_of(None, None, [bad], [], PLAIN)


def test_losses_without_a_reference_go_with_all_of_it() -> None:
    found = spec(loss_type="simpo", around=Around(1, True, "adapter", 1.0, 0.0, True))
    assert found is not None
    assert found.reference is None
    start = spec(reference={"model": "start"}, around=Around(1, True, "adapter", 1.0, 0.0, True))
    assert start is not None
    assert start.reference == "start"


def test_answers_that_come_later_cannot_be_compared_with_the_start() -> None:
    generated = [dataset("preference", rejected="generate")]
    start = {"type": "preference", "reference": {"model": "start"}}
    with pytest.raises(UserError, match=r"objective.reference.model: 'start' cannot say anything of answers"):
        spec_of(Objective.model_validate(start), None, generated, [], PLAIN)
    without = spec_of(Objective.model_validate({**start, "loss_type": "simpo"}), None, generated, [], PLAIN)
    assert without is not None
    assert without.reference is None


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"type": "preference", "loss_type": "dpo"}, "DPO is loss_type = 'sigmoid'"),
        ({"type": "preference", "loss_type": ["aot_pair"]}, "it is 'aot_unpaired'"),
        ({"type": "preference", "loss_type": "drpo"}, "not built"),
        ({"type": "preference", "loss_type": "reprpo"}, "type = 'representation', with [[objective.tap]]"),
        (
            {"type": "representation", "tap": [{**RETAIN, "distance": "cka"}]},
            "it is not built: of one row against another",
        ),
        (
            {"type": "representation", "tap": [{**RETAIN, "distance": "mse"}]},
            "of the mean over the hidden size it is 'squared'",
        ),
        ({"type": "preference", "ld_alpha": 0.5}, "LD-DPO weighs tokens"),
        ({"type": "preference", "use_weighting": True}, "WPO weighs tokens"),
        ({"type": "preference", "sync_ref_model": True}, "the reference stays as it was at the start"),
        ({"type": "preference", "padding_free": True}, "rows of a micro-batch are padded"),
    ],
)
def test_what_is_not_built_is_refused_by_name(keys: dict[str, Any], said: str) -> None:
    (line,) = problems({**small(), "objective": keys})
    assert said in line
