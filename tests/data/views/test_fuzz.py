"""Damaged JPEGs: no crash, no byte out of bounds, and a reason for each that is not read.

The sanitized build runs 2,000 seeded mutations with the slow tests, or as many as the environment
variable MOCOV3_DS_FUZZ says.
"""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from mocov3_ds.data.views import decode, native
from mocov3_ds.data.views.crops import make_crops
from mocov3_ds.data.views.decode import UnreadableImage
from mocov3_ds.data.views.spec import PARAMETERS, ViewSpec
from tests.data.pictures import crops_by_torchvision, encode_image, picture

pytestmark = pytest.mark.skipif(
    bool(decode.explain_absence("native")), reason="the extension cannot run here"
)


def seeds():
    """Every kind of JPEG that the extension reads, and some that it hands on."""
    return [
        encode_image(picture(60, 80)),
        encode_image(picture(60, 80), subsampling=0, quality=95),
        encode_image(picture(61, 79), subsampling=1),
        encode_image(picture(40, 70), progressive=True),
        encode_image(picture(50, 50), restart_marker_blocks=3),
        encode_image(picture(33, 47), optimize=True, quality=20),
        encode_image(picture(64, 48).convert("L")),
        encode_image(picture(30, 30).convert("CMYK")),
        encode_image(picture(300, 400), quality=60),
    ]


SEEDS = seeds()


def damaged(data, rng):
    spoilt = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        at = int(rng.integers(len(spoilt)))
        if rng.random() < 0.2:
            del spoilt[at:]
        elif rng.random() < 0.3:
            del spoilt[at : at + int(rng.integers(1, 30))]
        else:
            spoilt[at : at + 4] = rng.bytes(int(rng.integers(1, 5)))
        if not spoilt:
            break
    return bytes(spoilt)


def test_damaged_images_are_read_or_refused_with_a_reason():
    """Damage that libjpeg can paint over is read, as Pillow reads it."""
    rng, spec = np.random.default_rng(0), ViewSpec()
    crops, rows = np.zeros((2, 3, 24, 24), np.uint8), np.zeros((2, PARAMETERS), np.float32)
    read, refused = 0, 0
    for i in range(300):
        data = damaged(SEEDS[i % len(SEEDS)], rng)
        try:
            make_crops(data, spec, 0, 0, i, crops, rows, augment=True)
            read += 1
        except UnreadableImage as error:
            assert str(error)
            refused += 1
    assert read > 30 and refused > 30


def test_damage_that_is_read_gives_pillows_pixels():
    """Pillow paints over some damage; what the extension reads without it must look the same."""
    rng, compared = np.random.default_rng(1), 0
    out, boxes = np.zeros((2, 3, 24, 24), np.uint8), [(0, 0, 30, 30), (7, 5, 20, 23)]
    for i in range(500):
        data = damaged(SEEDS[i % len(SEEDS)], rng)
        size = native.read_size(data, 1 << 22)
        if not size or min(size) < 30:
            continue
        if native.cut_crops(data, boxes, (False, True), out, 1 << 22) == native.READ:
            try:
                image = decode.decode_rgb(data)
            except UnreadableImage:  # by what lies below the boxes
                continue
            expected = crops_by_torchvision(image, boxes, (False, True), 24)
            np.testing.assert_array_equal(out, expected)
            compared += 1
    assert compared > 50


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_sanitizers_find_nothing_in_mutated_images(tmp_path):
    source, sources = Path(__file__).parent / "fuzz_native.cpp", Path(native.__file__).parent
    program = tmp_path / "fuzz"
    flags = ["-std=c++17", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    parts = [source, *sorted(sources.glob("*.cpp")), "-ldl", "-o", program]
    subprocess.run(["g++", *flags, f"-I{sources}", *parts], check=True)
    files = []
    for number, data in enumerate(SEEDS):
        files.append(tmp_path / f"{number}.jpg")
        files[-1].write_bytes(data)
    count = os.environ.get("MOCOV3_DS_FUZZ", "2000")
    for cpu in ("plain", "avx512"):
        run = subprocess.run(
            [program, native.find_libjpegs()[0], "7", count, *files],
            env={**os.environ, "MOCOV3_DS_CPU": cpu, "ASAN_OPTIONS": "detect_leaks=1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, run.stderr[-3000:]
        assert f"{count} mutations" in run.stdout
