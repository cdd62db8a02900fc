"""A base model's folder, however it lies on disk: what is read is what transformers reads, on any number of stages.

Oracle: transformers' own model from the same folder, its logits, and whether its head is its embedding.
"""

import json
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from pipeline.artifacts.fold.merge import merge
from pipeline.console import UserError
from pipeline.formats.base_model import files_to_copy, head_of, read_base
from pipeline.formats.safetensors import read_tensor
from pipeline.model import weights
from pipeline.model.adapters import full as trained_modules
from pipeline.model.stage import empty_model, read_model_config, tied_head
from pipeline.model.structure.build import logit_transform
from pipeline.publishing.push import files_of
from pipeline.training.checkpoint import trained
from pipeline.training.stage.meta_model import MetaModel
from pipeline.training.start import prepare
from tests.helpers import builders
from tests.helpers.artifacts import multiplicative
from tests.helpers.families import by_peft
from tests.helpers.stages import build, chain, hidden, token_ids

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
INDEX = "model.safetensors.index.json"
Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors], Any]


def rewritten(folder: Path, change: Change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edited(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def tied(folder: Path, kind: str = "llama", change: Change = lambda tensors: None, **config: Any) -> None:
    builders.save_model(folder, kind, tie_word_embeddings=True, **config)
    rewritten(folder, change)


def another_head(tensors: Tensors) -> None:
    tensors[HEAD] = tensors[EMBEDDING].flip(0).contiguous()


def the_same_head(tensors: Tensors) -> None:
    tensors[HEAD] = tensors[EMBEDDING].clone()


def head_alone(tensors: Tensors) -> None:
    tensors[HEAD] = tensors.pop(EMBEDDING)


def by_automodel(folder: Path, kind: str = "cohere", **options: Any) -> None:
    """Saved from AutoModel: no prefix, no head."""
    builders.save_model(folder, kind, tie_word_embeddings=True)
    model = AutoModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, **options)
    assert "embed_tokens.weight" in read_base(folder).tensors


def sharded(folder: Path, seed: int = 0, **config: Any) -> None:
    model = builders.save_model(folder, "llama", seed=seed, **config)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="30KB")
    assert (folder / INDEX).is_file()


def single_beside_shards(folder: Path) -> None:
    sharded(folder)
    builders.save_model(folder / "other", "llama", seed=5)
    shutil.move(folder / "other" / "model.safetensors", folder)
    shutil.rmtree(folder / "other")


