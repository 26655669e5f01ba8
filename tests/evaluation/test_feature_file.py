"""Features come back from each format as they went in."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from mocov3_ds.evaluation.feature_file import SUFFIXES, FeatureFile, check_format
from mocov3_ds.evaluation.flags import FeatureType

IDS, LABELS = torch.tensor([3, 5, 8]), torch.tensor([1, -1, 0])
FEATURES = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
NAMES = ["a/ä.png", "b.png", "c.png"]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kind", ["fp32", "fp16"])
def test_round_trip(tmp_path: Path, suffix: str, kind: FeatureType) -> None:
    path = tmp_path / f"x{suffix}"
    file = FeatureFile(path, suffix, kind, {"encoder": "e", "classes": ["x"]})
    file.append(IDS[:2], NAMES[:2], LABELS[:2], FEATURES[:2])
    file.append(IDS[2:], NAMES[2:], LABELS[2:], FEATURES[2:])
    file.finish()
    names = NAMES
    if suffix == ".parquet":
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(path)
        about, names = table.schema.metadata[b"mocov3_ds"], table["name"].to_pylist()
        ids, labels = (table[name].to_numpy() for name in ("id", "label"))
        features = np.stack(table["feature"].to_pylist()).astype(f"float{kind[2:]}")
        assert table.schema.field("feature").type.list_size == 4
    elif suffix == ".npz":
        with np.load(path) as arrays:
            ids, labels, features = (arrays[name] for name in ("id", "label", "feature"))
            about, names = str(arrays["about"]), arrays["name"].tolist()
    else:
        with safe_open(str(path), framework="np") as tensors:
            ids, labels, features = (tensors.get_tensor(n) for n in ("id", "label", "feature"))
            about = tensors.metadata()["mocov3_ds"]
    assert file.rows == 3
    assert (ids.tolist(), labels.tolist(), names) == ([3, 5, 8], [1, -1, 0], NAMES)
    expected = FEATURES.half() if kind == "fp16" else FEATURES
    assert np.array_equal(features, expected.numpy())
    assert features.dtype == expected.numpy().dtype
    assert json.loads(about)["encoder"] == "e"


def test_what_cannot_be_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = FEATURES.clone()
    large[1, 2] = 70000.0
    file = FeatureFile(tmp_path / "x.npz", ".npz", "fp16", {})
    with pytest.raises(ValueError, match=r"'b\.png' are not finite in fp16 .*7e\+04.*--dtype fp32"):
        file.append(IDS, NAMES, LABELS, large)
    with pytest.raises(ValueError, match=r"must end in \.parquet, .*not in '\.csv'"):
        check_format(".csv")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"pip install pyarrow, or let --out end in \.npz"):
        check_format(".parquet")
