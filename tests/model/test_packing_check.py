"""Which families keep documents apart that share a row, and by what: tried on tiny copies, not looked up in a list."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pipeline.console import UserError
from pipeline.model import tiny_copy
from pipeline.model.stage import Stage
from pipeline.model.structure import apart
from pipeline.model.structure.apart import Way
from pipeline.model.trial import packing_check
from tests.helpers.builders import save_model
from tests.helpers.stages import build

APART = ("cohere", "cohere2", "gemma3_text")
NOT_APART = ("qwen3_next",)
# Tried one by one: those that have a mask of their own, mixtures, and those that are built from older ones.
MORE_APART = (
    *("llama", "mistral", "ministral3", "qwen2", "qwen3", "qwen3_moe", "phi3", "gemma2", "granite", "glm4", "mixtral"),
    *(
        "deepseek_v3",
        "olmo2",
        "olmo3",
        "starcoder2",
        "smollm3",
        "exaone4",
        "helium",
        "seed_oss",
        "arcee",
    ),
    *("apertus", "ernie4_5", "stablelm"),
)
MORE_NOT_APART = ("qwen3_5_text", "granitemoehybrid", "minimax", "olmo_hybrid")
SMALL = {"num_hidden_layers": 4, "n_layer": 4, "vocab_size": 64}


def config(kind: str, **changes: Any) -> Any:
    known = AutoConfig.for_model(kind).to_dict()
    return AutoConfig.for_model(
        kind, **{key: value for key, value in (SMALL | changes).items() if key in known or key in changes}
    )


def slow(kinds: tuple[str, ...]) -> list[Any]:
    return [pytest.param(kind, marks=pytest.mark.slow) for kind in kinds]


@pytest.mark.parametrize("kind", [*APART, *slow(MORE_APART)])
def test_families_that_keep_documents_apart_pass(kind: str) -> None:
    assert packing_check.check(config(kind)) == "positions"


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
def test_no_family_that_is_accepted_shows_a_document_another(kind: str) -> None:
    """Of every family that transformers has: refused, or its logits of a second document are those of that document alone."""
    try:
        asked = config(kind)
    except Exception as error:  # of transformers, which wants more of some families' configs
        pytest.skip(str(error)[:200])
    try:
        way = packing_check.check(asked)
    except UserError:  # no copy of it, or a leak that the check itself has found
        return
    model, _ = tiny_copy.tiny_copy(asked)
    ids, others = torch.arange(8, 24)[None], torch.cat([torch.arange(31, 38), torch.arange(15, 24)])[None]
    positions = torch.cat([torch.arange(7), torch.arange(9)])[None]
    given = {"position_ids": positions, **apart.WAYS[way](model, positions)}
    with torch.no_grad():
        alone = model(input_ids=ids[:, 7:], use_cache=False).logits
        both = model(input_ids=ids, **given, use_cache=False).logits[:, 7:]
        beside_another = model(input_ids=others, **given, use_cache=False).logits[:, 7:]
    # Products of another size are summed in another order: some roundings of fp32 in each of a few layers.
    rounding = 1e-5 * alone.abs().max()
    assert (both - beside_another).abs().max() <= rounding
    # Where keys are chosen by a score, many of these random ones score the same 0, and which of them comes first decides.
    if not hasattr(asked.get_text_config(), "index_topk"):
        assert (both - alone).abs().max() <= rounding


def test_masks_are_handed_to_a_family_that_makes_its_own_without_positions() -> None:
    assert packing_check.check(config("gpt_oss")) == "masks"


@pytest.mark.parametrize("kind", [*NOT_APART, *slow(MORE_NOT_APART)])
def test_families_that_do_not_are_refused_by_name(kind: str) -> None:
    with pytest.raises(UserError, match=rf"model_type '{kind}' does not keep documents apart"):
        packing_check.check(config(kind))


@pytest.mark.parametrize(
    "kind", ["cohere2", *slow((*APART[:1], APART[2], *(k for k in MORE_APART if k != "stablelm"), "gpt_oss"))]
)
def test_boundaries_come_to_every_attention_where_flash_attention_is_asked_for(kind: str) -> None:
    assert packing_check.check(config(kind), "flash_attention_2") == "boundaries"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("stablelm", "does not keep documents apart"),  # its attention is not handed what the model is
        (
            "qwen3_next",
            "packing two documents into a row, tried on a tiny copy, fails",
        ),  # its recurrence says so itself
    ],
)
def test_families_to_which_boundaries_do_not_come_are_refused_with_flash_attention(kind: str, why: str) -> None:
    with pytest.raises(UserError, match=f"model_type '{kind}'.* ?{why}"):
        packing_check.check(config(kind), "flash_attention_2")


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_of_rotary_embeddings_that_change_with_length_streams_are_packed_below_that_only(kind: str) -> None:
    factors = {"long_factor": [1.0] * 32, "short_factor": [1.0] * 32} if kind == "longrope" else {"factor": 2.0}
    rope = {"rope_type": kind, "rope_theta": 10000.0, "original_max_position_embeddings": 1024, **factors}
    stretched = config("llama", hidden_size=256, num_attention_heads=4, head_dim=64, rope_parameters=rope)
    with pytest.raises(UserError, match="lower sequence_len to 1,024"):
        packing_check.check(stretched, cut_in=2048)
    assert packing_check.check(stretched, cut_in=1024) == packing_check.check(stretched) == "positions"


LENGTHS = ((3, 5), (3, 5))  # of the documents in each of two rows


def documents(stages: list[Stage], by: Way) -> tuple[Tensor, Tensor]:
    """What the stages give for two rows of two documents, and for each document by itself, [documents' tokens, D]."""
    ids = torch.randint(8, 60, (2, 8), generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[*range(a), *range(b)] for a, b in LENGTHS])

    def through(given: Tensor, at: Tensor) -> Tensor:
        handed: Any = (given, at)
        for stage in stages:
            stage.kept_apart_by = by
            handed = stage(handed)
        return handed

    with torch.no_grad():
        together = through(ids, positions).flatten(0, 1)
        parts = [ids[row, a:b][None] for row, (n, m) in enumerate(LENGTHS) for a, b in ((0, n), (n, n + m))]
        alone = [through(part, torch.arange(part.shape[1])[None])[0] for part in parts]
    return together, torch.cat(alone)


