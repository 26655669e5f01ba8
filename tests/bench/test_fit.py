"""The table of what a step needs: its arithmetic, and a row of a real (small) network."""

from dataclasses import replace

import pytest

from mocov3_ds import fit as measuring
from mocov3_ds.bench import fit
from mocov3_ds.model.vit import PAPER_SHAPES, VitShape


def test_states_by_hand() -> None:
    # bf16 weight 2, momentum master 4 and copy 2; fp32 master and two moments 12 over the ranks
    assert fit.state_bytes(100, 80, 2, world_size=1) == 100 * 2 + 100 * 12 + 80 * 6
    assert fit.state_bytes(100, 80, 2, world_size=4) == 100 * 2 + 100 * 3 + 80 * 6
    # fp32: the network's own weights, no second copy of the momentum encoder
    assert fit.state_bytes(100, 80, 4, world_size=1) == 100 * 4 + 100 * 12 + 80 * 4


def test_words_for_a_choice() -> None:
    room = measuring.Room(free=0, rest=0, per_image=10)
    assert fit.choice(room, 8) == "does not fit"
    assert fit.choice(replace(room, free=1000), 8) == "one pass"
    assert fit.choice(replace(room, free=100), 8) == "4 (+1)"


def test_a_row(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = VitShape(image_size=16, patch_size=8, dim=24, depth=1, heads=3)
    monkeypatch.setitem(PAPER_SHAPES, "vit_s16", tiny)
    fit.main(fit.Options(shapes=("vit_s16",), batch=64, ranks=(1, 2), chunk=8))
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| vit_s16")]
    assert [row.split(" | ")[2:4] for row in rows] == [["1", "64"], ["2", "32"]]
    with pytest.raises(ValueError, match="64 cannot be shared by 3 ranks"):
        fit.main(fit.Options(shapes=("vit_s16",), batch=64, ranks=(3,)))
