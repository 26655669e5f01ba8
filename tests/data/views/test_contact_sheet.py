"""The sheet of views: ours and Pillow's tiles side by side, equal, for any kind of stored image."""

import numpy as np
import pytest
from PIL import Image

from mocov3_ds import cli
from mocov3_ds.data.views import decode
from mocov3_ds.data.views.contact_sheet import COLUMNS, draw_contact_sheet
from mocov3_ds.data.views.spec import ViewSpec
from tests.data.pictures import encode_image, picture
from tests.data.sets import make_set


@pytest.fixture
def shards(tmp_path):
    def image(number):
        kind = "PNG" if number % 3 == 2 else "JPEG"
        return encode_image(picture(60 + number, 90, seed=number), kind)

    make_set(str(tmp_path / "set"), [4, 3], image)
    return str(tmp_path / "set")


def tiles(path, rows, size):
    sheet = np.asarray(Image.open(path).convert("RGB"))
    height, width = sheet.shape[0] - 18, sheet.shape[1]
    assert (height, width) == (rows * (size + 4), len(COLUMNS) * (size + 4))
    return sheet[18:].reshape(rows, size + 4, len(COLUMNS), size + 4, 3)[:, :size, :, :size]


def test_ours_are_the_same_draws_by_pillow(shards, tmp_path):
    out = tmp_path / "sheets" / "views.png"
    largest = draw_contact_sheet(shards, out, rows=5, size=32, seed=1, epoch=2)
    if decode.current_decoder() != "simplejpeg":
        assert largest == 0
    shown = tiles(out, 5, 32)
    assert np.abs(shown[:, :, 1].astype(int) - shown[:, :, 2]).max() == largest
    assert (shown[:, :, 1] != shown[:, :, 3]).any()


def test_a_difference_is_told(shards, tmp_path):
    plain = ViewSpec(jitter_p=0.0, grey_p=0.0, blur_p=(1.0, 1.0), blur_sigma=(2.0, 2.0))
    out = tmp_path / "views.png"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mocov3_ds.data.views.reference.find_sigma", lambda _: 0.5)
        assert draw_contact_sheet(shards, out, rows=2, size=32, seed=0, epoch=0, spec=plain) > 10


def test_the_command(shards, tmp_path, monkeypatch, capsys):
    out = tmp_path / "views.png"
    monkeypatch.setattr("sys.argv", ["mocov3", "views", shards, "--out", str(out), "--rows", "2"])
    assert cli.main() == 0
    assert out.exists() and "differs from the same draws" in capsys.readouterr().out


def test_an_unreadable_sample_is_a_sentence(tmp_path, monkeypatch, capsys):
    whole = encode_image(picture())
    images = [whole, whole, whole[: len(whole) // 2], whole]
    make_set(str(tmp_path / "set"), [4], lambda number: images[number])
    out = tmp_path / "views.png"
    monkeypatch.setattr(
        "sys.argv", ["mocov3", "views", str(tmp_path / "set"), "--out", str(out), "--rows", "4"]
    )
    assert cli.main() == 2
    assert "sample 2 cannot be read: truncated JPEG data" in capsys.readouterr().err
    assert not out.exists()


def test_no_rows_are_refused(shards, tmp_path):
    with pytest.raises(ValueError, match="0 rows of 7 samples"):
        draw_contact_sheet(shards, tmp_path / "x.png", rows=0, size=32, seed=0, epoch=0)
