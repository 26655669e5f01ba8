"""How are features stored for other programs? As parquet, npz or safetensors, whole or not at all.

    id       int64     number of the image in its set
    name     text      path in the folder, or SHARD/NUMBER in the shard (not in safetensors)
    label    int64     -1 = none
    feature  fp16 or fp32, D numbers

Parquet is written in groups of rows, so that the memory for it is that of a group. The other two
are gathered in memory before they are written.

Shape suffixes: N = rows, D = features.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mocov3_ds.data.storage.tensor_file import save_tensors
from mocov3_ds.evaluation.flags import FeatureType

_TYPES: dict[FeatureType, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16}
SUFFIXES = (".parquet", ".npz", ".safetensors")


class FeatureFile:
    """A file of features that grows by rows; what it is called tells its format.

    Args:
        path: file to write, as it is called while it is written.
        suffix: one of `SUFFIXES`.
        kind: type of the stored numbers.
        about: what is said of the features beside them, as JSON values.

    Raises:
        ValueError: a format that is not known, or pyarrow is missing for parquet.
    """

    def __init__(
        self, path: Path, suffix: str, kind: FeatureType, about: Mapping[str, Any]
    ) -> None:
        check_format(suffix)
        self._path, self._suffix, self._kind = path, suffix, kind
        self._about = {"mocov3_ds": json.dumps(about)}
        self._writer: Any = None
        self._names: list[str] = []
        self._parts: dict[str, list[Tensor]] = {"id": [], "label": [], "feature": []}
        self.rows = 0

    def append(
        self, ids_N: Tensor, names: Sequence[str], labels_N: Tensor, features_ND: Tensor
    ) -> None:
        """Add rows.

        Args:
            ids_N: numbers of the images, int64.
            names: path of each image, or its place in a shard.
            labels_N: label of each, int64; -1 = none.
            features_ND: features of the images, fp32.

        Raises:
            ValueError: a feature that is not finite in the type that is stored.
            OSError: the disk refused it.
        """
        stored_ND = features_ND.to("cpu", _TYPES[self._kind])
        if not bool(torch.isfinite(stored_ND).all()):
            row = int((~torch.isfinite(stored_ND)).any(1).nonzero()[0])
            largest = float(features_ND[row].abs().max())
            raise ValueError(
                f"the features of {names[row]!r} are not finite in {self._kind} (largest "
                f"{largest:.3g})" + ("; use --dtype fp32." if self._kind == "fp16" else ".")
            )
        self.rows += len(ids_N)
        if self._suffix == ".parquet":
            self._append_parquet(ids_N, names, labels_N, stored_ND)
            return
        self._names += names
        for name, rows in (("id", ids_N), ("label", labels_N), ("feature", stored_ND)):
            self._parts[name].append(rows.cpu())

    def finish(self) -> None:
        """Write what is still to be written.

        Raises:
            OSError: the disk refused it.
        """
        if self._writer is not None:
            self._writer.close()
        elif self._suffix != ".parquet":
            columns = {name: torch.cat(parts) for name, parts in self._parts.items()}
            if self._suffix == ".safetensors":
                save_tensors(columns, self._path, self._about)
                return
            arrays: dict[str, Any] = {name: rows.numpy() for name, rows in columns.items()}
            with self._path.open("wb") as file:
                np.savez(
                    file,
                    name=np.array(self._names),
                    about=np.array(self._about["mocov3_ds"]),
                    **arrays,
                )

    def _append_parquet(
        self, ids_N: Tensor, names: Sequence[str], labels_N: Tensor, features_ND: Tensor
    ) -> None:
        import pyarrow
        import pyarrow.parquet

        number = pyarrow.float16() if self._kind == "fp16" else pyarrow.float32()
        schema = pyarrow.schema(
            {
                "id": pyarrow.int64(),
                "name": pyarrow.string(),
                "label": pyarrow.int64(),
                "feature": pyarrow.list_(number, features_ND.shape[1]),
            },
            metadata=self._about,
        )
        if self._writer is None:
            self._writer = pyarrow.parquet.ParquetWriter(str(self._path), schema)
        flat = pyarrow.array(features_ND.contiguous().view(-1).numpy(), number)
        columns = [
            pyarrow.array(ids_N.cpu().numpy()),
            pyarrow.array(names),
            pyarrow.array(labels_N.cpu().numpy()),
            pyarrow.FixedSizeListArray.from_arrays(flat, features_ND.shape[1]),
        ]
        self._writer.write_table(pyarrow.table(columns, schema=schema))


def check_format(suffix: str) -> None:
    """Whether files of this format can be written here.

    Raises:
        ValueError: the format is not known, or pyarrow is missing for parquet.
    """
    if suffix not in SUFFIXES:
        raise ValueError(f"--out must end in {', '.join(SUFFIXES)}, not in {suffix!r}.")
    if suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401 - as a test, before hours of work
        except ImportError:
            raise ValueError(
                "parquet is written by pyarrow, which is not installed: pip install pyarrow, or "
                "let --out end in .npz or .safetensors."
            ) from None
