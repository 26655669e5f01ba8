"""How are TensorBoard's event files read? The scalars of a folder, file after file."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mocov3_ds.stability.logs.table import (
    Column,
    LoggedTable,
    NothingLoggedError,
    build_columns,
    count_words,
)

PATTERN = "*tfevents*"
STEP = "step"
_FRAME = 16  # bytes around a record: its length and two checksums
_NUMBERS = (1, 2, 3, 9)  # TensorFlow's float32, float64, int32, int64


def read_events(folder: Path, files: Sequence[Path]) -> LoggedTable:
    """Read the scalars of event files that one run wrote, the earliest file first.

    Args:
        folder: folder of the files, after which the run is called.
        files: the files; a sitting of the run wrote each.

    Raises:
        NothingLoggedError: there is no scalar in them.
    """
    scalars: list[tuple[int, str, float]] = []
    damaged = 0
    for path in sorted(files, key=lambda file: file.name):
        file_scalars, is_whole = _read_file(path)
        scalars += file_scalars
        damaged += not is_whole
    if not scalars:
        raise NothingLoggedError(f"{folder} has no rows yet: its event files are without a scalar.")
    steps, tags, values = zip(*scalars, strict=True)
    columns = build_columns({STEP: steps})
    values_M = np.array(values, np.float64)
    names, which_M = np.unique(np.array(tags), return_inverse=True)
    for index, name in enumerate(names.tolist()):
        rows_M = np.flatnonzero(which_M == index)
        columns[name if name != STEP else f"{name} (logged)"] = Column(rows_M, values_M[rows_M])
    notes = count_words(damaged, "file cut short or damaged", "files cut short or damaged")
    return LoggedTable(folder.name, folder, columns, len(values), notes=notes)


def _read_file(path: Path) -> tuple[list[tuple[int, str, float]], bool]:
    """Step, tag and value of each scalar of a file, and whether it could be read to its end."""
    # tensorboard takes a second to import
    from google.protobuf.message import DecodeError
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.util.tensor_util import make_ndarray

    scalars, length = [], 0
    for record in RawEventFileLoader(str(path)).Load():
        try:
            event = Event.FromString(record)
        except DecodeError:
            break
        length += len(record) + _FRAME
        for value in event.summary.value:
            if value.HasField("simple_value"):
                scalars.append((event.step, value.tag, value.simple_value))
            elif value.HasField("tensor") and value.tensor.dtype in _NUMBERS:
                array = make_ndarray(value.tensor)
                if array.size == 1:
                    scalars.append((event.step, value.tag, float(array.item())))
    return scalars, length == path.stat().st_size
