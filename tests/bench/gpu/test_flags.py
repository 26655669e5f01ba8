"""The flags of `mocov3 gpu`."""

from pathlib import Path

import pytest

from mocov3_ds.bench.gpu.flags import GpuOptions, read_flags


def test_flags_are_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert read_flags([]) == GpuOptions()
    arguments = ["--minutes", "3", "--json", "a.json", "--recipes", "vit_s16", "vit_b16", "--void"]
    assert read_flags(arguments) == GpuOptions(
        minutes=3.0, json=Path("a.json"), recipes=("vit_s16", "vit_b16"), void=True
    )
    with pytest.raises(SystemExit):
        read_flags(["--minute", "3"])
    assert "--minutes" in capsys.readouterr().err
