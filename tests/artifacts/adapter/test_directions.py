"""Files of directions: every form reads the same, and what is no set of directions is refused with the reason."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.artifacts.adapter.directions import orthonormal, read_directions
from pipeline.console import UserError
from tests.helpers.artifacts import files_of
from tests.helpers.directions import LAYERS, D, Make, directions, maker, save_base, stored


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("bases") / "llama")


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    return maker(tmp_path, monkeypatch)


ONE_EACH = directions(LAYERS).astype(np.float32)
FORMS: dict[str, Any] = {
    "npy": ONE_EACH,
    "npy, other byte order": ONE_EACH.astype(">f4"),
    "npy, Fortran order": np.asfortranarray(ONE_EACH),
    "npy, several": ONE_EACH[:, None],
    "one tensor": {"refusal": torch.from_numpy(ONE_EACH)},
    "numbers": {str(i): torch.from_numpy(ONE_EACH[i]) for i in range(LAYERS)},
    "names of layers": {f"model.layers.{i}": torch.from_numpy(ONE_EACH[i : i + 1]) for i in range(LAYERS)},
    "more layers than asked for": {
        f"layers.{i}": torch.from_numpy(ONE_EACH[i % LAYERS].copy()) for i in range(LAYERS + 3)
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_files_of_every_form_read_the_same(tmp_path: Path, form: str) -> None:
    found = read_directions(stored(tmp_path, FORMS[form]), range(1, LAYERS), LAYERS, D)
    assert {index: rows.numpy().tolist() for index, rows in found.items()} == {
        i: [ONE_EACH[i].tolist()] for i in range(1, LAYERS)
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_directions_for_all_layers_in_any_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    for tensor in (torch.randn(D).to(dtype), torch.randn(1, 2, D).to(dtype)):
        found = read_directions(stored(tmp_path, {"v": tensor}), [0, 3], LAYERS, D)
        assert found.keys() == {0, 3}
        assert all(torch.equal(rows, tensor.reshape(-1, D)) for rows in found.values())


def test_units_in_fp64_at_any_length() -> None:
    """Lengths whose squares overflow or vanish in fp64."""
    v = torch.from_numpy(directions(1))
    for factor in (1.0, 1e-200, 1e200):
        row = orthonormal({0: v * factor})[0]
        assert abs(float(row.norm()) - 1) <= 8 * 2**-52
        assert (row * v.norm() - v).norm() <= 8 * 2**-52 * v.norm()


def parallel(eps: float) -> torch.Tensor:
    """Two directions an angle of about `eps` apart."""
    v = torch.from_numpy(directions(2))
    v /= v.norm(dim=1, keepdim=True)
    return torch.stack([v[0], v[0] + eps * v[1]])


BAD_FILES: dict[str, tuple[Any, str]] = {
    "width": (directions(LAYERS)[:, :-1], "layer 0: directions of 31 numbers, but the model's hidden size is 32"),
    "layers": (directions(3), r"one tensor of shape \[3, 32\]. For this model's 4 layers it is \[D\], \[4, D\]"),
    "dimensions": (directions(LAYERS, 1, 1), r"shape \[4, 1, 1, 32\]"),
    "scalar": (np.array(1.0), r"shape \[\]"),
    "integers": (np.ones((LAYERS, D), dtype=np.int64), "holds int64"),
    "objects": (np.array([{}, None], dtype=object), "allow_pickle=False|does not read as a .npy array"),
    "zero": (directions(LAYERS) * np.array([1, 1, 0, 1])[:, None], "layer 2: a direction is zero"),
    "nan": (directions(LAYERS) / np.array([1, 1, 1, np.nan])[:, None], "layer 3: a direction holds NaN"),
    "missing": ({"0": torch.ones(D), "2": torch.ones(D)}, r"no direction for layer 1 \(2 of 4 layers"),
    "twice": ({"0": torch.ones(D), "layers.0": torch.ones(D)}, "names a layer twice"),
    "names": ({"up": torch.ones(D), "down": torch.ones(D)}, "not named by layer"),
    "no vector": ({str(i): torch.ones(1, 1, D) for i in range(LAYERS)}, "neither"),
    "none": ({str(i): torch.ones(0, D) for i in range(LAYERS)}, "neither"),
    "ranks": ({str(i): torch.randn(1 + (i > 1), D) for i in range(LAYERS)}, "different numbers of directions"),
    "too many": (directions(1, D + 1), "33 directions cannot be independent in 32 dimensions"),
    "dependent": ({"v": parallel(1e-9).float()[None]}, "layer 0: its 2 directions are linearly dependent"),
    "bytes": ({"v": torch.ones(D, dtype=torch.uint8)}, "is torch.uint8"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_files_that_do_not_hold_directions(base: Path, make: Make, tmp_path: Path, case: str) -> None:
    content, said = BAD_FILES[case]
    if case == "objects":
        np.save(tmp_path / "v.npy", content, allow_pickle=True)
        file = tmp_path / "v.npy"
    else:
        file = stored(tmp_path, content)
    with pytest.raises(UserError, match=said):
        make(base, "--directions", file)
    assert list(files_of(tmp_path)) == [file.name], "nothing is left behind"


def test_nearly_parallel_directions_are_two_where_their_dtype_can_tell() -> None:
    assert len(orthonormal({0: parallel(1e-9)})[0]) == 2
    with pytest.raises(UserError, match="linearly dependent"):
        orthonormal({0: parallel(0.0)})
    with pytest.raises(UserError, match="linearly dependent"):
        orthonormal({0: parallel(1e-3).bfloat16()})
