"""The table of what a step needs: its arithmetic, and a row of a real (small) network."""

from dataclasses import replace

import pytest

from mocov3_ds.bench import chunk_size
from mocov3_ds.model.vit import VitShape
from mocov3_ds.training import chunk_size as measuring


def test_states_by_hand() -> None:
    # bf16 weight 2, momentum master 4 and copy 2; fp32 master and two moments 12 over the ranks
    assert chunk_size.state_bytes(100, 80, 2, world_size=1) == 100 * 2 + 100 * 12 + 80 * 6
    assert chunk_size.state_bytes(100, 80, 2, world_size=4) == 100 * 2 + 100 * 3 + 80 * 6
    # fp32: the network's own weights, no second copy of the momentum encoder
    assert chunk_size.state_bytes(100, 80, 4, world_size=1) == 100 * 4 + 100 * 12 + 80 * 4


def test_words_for_a_choice() -> None:
    room = measuring.Room(free=0, reserved=0, per_image=10)
    assert chunk_size.describe_choice(room, 8) == "does not fit"
    assert chunk_size.describe_choice(replace(room, free=1000), 8) == "one pass"
    assert chunk_size.describe_choice(replace(room, free=100), 8) == "4 (+1)"


def test_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    tiny = VitShape(image_size=16, patch_size=8, dim=24, depth=1, heads=3)
    options = chunk_size.ChunkSizeOptions(batch=64, ranks=(1, 2), chunk=8)
    chunk_size.print_rows("tiny", tiny, options)
    rows = capsys.readouterr().out.splitlines()
    assert [row.split(" | ")[2:4] for row in rows] == [["1", "64"], ["2", "32"]]


def test_a_batch_that_cannot_be_shared() -> None:
    with pytest.raises(ValueError, match="64 cannot be shared by 3 ranks"):
        chunk_size.run_bench(chunk_size.ChunkSizeOptions(batch=64, ranks=(3,)))