def left_over_index(folder: Path) -> None:
    builders.save_model(folder, "llama")
    names = load_file(folder / "model.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "model-00001-of-00030.safetensors")}))


def silent_config(folder: Path) -> None:
    """A family that ties by default, and a config.json that does not say it."""
    tied(folder, "cohere", another_head)
    edited(folder / "config.json", tie_word_embeddings=...)


EXPERTS = {"num_local_experts": 4}
LAYOUTS: dict[str, Callable[[Path], None]] = {
    "tied, stored once": lambda folder: tied(folder, "cohere"),
    "tied, two that differ": lambda folder: tied(folder, "llama", another_head),
    "tied, two that differ, cohere": lambda folder: tied(folder, "cohere", another_head),
    "tied, two that are equal": lambda folder: tied(folder, "llama", the_same_head),
    "tied, the head alone": lambda folder: tied(folder, "llama", head_alone),
    "tied by default, two that differ": silent_config,
    "not tied": lambda folder: (builders.save_model(folder, "cohere", tie_word_embeddings=False), None)[1],
    "experts, tied, two that differ": lambda folder: tied(folder, "mixtral", another_head, **EXPERTS),
    "experts, tied, the head alone": lambda folder: tied(folder, "mixtral", head_alone, **EXPERTS),
    "experts, tied, stored once": lambda folder: tied(folder, "mixtral", **EXPERTS),
    "by AutoModel": by_automodel,
    "by AutoModel, sharded": lambda folder: by_automodel(folder, max_shard_size="30KB"),
    "by AutoModel, experts": lambda folder: by_automodel(folder, "mixtral"),
    "a file beside shards and an index": single_beside_shards,
    "an index left over beside a file": left_over_index,
}


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_number_of_stages_reads_what_transformers_reads(tmp_path: Path, layout: str) -> None:
    LAYOUTS[layout](tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    right = whole(token_ids()).logits
    for cuts in ([0, 4], [0, 2, 4]):
        stages = chain(tmp_path, cuts)
        transform = logit_transform(stages[-1].model.config)
        ours = transform.apply(stages[-1].head(hidden(stages, token_ids())))
        assert (ours - right).abs().max() <= 4 * torch.finfo(torch.float32).eps * right.abs().max()
        assert bool(tied_head(stages[-1].model)) == (whole.lm_head.weight is whole.model.embed_tokens.weight)
    weights.check_complete(empty_model(read_model_config(str(tmp_path)), torch.float32, None), read_base(tmp_path))


@pytest.mark.parametrize(("change", "one"), [(another_head, False), (the_same_head, True), (head_alone, True)])
def test_what_is_trained_of_a_tied_head(tmp_path: Path, change: Change, one: bool) -> None:
    tied(tmp_path, "llama", change)
    meta_model = empty_model(read_model_config(str(tmp_path)), torch.float32, None)
    found = trained_modules.resolve(meta_model, ["embed_tokens"], [])
    assert set(found) == ({EMBEDDING, HEAD} if one else {EMBEDDING})
    head = head_of(read_base(tmp_path))
    assert head.tied == one
    assert head.head
    assert head.embedding
    assert (head.head == head.embedding) == (change is head_alone)


FOLDED = [
    "tied, stored once",
    "tied, two that differ",
    "tied by default, two that differ",
    "tied, two that are equal",
    "tied, the head alone",
    "by AutoModel",
    "by AutoModel, sharded",
    "a file beside shards and an index",
]


@torch.no_grad()
@pytest.mark.parametrize("in_full", [False, True], ids=["pairs", "and the embedding"])
@pytest.mark.parametrize("layout", FOLDED)
def test_the_fold_of_what_is_trained_on_every_layout(tmp_path: Path, layout: str, in_full: bool) -> None:
    """As the adapter that the training writes: a trained embedding is the head's, too, where the two are one."""
    base, module = tmp_path / "base", "model.layers.1.mlp.down_proj"
    LAYOUTS[layout](base)
    right = AutoModelForCausalLM.from_pretrained(base).eval()
    table, weight = right.model.embed_tokens.weight, right.get_parameter(f"{module}.weight")
    one = tied_head(empty_model(read_model_config(str(base)), torch.float32, None))
    if in_full:
        table.add_(0.1 * torch.randn(table.shape, generator=torch.Generator().manual_seed(3)))
    full = {"full": {EMBEDDING: table.clone()}, "tied": one} if in_full else {}
    pair = multiplicative(tmp_path / "adapter", {module: (32, 64)}, **full)
    weight.copy_(weight + 1.5 * pair[f"{module}.B"] @ pair[f"{module}.A"] @ weight)
    merge(base, tmp_path / "adapter", tmp_path / "out")
    folded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    logits = right(token_ids()).logits
    assert (folded(token_ids()).logits - logits).abs().max() <= 1e-5 * logits.abs().max()
    if not one:
        assert torch.equal(folded.lm_head.weight, right.lm_head.weight), "the head is as it was"


def test_an_adapter_of_the_head_of_a_base_that_stores_the_head_for_both(tmp_path: Path) -> None:
    """Folded into the one tensor it would change the embedding as well."""
    tied(tmp_path / "base", "llama", head_alone)
    by_peft(tmp_path / "base", tmp_path / "adapter", "lora", target_modules=["lm_head", "down_proj"])
    with pytest.raises(UserError, match=r"holds lm_head\.weight alone for both"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


@pytest.mark.parametrize(
    ("layout", "says"),
    [
        ("tied, two that differ", False),
        ("tied by default, two that differ", False),
        ("tied, two that are equal", True),
        ("tied, the head alone", True),
    ],
)
def test_a_whole_model_is_saved_as_it_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, says: bool
) -> None:
    """Two different tensors stay two, and the config says so; a program that goes by it alone would drop one."""
    LAYOUTS[layout](tmp_path / "base")
    stage = build(tmp_path / "base", 0, 4)
    (tmp_path / "out").mkdir()

    def together(
        folder: Path, step: int, place: Any, each: Callable[[Path], None], first: Callable[[Path], None], carrier: None
    ) -> None:
        each(folder)
        first(folder)

    monkeypatch.setattr(trained, "_together", together)
    place: Any = type("Place", (), {"stage": 0, "stages": 1, "replica": 0})()
    trained.save_model(tmp_path / "out", 1, place, stage, tmp_path / "base", None)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is says
    saved, base = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("out", "base"))
    assert torch.equal(saved(token_ids()).logits, base(token_ids()).logits)


# What is said of what lies beside


@pytest.mark.parametrize("layout", ["a file beside shards and an index", "an index left over beside a file"])
def test_which_of_two_was_taken_is_said(tmp_path: Path, layout: str) -> None:
    LAYOUTS[layout](tmp_path)
    base = read_base(tmp_path)
    assert base.taken == "model.safetensors"
    assert "the single file is read, as in transformers" in " ".join(base.remarks)


@pytest.mark.parametrize(("change", "said"), [(another_head, True), (the_same_head, False), (head_alone, False)])
def test_a_config_that_ties_what_the_file_does_not_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Change, said: bool
) -> None:
    tied(tmp_path, "llama", change)
    asked: Any = SimpleNamespace(model=str(tmp_path), output_dir=str(tmp_path / "runs"))
    prepare.check_files(asked.model, asked.output_dir, MetaModel(read_model_config(str(tmp_path)), torch.float32))
    assert ("two different tensors. Both are kept, as in transformers" in capsys.readouterr().err) == said


