"""Flags of the commands on an encoder: places, defaults, `~`, and what ends with status 2."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from mocov3_ds.evaluation import flags


def test_places_and_defaults() -> None:
    embed = flags.read_embed_flags(["run", "images", "--out", "f.npz", "--dtype", "fp16"])
    assert (embed.run, embed.images, embed.out) == (Path("run"), "images", Path("f.npz"))
    assert (embed.dtype, embed.which, embed.batch) == ("fp16", "base", 256)
    knn = flags.read_knn_flags(["~/run", "--k", "5"])
    assert (knn.run, knn.k, knn.temperature) == (Path.home() / "run", 5, 0.07)
    assert flags.read_export_flags(["run", "--to", "hf"]).to == "hf"
    assert flags.read_look_flags(["run"]).out is None
    linear = flags.read_linear_flags(["run", "--learning_rates", "0.3", "1"])
    assert (linear.learning_rates, linear.epochs, linear.batch) == ((0.3, 1.0), 90, 4096)
    assert flags.read_finetune_flags(["run"]).drop_path == -1


@pytest.mark.parametrize(
    ("read", "arguments"),
    [
        (flags.read_knn_flags, []),
        (flags.read_embed_flags, ["run", "images"]),
        (flags.read_export_flags, ["run", "--to", "keras"]),
        (flags.read_linear_flags, ["run", "--anneal", "never"]),
    ],
)
def test_what_is_missing_or_unknown_ends_with_status_2(
    read: Callable[[Sequence[str]], Any], arguments: list[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        read(arguments)
    assert ended.value.code == 2
