"""A run's report: what is in the page and the pictures, made of a run's folder as training leaves it."""

import json
import re
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.console import UserError
from pipeline.pages import drawing
from pipeline.publishing.report import beside, comparison, page, pictures
from pipeline.publishing.report.beside import Reports
from pipeline.publishing.report.read import Value, read
from tests.helpers.browser import CHROMIUM, OPEN_ALL, Look, chromium
from tests.helpers.builders import metrics, only_run, save_model, train, write_config
from tests.helpers.paths import ROOT

NASTY = "<script>alert('$x$')</script>"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run over two stages, with samples, evaluations and a report at its end."""
    folder = tmp_path_factory.mktemp("report")
    save_model(folder / "base")
    config = write_config(
        folder / "c.toml",
        model=str(folder / "base"),
        output_dir=str(folder / "runs"),
        eval_steps=2,
        eval_before_first_step=True,
        grad_norm_steps=2,
        report_every_minutes=60,
        samples={"prompts": ["The salt", NASTY], "every_steps": 2, "max_new_tokens": 8},
    )
    said = train(2, "--config", str(config))
    found = only_run(folder / "runs")
    assert f"report:   {found / 'report.html'}" in said
    assert f"--lora {found / 'step5'} --compare" in said, "what can come next"
    return found


class Page(HTMLParser):
    """Tags, addresses and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value or "" for key, value in attrs if key == "id"]
        self.links += [value or "" for key, value in attrs if key in ("src", "href", "xlink:href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_stands_alone_and_says_what_the_run_did(run: Path) -> None:
    found = Page((run / "report.html").read_text(encoding="utf-8"))
    assert "script" not in found.tags
    assert all(link.startswith(("#", "data:")) for link in found.links), "nothing is loaded from elsewhere"
    last = metrics(run)
    losses = [line["train/loss"] for line in last if "train/loss" in line]
    best = min(line["eval/book/loss"] for line in last if "eval/book/loss" in line)
    facts = json.loads((run / "run.json").read_text())
    spoken = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    expected = [run.name, f"{losses[-1]:.4f}", f"{best:.4f}", "down_proj of layers 0 to 2", "merge_lora.py", NASTY]
    expected += [f"{one['tokens']:,}" for one in facts["data"]]  # the data with its counts
    expected += [f"{package} {version}" for package, version in facts["parts"][-1]["versions"].items()]
    expected += ["step 0, ", "step 5, ", "the base, ", *(one["text"] for one in spoken if one["step"] in (0, 5))]
    expected += ["lora_rank = 4", "early_stopping_min_delta = "]  # the configuration, defaults included
    for words in expected:
        assert words in found.text, words
    assert len(found.ids) == len(set(found.ids)), "pictures share no ids"
    assert found.tags.count("svg") == len(list((run / "report").glob("*.svg")))


def test_every_picture_is_there_as_svg_and_png(run: Path) -> None:
    names = {file.stem for file in (run / "report").iterdir()}
    assert names == {"loss", "learning_rate", "gradient_norm", "speed", "norms", "memory"}
    for name in names:
        assert (run / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        svg = (run / "report" / f"{name}.svg").read_text(encoding="utf-8")
        ElementTree.fromstring(svg)
        assert drawing.INK not in svg, "text has the colour of the page"
        assert not re.search(r'(href|src)="http', svg)


def test_tensorboard_has_the_same_and_texts(run: Path) -> None:
    """What docs/tracking.md lists: memory, tokens, where the time went, gradients by layer; configuration and samples as text."""
    events = EventAccumulator(str(run))
    events.Reload()
    lines = metrics(run)
    for tag in {tag for line in lines for tag in line} - {"step"}:
        logged = {line["step"]: line[tag] for line in lines if line.get(tag) is not None}
        assert {e.step: e.value for e in events.Scalars(tag)} == pytest.approx(logged, rel=1e-6), tag  # fp32 there
    tags = set(events.Tags()["scalars"])
    parts = ("data", "forward", "backward", "optimizer", "wait", "evaluation", "saves")
    assert {f"seconds/rank{rank}/{part}" for rank in (0, 1) for part in parts} <= tags
    assert {"train/tokens", "memory_gib/rank0", "memory_gib/rank1"} <= tags
    assert [e.step for e in events.Scalars("grad_norm/000")] == [2, 4]
    texts = {tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert "lora_rank = 4" in texts["config/text_summary"]
    assert "The salt" in texts["samples/0/text_summary"]


def test_the_curve_has_the_runs_numbers(run: Path) -> None:
    found = read(run)
    logged = [line for line in metrics(run) if "train/loss" in line]
    assert found.series["train/loss"] == [Value(line["step"], line["train/loss"]) for line in logged]
    assert [value.step for value in found.series["eval/book/loss"]] == [0, 2, 4]
    assert set(found.norms) == {f"model.layers.{layer}.mlp.down_proj" for layer in range(3)}
    assert sorted(found.spoken) == [0, 2, 4, 5]


def test_a_run_that_still_writes(run: Path, tmp_path: Path) -> None:
    """A line that is not whole yet is left out; the plan is not there yet."""
    for name in ("config.toml", "metrics.jsonl"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "train/lo')
    assert "memory" not in [picture.name for picture in page._pictures(read(tmp_path))]
    assert read(tmp_path).facts.step == 5


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run"):
        read(tmp_path)
    (tmp_path / "config.toml").write_text("")
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="has logged nothing yet"):
        read(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.publishing.report", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "has logged nothing yet" in done.stderr


def test_long_lines_are_thinned_and_keep_their_end() -> None:
    values = [Value(step, float(step)) for step in range(1, 100_001)]
    thinned = pictures.thinned(values)
    assert len(thinned) <= pictures.MOST_POINTS
    assert thinned[-1].step == 100_000
    assert json.dumps(thinned[0]) == json.dumps(Value(67, 34.0))


@pytest.fixture(scope="module")
def other(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run with another learning rate and a loss a tenth lower."""
    folder = tmp_path_factory.mktemp("other") / "20260101_00-00-00"
    folder.mkdir()
    config = (run / "config.toml").read_text(encoding="utf-8")
    (folder / "config.toml").write_text(config.replace("lr = 0.01", "lr = 0.02"))
    lines = [{key: v - 0.1 if key.endswith("/loss") else v for key, v in line.items()} for line in metrics(run)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_runs_beside_each_other(run: Path, other: Path, tmp_path: Path) -> None:
    html = tmp_path / "both.html"
    command = [sys.executable, "compare_runs.py", str(run), str(other), "--html", str(html)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = {line[:20].strip(): line.split()[-2:] for line in done.stdout.splitlines()}
    assert rows["optimizer.lr"] == ["0.01", "0.02"]
    assert not [row for row in rows if "." in row and row != "optimizer.lr"], "only what differs"
    mine, others = (float(cell) for cell in rows["least loss of book"])
    assert mine - others == pytest.approx(0.1, abs=1e-4)
    found = Page(html.read_text(encoding="utf-8"))
    for words in ("optimizer.lr", "0.02", run.name, other.name):
        assert words in found.text, words
    assert html.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    html.unlink()  # the picture is still there: neither is written
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (again.returncode, "exists" in again.stderr, html.exists()) == (2, True, False)


def test_values_are_shown_as_toml_has_them() -> None:
    configs = [{"a": ["x", "y"], "b": True, "c": 1e-5, "d": "é", "e": [], "f": {"g": 1}}, {"a": ["x"], "f": {"g": 2}}]
    assert {row.what: row.cells for row in comparison.differences(configs)} == {
        "a": ('["x", "y"]', '["x"]'),
        "b": ("true", "–"),
        "c": ("1e-05", "–"),
        "d": ("é", "–"),
        "e": ("[]", "–"),
        "f.g": ("1", "2"),
    }


def test_what_cannot_be_compared(run: Path) -> None:
    for folders in ([run], [run, run]):
        with pytest.raises(UserError, match=r"one run alone|named twice"):
            comparison.compare(folders, None, force=False)


def test_a_report_is_written_while_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When it is due, and not while one is being written."""
    clock, waiting = [0.0], tmp_path / "go on"
    monkeypatch.setattr(beside.time, "monotonic", lambda: clock[0])
    script = f"until [ -e '{waiting}' ]; do sleep 0.01; done; echo x >> '{tmp_path / 'written'}'"
    monkeypatch.setattr(beside, "_command", lambda _: ["sh", "-c", script])
    reports = Reports(tmp_path, 5.0)
    begun = []
    for minute in (1, 4.9, 5.1, 10.3, 10.4):
        clock[0] = minute * 60
        reports.step_done()
        begun.append(reports._writing is not None)
        if minute == 10.3:
            waiting.touch()
            assert reports._writing is not None
            reports._writing.wait()
    assert begun == [False, False, True, True, True]
    reports.run_ended()
    assert (tmp_path / "written").read_text() == "x\n" * 3, "at 5.1 minutes, at 10.4 and at the end"


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("look", [Look(1200), Look(1200, dark=True), Look(390), Look(390, dark=True)], ids=str)
def test_the_pages_in_a_browser(run: Path, other: Path, tmp_path: Path, look: Look) -> None:
    """Chromium draws both as they are meant to be read, on a screen and a phone, with all that is folded opened."""
    comparison.compare([run, other], tmp_path / "both.html", force=False)
    with chromium(tmp_path / "profile") as browser:
        for page_of, words in ((run / "report.html", "What comes next"), (tmp_path / "both.html", "optimizer.lr")):
            seen = browser.see(page_of, look, OPEN_ALL)
            seen.check(look)
            assert words in seen.texts
            assert len(zlib.compress(seen.png)) > 20_000, "not of one colour"