def test_an_adapter_beside_a_model_is_said(tmp_path: Path) -> None:
    builders.save_model(tmp_path, "llama")
    assert read_base(tmp_path).remarks == ()
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "without that adapter" in " ".join(read_base(tmp_path).remarks)


# What is refused, by the one reader, whoever asks


def indexed(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    sharded(folder)
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def placed(file: Any) -> Callable[[Path], None]:
    return lambda folder: indexed(folder, lambda index: index["weight_map"].update({EMBEDDING: file}))


def held_twice(folder: Path) -> None:
    sharded(folder)
    first, second = sorted(folder.glob("model-*.safetensors"))[:2]
    save_file({**load_file(second), **dict(list(load_file(first).items())[:1])}, second)


def without_a_shard(folder: Path) -> None:
    sharded(folder)
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def upper_case(folder: Path) -> None:
    builders.save_model(folder, "llama")
    (folder / "model.safetensors").rename(folder / "MODEL.SAFETENSORS")


def with_scales(dtype: torch.dtype, weight: str, scales: str) -> Callable[[Path], None]:
    """A projection as a quantiser stores it, in a folder whose config has lost the word."""
    name = "model.layers.0.mlp.up_proj"

    def change(tensors: Tensors) -> None:
        packed = tensors.pop(f"{name}.weight").to(dtype)
        tensors |= {f"{name}.{weight}": packed, f"{name}.{scales}": torch.ones(1, 1)}

    def lay(folder: Path) -> None:
        builders.save_model(folder, "llama")
        rewritten(folder, change)

    return lay


def an_adapter(folder: Path) -> None:
    builders.save_model(folder, "llama")
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "a path upwards": (
        placed("../x.safetensors"),
        r"places 'model.embed_tokens.weight' in '\.\./x.safetensors'.*not the name of a file",
    ),
    "an absolute path": (placed("/etc/passwd"), "'/etc/passwd', which is not the name of a file in this folder"),
    "a folder below": (
        placed("sub/x.safetensors"),
        "'sub/x.safetensors', which is not the name of a file in this folder",
    ),
    "a number for a file": (placed(7), "'7', which is not the name of a file in this folder"),
    "no weight_map": (lambda folder: indexed(folder, dict.clear), "has no weight_map"),
    "an empty one": (lambda folder: indexed(folder, lambda index: index["weight_map"].clear()), "has no weight_map"),
    "one that is a list": (lambda folder: indexed(folder, lambda i: i.update(weight_map=[1])), "has no weight_map"),
    "a missing shard": (without_a_shard, r"1 of \d+ files of weights are missing, model-00002"),
    "a tensor in two shards": (held_twice, r"disagree on 1 tensors: .* is in model-00002.* and in model-00001"),
    "upper case": (upper_case, "It has MODEL.SAFETENSORS, a name under which transformers does not look"),
    "an adapter": (an_adapter, "says that it is an adapter: give the folder of the model"),
    "other weights": (
        lambda folder: (builders.save_model(folder), edited(folder / "config.json", transformers_weights="x"), None)[2],
        "transformers_weights = 'x'",
    ),
    "fp8, blocks": (
        with_scales(torch.float8_e4m3fn, "weight", "weight_scale_inv"),
        "F8_E4M3, to be multiplied by .*inv",
    ),
    "fp8, static": (with_scales(torch.float8_e4m3fn, "weight", "weight_scale"), "no quantization_config: .*F8_E4M3"),
    "fp8, comfy": (with_scales(torch.float8_e5m2, "weight", "scale_weight"), "no quantization_config: .*F8_E5M2"),
    "int8, bitsandbytes": (with_scales(torch.int8, "weight", "SCB"), "up_proj.weight is I8, to be multiplied by .*SCB"),
    "4 bits, bitsandbytes": (with_scales(torch.uint8, "weight", "weight.absmax"), "up_proj.weight is U8"),
    "4 bits, GPTQ": (with_scales(torch.int32, "qweight", "scales"), "qweight is packed"),
    "4 bits, compressed": (with_scales(torch.int32, "weight_packed", "weight_scale"), "weight_packed is packed"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused_whoever_asks(tmp_path: Path, kind: str) -> None:
    lay, words = REFUSED[kind]
    lay(tmp_path)
    for read in (lambda: read_base(tmp_path), lambda: build(tmp_path, 0, 4), lambda: build(tmp_path, 2, 4)):
        with pytest.raises(UserError, match=words):
            read()


def test_fp8_without_scales_is_a_dtype_like_others(tmp_path: Path) -> None:
    builders.save_model(tmp_path, "llama")
    name = "model.layers.0.mlp.up_proj.weight"
    rewritten(tmp_path, lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)}))
    right = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).get_parameter(name)
    assert torch.equal(build(tmp_path, 0, 4).model.get_parameter(name), right)


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_a_tensor_that_is_nowhere_is_named_before_anything_is_read(tmp_path: Path, kind: str) -> None:
    builders.save_model(tmp_path, kind)
    meta_model = empty_model(read_model_config(str(tmp_path)), torch.float32, None)
    weights.check_complete(meta_model, read_base(tmp_path))
    last = "3.self_attn.o_proj.weight"
    rewritten(tmp_path, lambda tensors: tensors.pop(f"model.layers.{last}"))
    with pytest.raises(UserError, match=f"has no tensor for model.layers.{last}$"):
        weights.check_complete(meta_model, read_base(tmp_path))


