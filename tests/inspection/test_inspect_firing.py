"""Firing in a text: forward hooks on the transformers model, and a token that was planted."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.console import UserError
from pipeline.inspection.firing import fire
from pipeline.inspection.passages import Passage, largest, read_text
from pipeline.inspection.spectrum import spectrum
from tests.helpers.builders import save_model
from tests.helpers.inspection import orthonormal, with_singular

CPU = torch.device("cpu")
TEXT = "The ledger was wet.\r\nNobody had seen the zebra — não, 塩 — by the salt house. " * 3 + "Quills.\n"
MODULES = ["model.layers.0.mlp.down_proj", "model.layers.2.mlp.down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "cohere"
    save_model(folder, "cohere", layers=3)
    return folder


def outputs(base: Path, rows, start: int) -> dict[str, torch.Tensor]:
    """What the modules put out [T, D] over the text's tokens, by hooks on the whole model."""
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    seen: dict[str, list[torch.Tensor]] = {module: [] for module in MODULES}
    for module in MODULES:
        model.get_submodule(module).register_forward_hook(lambda _, __, h, m=module: seen[m].append(h[0]))
    with torch.no_grad():
        for row in rows:
            model(row[None])
    return {module: torch.cat([h[start:] for h in hs]) for module, hs in seen.items()}


def test_a_text_is_cut_into_tokens_that_know_their_places(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(TEXT.encode())
    tokenizer = AutoTokenizer.from_pretrained(base)
    text = read_text(file, tokenizer, limit=10_000, row_tokens=32)
    assert "".join(text.pieces) == TEXT.replace("\r\n", "\n")
    ids = tokenizer(TEXT.replace("\r\n", "\n"), add_special_tokens=False).input_ids
    assert [int(id) for row in text.rows for id in row[text.start :]] == ids
    assert all(int(row[0]) == tokenizer.bos_token_id and len(row) <= 32 for row in text.rows)
    assert text.whole
    assert len(text.pieces) == len(ids)
    beginning = read_text(file, tokenizer, limit=40, row_tokens=32)
    assert not beginning.whole
    assert beginning.pieces == text.pieces[:40]
    assert [len(r) for r in beginning.rows] == [32, 10]


def test_against_hooks_and_a_planted_token_is_found(base: Path, tmp_path: Path) -> None:
    """One detector is what the module puts out at one token: there its cosine is 1, and the passage's peak.

    The token occurs once: in layer 0 of this family an MLP sees the token alone, and all of a kind are alike."""
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    text = read_text(file, AutoTokenizer.from_pretrained(base), limit=10_000, row_tokens=48)
    hs = outputs(base, text.rows, text.start)
    planted, gains = text.pieces.index("Q"), torch.tensor([0.8, 0.3, 0.1], dtype=torch.float64)
    spectra = {}
    for module, h in hs.items():
        rest = orthonormal(3, 32, 2)
        basis = torch.linalg.qr(torch.cat([h[planted][None].double(), rest]).T).Q.T[:3]
        pair = with_singular(gains, basis, orthonormal(3, 32, 3), 1.0)
        spectra[module] = spectrum(pair["A"], pair["B"], 1.0)
    found = fire(str(base), text, spectra, kept=2, device=CPU, dtype=torch.float32)
    for module, h in hs.items():
        cosines = torch.nn.functional.cosine_similarity(h[:, None].double(), spectra[module].detectors_KD[None], dim=2)
        firing = found[module]
        # Hidden states of three layers in fp32, dot products of 32: about 1e-6.
        assert (firing.cosines_TN - cosines[:, :2]).abs().max() < 1e-5
        assert (firing.mean_K - gains * cosines.abs().mean(0)).abs().max() < 1e-5
        assert (firing.largest_K - gains * cosines.abs().amax(0)).abs().max() < 1e-5
        assert firing.threshold == pytest.approx(4 / math.sqrt(32))
        near = (cosines.abs() - firing.threshold).abs() < 1e-5
        share = (cosines.abs() > firing.threshold).double().mean(0)
        assert ((firing.share_K - share).abs() <= near.double().mean(0) + 1e-12).all()
        assert float(firing.largest_K[0]) == pytest.approx(0.8, abs=1e-5)
        passages = largest(firing.cosines_TN[:, 0].abs(), 2, least=1e-30)
        assert float(firing.cosines_TN[passages[0].peak, 0].abs()) == pytest.approx(1, abs=1e-5)
        assert passages[0].peak == planted


def test_what_cannot_be_read_is_said(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("salt")
    text = read_text(file, AutoTokenizer.from_pretrained(base), limit=10)
    narrow = spectrum(orthonormal(1, 16, 1), orthonormal(1, 16, 1).T, 1.0)
    with pytest.raises(UserError, match="16 numbers"):
        fire(str(base), text, {MODULES[0]: narrow}, kept=1, device=CPU, dtype=torch.float32)
    with pytest.raises(UserError, match="cannot be read"):
        fire(str(base), text, {"model.layers.9.mlp.down_proj": narrow}, kept=1, device=CPU, dtype=torch.float32)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match="no text"):
        read_text(tmp_path / "empty.txt", AutoTokenizer.from_pretrained(base), limit=10)
    with pytest.raises(UserError, match="no file"):
        read_text(tmp_path / "none.txt", None, limit=10)


def test_passages_do_not_overlap_and_the_largest_is_first() -> None:
    values = torch.zeros(100)
    values[[3, 5, 60, 61, 99]] = torch.tensor([0.5, 0.9, 0.8, 0.85, 0.2])
    assert largest(values, 5, least=0.1, radius=4) == [Passage(1, 5, 10), Passage(57, 61, 66), Passage(95, 99, 100)]
    assert largest(values, 1, least=0.95) == []