def test_a_family_with_masks_of_its_own_keeps_documents_apart_on_stages(tmp_path: Path) -> None:
    """transformers' functions give the masks, on every stage; without them documents leak."""
    small = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "head_dim": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4, "max_position_embeddings": 64}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config("gpt_oss", **small, **experts)).save_pretrained(tmp_path)
    stages = [build(tmp_path, 0, 2).eval(), build(tmp_path, 2, 4).eval()]
    together, alone = documents(stages, "masks")
    assert (together - alone).abs().max() <= 1e-5 * alone.abs().max()
    leaking, _ = documents(stages, "positions")
    assert (leaking - alone).abs().max() > 1e-2 * alone.abs().max()


def test_flash_attention_is_told_of_boundaries_once_a_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By transformers' own function; an attention that goes by them alone gives what each document gives by itself."""
    save_model(tmp_path, "llama")
    told, counted = [], []

    def recorded(*given: Any, **named: Any) -> Any:
        told.append({key: named.get(key) for key in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")})
        return packing_check.attention_by_boundaries(*given, **named)

    def made(positions: Tensor) -> Any:
        counted.append(positions.shape)
        return prepare_fa_kwargs_from_position_ids(positions)

    AttentionInterface.register("recorded", recorded)
    AttentionMaskInterface.register("recorded", lambda *_, **__: None)
    monkeypatch.setattr(apart, "prepare_fa_kwargs_from_position_ids", made)
    stages = [build(tmp_path, 0, 2).eval(), build(tmp_path, 2, 4).eval()]
    for stage in stages:
        stage.model.config._attn_implementation = "recorded"
    together, alone = documents(stages, "boundaries")
    assert (together - alone).abs().max() <= 1e-5 * alone.abs().max()
    assert counted[:2] == [(2, 8)] * 2  # once a stage, whatever its layers
    for given in told[:4]:  # of four layers
        assert given["cu_seq_lens_q"].tolist() == given["cu_seq_lens_k"].tolist() == [0, 3, 8, 11, 16]
        assert given["cu_seq_lens_q"].dtype == torch.int32
        assert given["max_length_q"] == given["max_length_k"] == 5
    leaking, _ = documents(stages, "positions")
    assert (leaking - alone).abs().max() > 1e-2 * alone.abs().max()