def test_a_model_saved_without_its_head(tmp_path: Path) -> None:
    """transformers would draw the head at random."""
    builders.save_model(tmp_path, "llama")
    rewritten(tmp_path, lambda tensors: tensors.pop(HEAD))
    meta_model = empty_model(read_model_config(str(tmp_path)), torch.float32, None)
    with pytest.raises(
        UserError, match=r"no tensor for lm_head\.weight.*save the model again from AutoModelForCausalLM"
    ):
        weights.check_complete(meta_model, read_base(tmp_path))


# Links


@pytest.mark.parametrize("name", ["LICENSE", "config.json", "model.safetensors", "tokenizer.json", "README.md"])
@pytest.mark.parametrize("where", ["outside", "nowhere", "itself"])
def test_a_link_that_leads_out_is_refused_by_name(tmp_path: Path, name: str, where: str) -> None:
    folder, secret = tmp_path / "base", tmp_path / "token"
    builders.save_model(folder, "llama")
    secret.write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"hf_secret")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to({"outside": secret, "nowhere": tmp_path / "gone", "itself": folder / name}[where])
    for read in (read_base, files_to_copy, files_of):
        with pytest.raises(UserError, match=name):
            read(folder)


def test_an_adapter_with_a_link_out_is_not_offered_for_upload(tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_text("{}")
    assert files_of(tmp_path) == ["adapter_config.json", "adapter_model.safetensors"]
    (tmp_path / "LICENSE").symlink_to("/etc/hostname")
    with pytest.raises(UserError, match=r"LICENSE is a link to .*outside the folder"):
        files_of(tmp_path)


def test_links_within_the_folder_and_into_the_hub_cache(tmp_path: Path) -> None:
    builders.save_model(tmp_path / "plain", "llama")
    (tmp_path / "plain" / "LICENSE").write_text("terms")
    (tmp_path / "plain" / "LICENCE").symlink_to("LICENSE")
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0f", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted((tmp_path / "plain").iterdir())):
        shutil.copyfile(file, blobs / f"{number:040x}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{number:040x}")
    (tmp_path / "linked").symlink_to(snapshot)
    right = read_base(tmp_path / "plain")
    for folder in (snapshot, tmp_path / "linked"):
        found = read_base(folder)
        assert found.tensors.keys() == right.tensors.keys()
        assert files_to_copy(folder) == files_to_copy(tmp_path / "plain")
        assert torch.equal(read_tensor(found.tensors[HEAD]), read_tensor(right.tensors[HEAD]))
    (snapshot / "LICENSE").unlink()
    (snapshot / "LICENSE").symlink_to("../../refs")
    (tmp_path / "models--a--b" / "refs").write_text("")
    with pytest.raises(UserError, match="LICENSE is a link"):
        read_base(snapshot)


# Memory


@pytest.mark.parametrize("kind", ["llama", "cohere"])
def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Of those in the dtype in which they are stored; what the stage holds is another, of its own dtype."""
    builders.save_model(tmp_path, kind)
    alive: list[weakref.ref[torch.Tensor]] = []

    def counted(stored: Any) -> torch.Tensor:
        assert not [one for one in alive if one() is not None]
        tensor = read_tensor(stored)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(weights, "read_tensor", counted)
    stage = build(tmp_path, 0, 4, torch.bfloat16)
    assert len(alive) == len(list(stage.model.parameters())) > 30


LIMITED = """
import resource, sys
from pathlib import Path
import torch
import transformers.core_model_loading, transformers.conversion_mapping
from safetensors import safe_open
from pipeline.model import weights
from pipeline.model.stage import Stage, empty_model, read_model_config

folder, file = sys.argv[1], Path(sys.argv[1]) / "model.safetensors"
stage = Stage(empty_model(read_model_config(folder), torch.float32, None), 0, 1)
virtual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
limit = virtual + file.stat().st_size // 2
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    safe_open(file, framework="pt")
    sys.exit("the limit is no limit: the whole file was mapped")
except (OSError, MemoryError, RuntimeError) as error:
    pass
weights.load(stage, folder, torch.float32, torch.device("cpu"))
print(sum(p.nbytes for p in stage.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the address space from /proc")
def test_a_file_larger_than_memory_is_read_in_pieces(tmp_path: Path) -> None:
    """In an address space with room for half of the file a stage of an eighth of it is loaded."""
    size = {"hidden_size": 512, "num_attention_heads": 4, "head_dim": 128, "intermediate_size": 2048, "layers": 8}
    model = AutoModelForCausalLM.from_config(builders.model_config("llama", **size))
    model.save_pretrained(tmp_path)
    environment = {**builders.environment(), "PYTHONPATH": str(builders.ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stdout.split()[-1]) < os.path.getsize(tmp_path / "model.safetensors") / 4
