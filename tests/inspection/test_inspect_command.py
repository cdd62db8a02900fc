"""inspect_lora.py as users start it: what it prints, what it refuses, the page it writes, the page in a browser."""

import re
import subprocess
import sys
import zlib
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import inspect_lora
from pipeline.console import UserError
from tests.helpers.artifacts import edit_json
from tests.helpers.browser import CHROMIUM, OPEN_ALL, Look, chromium
from tests.helpers.builders import ROOT, environment, save_model
from tests.helpers.inspection import orthonormal, save, with_eigenvalues, with_singular

WIDTH = 32
TEXT = (
    'She said: <script>alert("salt") & Co.</script>\nThe house \x07\x1b[31m was wet.\n' * 4
    + '</p><b>&amp;"Quills 塩.\n'
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    save_model(folder, "llama", layers=4)
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    """Layer 1 looks for what its module puts out at 'Q' and writes a token's row of the head; layers 0 and 2 have planted
    eigenvalues; layer 3 is zero."""
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer(TEXT, add_special_tokens=False).input_ids
    seen = []
    model.model.layers[1].mlp.down_proj.register_forward_hook(lambda _, __, h: seen.append(h[0]))
    with torch.no_grad():
        model(torch.tensor([[1, *ids]]))
    at = 1 + place_of_Q(base)
    head = model.lm_head.weight.detach().double()
    response = torch.nn.functional.normalize((head - head.mean(0))[tokenizer.convert_tokens_to_ids("Ġthe")][None])
    detector = torch.nn.functional.normalize(seen[0][at][None].double())
    rest = orthonormal(2, WIDTH, 3)
    gains = torch.tensor([0.9, 0.2, 0.1], dtype=torch.float64)
    modules = {
        "model.layers.0.mlp.down_proj": with_eigenvalues([-1.0, 0.01 + 0.03j], WIDTH, 2.0)[0],
        "model.layers.1.mlp.down_proj": with_singular(gains, *(_rows(v, rest) for v in (detector, response)), 2.0),
        "model.layers.2.mlp.down_proj": with_eigenvalues([-2.0, 0.4, -0.3], WIDTH, 2.0)[0],
        "model.layers.3.mlp.down_proj": {"A": orthonormal(3, WIDTH, 1), "B": torch.zeros(WIDTH, 3)},
    }
    return save(base.parent / "adapter", modules, 2.0)


def place_of_Q(base: Path) -> int:
    """The place of 'Q' among the text's tokens."""
    encoding = AutoTokenizer.from_pretrained(base)(TEXT, add_special_tokens=False, return_offsets_mapping=True)
    return next(i for i, (begin, end) in enumerate(encoding.offset_mapping) if TEXT[begin:end] == "Q")


def _rows(first: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """Orthonormal rows that begin with `first`."""
    Q, R = torch.linalg.qr(torch.cat([first, rest]).T)
    return (Q * R.diagonal().sign()).T


def call(monkeypatch, capsys, *arguments: str | Path) -> str:
    """The command in this process; what it prints."""
    monkeypatch.setattr(sys, "argv", ["inspect_lora.py", *map(str, arguments)])
    assert inspect_lora.main() == 0
    return capsys.readouterr().out


def refused(*arguments: str | Path) -> str:
    """The command in a process of its own, which ends with exit code 2; its message."""
    command = [sys.executable, str(ROOT / "inspect_lora.py"), *map(str, arguments)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.fixture
def written(base: Path, adapter: Path, tmp_path: Path, monkeypatch, capsys) -> tuple[str, Path]:
    """Everything at once: what was printed, and the page."""
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    out = tmp_path / "page.html"
    monkeypatch.setenv("COLUMNS", "200")
    return call(monkeypatch, capsys, adapter, "--input", base, "--text", tmp_path / "text.txt", "--html", out), out


def test_the_table_without_a_base(adapter: Path, monkeypatch, capsys) -> None:
    printed = call(monkeypatch, capsys, adapter)
    assert "erases 1, rotates 2" in printed
    assert "reflects 1, amplifies 1 (×1.4), damps 1 (×0.7)" in printed
    assert re.search(r"1 mlp\.down_proj +0\.9 .* 0\.9  0\.2  0\.1", printed)
    assert "1 of 4 modules do nothing: s·B·A is zero (model.layers.3.mlp.down_proj first)" in printed
    assert max(map(len, printed.splitlines())) <= 130


def test_the_planted_token_and_passage_are_in_the_terminal(written) -> None:
    printed, _ = written
    lines = printed.splitlines()
    assert max(map(len, lines)) <= 130
    assert "\x1b" not in printed
    assert "\x07" not in printed
    assert "⟦Q⟧uills" in printed
    fires = next(line for line in lines if "⟦Q⟧" in line)
    assert re.match(r"1 mlp\.down_proj +1 +0\.9 ", fires)
    assert " 0.9 " in fires[25:]


def test_the_page_is_whole_and_needs_nothing_else(written, base: Path) -> None:
    _, out = written
    html = out.read_text(encoding="utf-8")
    tree = ElementTree.fromstring(html.split("\n", 1)[1])  # raises where it is not well-formed
    tags = [element.tag for element in tree.iter()]
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & set(tags)
    for element in tree.iter():
        for name, value in element.attrib.items():
            assert not name.startswith(("on", "src")), (element.tag, name)
            assert name not in ("data", "action", "srcset"), (element.tag, name)
            if name.endswith("href"):
                assert value.startswith("#")
                assert tree.find(f".//*[@id='{value[1:]}']") is not None
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", html)
    assert "<script" not in html
    assert '</p><b>&amp;"Quills 塩.' in "".join(tree.itertext())
    assert "\x1b" not in html
    assert "\x07" not in html
    ids = [element.attrib["id"] for element in tree.iter() if "id" in element.attrib]
    assert len(ids) == len(set(ids))


def test_the_passages_are_marked(written, base: Path) -> None:
    """The peak of layer 1's first detector is the planted token with cos ±1; a passage's text is the text's."""
    _, out = written
    tree = ElementTree.fromstring(out.read_text(encoding="utf-8").split("\n", 1)[1])
    module = tree.find(".//*[@id='m1']")
    assert module is not None
    first = module.find(".//blockquote")
    assert first is not None
    marks = [mark for mark in first.iter("mark") if "peak" in mark.attrib["class"]]
    assert [mark.text for mark in marks] == ["Q"]
    assert re.fullmatch(rf"token {place_of_Q(base) + 1}: cos −?1\.000", marks[0].attrib["title"])
    shown = "".join(first.find("span[@class='text']").itertext()).removeprefix("… ").removesuffix(" …")  # type: ignore[union-attr]
    assert shown in re.sub("[\x07\x1b]", "·", TEXT)
    # The sign of a pair is free: the planted token is raised or, with detector and response turned round, lowered.
    chips = [[code.text for code in row.iter("code")] for row in module.iter("tr") if row.find(".//code") is not None]
    assert "␣the" in (chips[2][0], chips[3][0])
    (plane,) = (svg for svg in tree.iter("svg") if svg.attrib["class"] == "plane")
    dots = [use for use in plane.iter("use") if use.find("title") is not None]
    for effect in ("erases", "reflects"):
        (dot,) = (dot for dot in dots if f" {effect}. " in dot.find("title").text)  # type: ignore[union-attr, operator]
        assert f"fill: var(--{effect})" in dot.attrib["style"]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("look", [Look(1200), Look(1200, dark=True), Look(390)], ids=str)
def test_the_page_in_a_browser(written, tmp_path: Path, look: Look) -> None:
    """Chromium draws it as it is meant to be read, with all that is folded opened."""
    _, out = written
    with chromium(tmp_path / "profile") as browser:
        seen = browser.see(out, look, OPEN_ALL)
    seen.check(look)
    assert "Eigenvalues λ of s·A·B" in seen.texts
    assert len(zlib.compress(seen.png)) > 20_000, "not of one colour"


def test_refusals(adapter: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    told = refused(tmp_path / "none", "--text", tmp_path / "no.txt", "--directions", "0", "--device", "abacus")
    for part in ("no folder", "--input", "no file", "--directions 0", "--device abacus"):
        assert part in told
    (tmp_path / "page.html").write_text("mine")
    with pytest.raises(UserError, match="--force"):
        call(monkeypatch, capsys, adapter, "--html", tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == "mine"


def test_additive_adapters(base: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """Gains alone where widths differ; no effects; a text is refused; square ones of unknown kind are asked about."""
    wide = {"model.layers.0.mlp.down_proj": {"A": orthonormal(2, 64, 1), "B": orthonormal(2, WIDTH, 2).T.contiguous()}}
    square = {"model.layers.0.self_attn.q_proj": with_eigenvalues([-1.0, 0.5], WIDTH, 1.0)[0]}
    for name, modules in (("wide", wide), ("square", square)):
        save(tmp_path / name, modules, 1.0, kind="lora")
    printed = call(monkeypatch, capsys, tmp_path / "wide", "--input", base)
    assert "gains alone" in printed
    assert "erases" not in printed.split("‖sBA‖₂: ")[0]
    printed = call(monkeypatch, capsys, tmp_path / "square", "--html", tmp_path / "page.html")
    assert "is not reported" in printed
    assert "−1" in (tmp_path / "page.html").read_text()
    assert "what it does</th>" in (tmp_path / "page.html").read_text()
    (tmp_path / "text.txt").write_text("salt")
    with pytest.raises(UserError, match="detectors look at a module's input"):
        call(monkeypatch, capsys, tmp_path / "wide", "--input", base, "--text", tmp_path / "text.txt")
    # As PEFT writes it, without our metadata: the files leave the kind open.
    from safetensors.torch import load_file, save_file

    file = tmp_path / "square" / "adapter_model.safetensors"
    save_file(load_file(file), file)
    edit_json(tmp_path / "square" / "adapter_config.json", lora_alpha=2.0)
    with pytest.raises(UserError, match="--kind lora or --kind multiplicative_lora"):
        call(monkeypatch, capsys, tmp_path / "square")
    printed = call(monkeypatch, capsys, tmp_path / "square", "--kind", "multiplicative_lora")
    assert "erases 1, amplifies 1 (×1.5)" in printed
