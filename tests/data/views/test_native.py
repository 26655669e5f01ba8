"""The extension: Pillow's pixels for any box, size and instruction set; refusals; flat memory."""

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
import setuptools
import torch
from PIL import Image

from mocov3_ds.data.views import decode, native, photometric
from mocov3_ds.data.views.crops import make_crops
from mocov3_ds.data.views.spec import PARAMETERS, ViewSpec
from tests.data.pictures import crops_by_torchvision, decode_image, encode_image, picture

SPEC = ViewSpec()
SOURCES = Path(native.__file__).parent
MOST = 1 << 26

pytestmark = pytest.mark.skipif(
    bool(decode.explain_absence("native")), reason="the extension cannot run here"
)


def native_crops(data, boxes, flips=(False, False), size=32):
    out = np.zeros((2, 3, size, size), np.uint8)
    verdict = native.cut_crops(data, boxes, flips, out, MOST)
    return verdict, out


def pillow_crops(data, boxes, flips=(False, False), size=32):
    return crops_by_torchvision(decode_image(data), boxes, flips, size)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_any_box_gives_pillows_pixels(subsampling, progressive):
    """Boxes at and near block borders and image edges; crops enlarged, shrunk, tall and flat."""
    rng = np.random.default_rng(subsampling)
    for height, width in ((97, 131), (64, 48), (33, 210), (200, 17), (1, 1), (8, 9)):
        data = encode_image(
            picture(height, width), quality=88, subsampling=subsampling, progressive=progressive
        )
        for _ in range(25):
            boxes = []
            for _ in range(2):
                h, w = int(rng.integers(1, height + 1)), int(rng.integers(1, width + 1))
                boxes.append(
                    (int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w)
                )
            flips, size = [bool(f) for f in rng.integers(0, 2, 2)], int(rng.integers(1, 71))
            verdict, got = native_crops(data, boxes, flips, size)
            assert verdict == native.READ
            np.testing.assert_array_equal(got, pillow_crops(data, boxes, flips, size))


@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_a_progressive_image_that_lacks_scans_gives_pillows_pixels(subsampling):
    """The library smooths such images across blocks, whichever columns are wanted."""
    rng = np.random.default_rng(subsampling)
    whole = encode_image(picture(), quality=60, subsampling=subsampling, progressive=True)
    scans = [place for place in range(len(whole)) if whole[place : place + 2] == b"\xff\xda"]
    assert len(scans) > 5
    for end in scans[1:]:
        data = whole[:end] + b"\xff\xd9"
        for _ in range(10):
            left, top = int(rng.integers(0, 100)), int(rng.integers(0, 60))
            boxes = [(0, left, 97, 131 - left), (top, 0, 97 - top, 100)]
            verdict, got = native_crops(data, boxes)
            assert verdict == native.READ
            np.testing.assert_array_equal(got, pillow_crops(data, boxes))


def test_threads_that_come_at_once_open_the_library_once(monkeypatch):
    opened = []
    colour_library, meeting = native.colour_library, threading.Barrier(4)
    monkeypatch.setattr(native, "colour_library", lambda: opened.append(1) or colour_library())
    native.open_jpeg_library.cache_clear()

    def first_use(_):
        meeting.wait(timeout=240)
        return native.jpeg_library()

    with ThreadPoolExecutor(4) as pool:
        assert len(set(map(id, pool.map(first_use, range(4))))) == 1
    assert len(opened) == 1


def test_strongly_shrunk_boxes_give_pillows_pixels():
    """Many taps: more than a vector holds, fewer at the borders than next to them."""
    data = encode_image(picture(900, 1100), quality=90)
    for size in (1, 3, 5, 7, 16):
        boxes = [(0, 0, 900, 1100), (100, 30, 800, 1000)]
        verdict, got = native_crops(data, boxes, size=size)
        assert verdict == native.READ
        np.testing.assert_array_equal(got, pillow_crops(data, boxes, size=size))


@pytest.fixture
def own_huffman():
    """Turns our Huffman decoder on and off; the number of scans it has decoded comes back."""
    yield native.jpeg_library().mocov3_use_own_huffman
    native.jpeg_library().mocov3_use_own_huffman(True)


PLAIN_SCANS = {
    "4:2:0": {"subsampling": 2},
    "4:2:2": {"subsampling": 1, "quality": 99},
    "4:4:4": {"subsampling": 0, "quality": 97},
    "coarse": {"quality": 3},
    "own tables": {"optimize": True, "quality": 50},
    "restarts": {"restart_marker_blocks": 2},
    "restart rows": {"restart_marker_rows": 1, "subsampling": 1},
}


ABI_62 = pytest.mark.skipif(
    sys.maxsize < 2**33 or Image.core.jpeglib_version != "6.2", reason="another ABI than 62"
)


@ABI_62
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("kind", PLAIN_SCANS)
def test_our_huffman_decoder_gives_the_librarys_pixels(mode, kind, own_huffman):
    rng = np.random.default_rng(5)
    for seed in range(6):
        image = picture(int(rng.integers(20, 250)), int(rng.integers(20, 250)), seed).convert(mode)
        data = encode_image(image, **PLAIN_SCANS[kind])
        boxes = [(0, 0, image.height, image.width), (9, 11, image.height - 12, image.width - 13)]
        before = own_huffman(False)
        plain = native_crops(data, boxes, size=40)
        assert own_huffman(True) == before
        assert plain[0] == native.READ
        ours = native_crops(data, boxes, size=40)
        assert own_huffman(True) == before + 1
        assert ours[0] == native.READ
        np.testing.assert_array_equal(ours[1], plain[1])


def waves(frequencies, seed):
    """96 x 96 grey pixels: each block a sum of DCT waves (rows, columns), some of them missing."""
    rng = np.random.default_rng(seed)
    at = (2 * np.arange(8) + 1) * np.pi / 16
    blocks = np.full((12, 12, 8, 8), 128.0)
    for down, across in frequencies:
        wave = np.cos(at * down)[:, None] * np.cos(at * across)
        strength = rng.integers(-2, 3, (12, 12, 1, 1)) * rng.integers(0, 12)
        blocks += strength * wave
    pixels = blocks.transpose(0, 2, 1, 3).reshape(96, 96)
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


@ABI_62
@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize(
    "frequencies",
    [
        [(7, 7)],  # the last coefficient: no end of block comes, the next code is another block's
        [(7, 7), (6, 7)],  # the last two, often both in one look
        [(6, 7)],  # the last but one, with an end of block in one look
        [(0, 1), (7, 7)],
        [(down, across) for down in range(8) for across in range(8)],
    ],
)
def test_blocks_that_end_late_give_the_librarys_pixels(frequencies, optimize, own_huffman):
    boxes = [(0, 0, 96, 96), (8, 16, 80, 64)]
    for seed in range(8):
        data = encode_image(waves(frequencies, seed), quality=100, optimize=optimize)
        own_huffman(False)
        plain = native_crops(data, boxes, size=96)
        before = own_huffman(True)
        ours = native_crops(data, boxes, size=96)
        assert own_huffman(True) == before + 1
        assert ours[0] == plain[0] == native.READ
        np.testing.assert_array_equal(ours[1], plain[1])


def test_pillows_library_comes_before_one_of_another_package():
    folder = Path(Image.__file__).parents[1] / "pillow.libs"
    if not folder.exists():
        pytest.skip("this Pillow came without libraries of its own")
    __import__("torchvision")  # brings a libjpeg of its own into the process
    assert Path(native.find_libjpegs()[0]).parent == folder


def test_other_scans_are_left_to_the_library(own_huffman):
    before = own_huffman(True)
    assert (
        native_crops(encode_image(picture(), progressive=True), [(0, 0, 9, 9)] * 2)[0]
        == native.READ
    )
    assert own_huffman(True) == before


@pytest.mark.parametrize(
    "box", [(-1, 0, 9, 9), (0, -1, 9, 9), (90, 0, 9, 9), (0, 125, 9, 9), (0, 0, 0, 9), (0, 0, 9, 0)]
)
def test_boxes_outside_the_image_are_not_read(box):
    assert native_crops(encode_image(picture()), [box, (0, 0, 9, 9)])[0] != native.READ


@pytest.mark.parametrize("cut", [1, 2, 3, 50, 1000, 3000])
def test_bytes_that_stop_early_are_not_read(cut):
    """Also when what is missing lies below both boxes."""
    data = encode_image(picture(), quality=95)
    assert native_crops(data, [(0, 0, 9, 9)] * 2)[0] == native.READ
    assert native_crops(data[:-cut], [(0, 0, 9, 9)] * 2)[0] != native.READ
    assert native_crops(data + b"tail", [(0, 0, 9, 9)] * 2)[0] == native.READ


def test_too_many_pixels_are_not_read():
    out = np.zeros((2, 3, 8, 8), np.uint8)
    boxes, flips = [(0, 0, 9, 9)] * 2, [False] * 2
    assert native.cut_crops(encode_image(picture()), boxes, flips, out, 97 * 131) == native.READ
    assert native.cut_crops(encode_image(picture()), boxes, flips, out, 97 * 131 - 1) != native.READ
    assert native.read_size(encode_image(picture()), 97 * 131 - 1) is None


def digest_of_all_kernels():
    """Of crops and colours that go through every loop."""
    total = hashlib.sha256()
    for seed, (height, width, size) in enumerate([(97, 131, 33), (300, 80, 64), (40, 60, 50)]):
        data = encode_image(picture(height, width, seed))
        out, rows = np.zeros((2, 3, size, size), np.uint8), np.zeros((2, PARAMETERS), np.float32)
        for sample in range(24):
            make_crops(data, SPEC, 0, 0, sample, out, rows, augment=True)
            total.update(out)
            total.update(rows)
            for dtype in (torch.float32, torch.bfloat16):
                x = photometric.make_views(
                    torch.from_numpy(out), torch.from_numpy(rows), SPEC.mean, SPEC.std, dtype
                )
                total.update(x.view(torch.uint8).numpy())
    return total.hexdigest()


def test_every_instruction_set_gives_the_same_bits():
    here = (
        "import sys; sys.path[:0] = sys.argv[1:]; from tests.data.views import test_native as t; "
    )
    program = here + "print(t.digest_of_all_kernels())"
    expected = digest_of_all_kernels()
    root = str(Path(__file__).parents[3])
    for cpu in ("plain", "avx2", "avx512"):
        environment = {**os.environ, "MOCOV3_DS_CPU": cpu, "CUDA_VISIBLE_DEVICES": ""}
        run = subprocess.run(
            [sys.executable, "-c", program, root],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert run.stdout.split()[-1] == expected, cpu


def test_threads_do_not_disturb_each_other():
    images = [encode_image(picture(60 + 7 * i, 150 - 5 * i, seed=i)) for i in range(12)]

    def one(i):
        out, rows = np.zeros((2, 3, 40, 40), np.uint8), np.zeros((2, PARAMETERS), np.float32)
        make_crops(images[i % 12], SPEC, 0, 0, i, out, rows, augment=True)
        return out.tobytes() + rows.tobytes()

    alone = [one(i) for i in range(48)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(one, range(48))) == alone


def test_memory_is_given_back():
    """Thousands of good, damaged and large images: the process grows by less than one of them."""
    good, large = encode_image(picture(200, 250)), encode_image(picture(2000, 2400), quality=50)
    damaged = good[:1500] + bytes(300) + good[1800:]
    out, rows = np.zeros((2, 3, 32, 32), np.uint8), np.zeros((2, PARAMETERS), np.float32)

    def round_of(count):
        for i in range(count):
            for data in (good, damaged, good[:2000], b"\xff\xd8\xff"):
                native.make_crops(data, SPEC, (0, 0, i), out, rows, MOST, True)
        native.make_crops(large, SPEC, (0, 0, 0), out, rows, MOST, False)

    round_of(200)
    before = psutil.Process().memory_info().rss
    round_of(1500)
    assert psutil.Process().memory_info().rss - before < 4 << 20


@pytest.mark.skipif(
    not shutil.which("g++") or not Path("/usr/include/jpeglib.h").exists(),
    reason="needs g++ and libjpeg's headers",
)
def test_our_declarations_agree_with_libjpegs_headers(tmp_path):
    names = {
        "error": "err",
        "source": "src",
        "width": "image_width",
        "components": "num_components",
        "stored_colours": "jpeg_color_space",
        "colours": "out_color_space",
        "dct_method": "dct_method",
        "fancy_upsampling": "do_fancy_upsampling",
        "output_width": "output_width",
        "output_channels": "output_components",
        "row": "output_scanline",
    }
    checks = [
        f"static_assert(offsetof(jpeg::Decompressor, {ours}) == "
        f"offsetof(jpeg_decompress_struct, {theirs}));"
        for ours, theirs in names.items()
    ]
    checks += [
        "static_assert(JPEG_LIB_VERSION != jpeg::HOOKED_VERSION || sizeof(void*) != 8 || "
        "(offsetof(jpeg_decompress_struct, entropy) == jpeg::ENTROPY_OFFSET && "
        "sizeof(jpeg_decompress_struct) == jpeg::HOOKED_SIZE));",
        "static_assert(offsetof(jpeg::ErrorManager, parameters) == "
        "offsetof(jpeg_error_mgr, msg_parm));",
        "static_assert(sizeof(jpeg::ErrorManager) >= sizeof(jpeg_error_mgr));",
        "static_assert(sizeof(jpeg::Decompressor) >= sizeof(jpeg_decompress_struct));",
        "static_assert(int(jpeg::GREY) == JCS_GRAYSCALE && int(jpeg::RGB) == JCS_RGB && "
        "int(jpeg::YCC) == JCS_YCbCr && int(jpeg::RGBX) == JCS_EXT_RGBX);",
    ]
    program = tmp_path / "layout.cpp"
    headers = '#include <cstdio>\n#include <jpeglib.h>\n#include "jpeg_library.h"\n'
    program.write_text(headers + "\n".join(checks) + "\nint main() {}\n")
    subprocess.run(
        [
            "g++",
            "-std=c++17",
            "-Wno-invalid-offsetof",
            f"-I{SOURCES}",
            "-c",
            program,
            "-o",
            tmp_path / "layout.o",
        ],
        check=True,
    )


def test_the_build_made_a_library_for_this_interpreter():
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    assert (SOURCES / f"_library{suffix}").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("compiler", "editable"), [("/bin/false", False), ("", True), ("", False)])
def test_the_package_installs_with_and_without_a_compiler(editable, compiler, tmp_path):
    """Into a folder of its own and in place; a missing compiler costs speed alone."""
    if not compiler and not shutil.which("g++"):
        pytest.skip("needs g++")
    root, copy = Path(__file__).parents[3], tmp_path / "copy"
    for part in ("mocov3_ds", "data_prep"):
        shutil.copytree(root / part, copy / part, ignore=shutil.ignore_patterns("*.so"))
    for part in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / part, copy)
    environment = os.environ | ({"CC": compiler, "CXX": compiler} if compiler else {})
    place = tmp_path / "place"
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    build = Path(sys.executable).parent / "pip"
    pip = [build, "--python", place / "bin" / "python", "install", "--no-deps"]
    tools = tmp_path / "tools"
    shutil.copytree(Path(setuptools.__file__).parent, tools / "setuptools")
    environment["PYTHONPATH"] = str(tools)
    extra = ["-e", copy] if editable else [copy]
    subprocess.run([*pip, "--no-build-isolation", *extra], env=environment, check=True)
    where = copy if editable else next((place / "lib").glob("python*/site-packages"))
    assert (where / "mocov3_ds" / "data" / "views" / "native" / "__init__.py").exists()
    built = list((where / "mocov3_ds" / "data" / "views" / "native").glob("_library*.so"))
    assert len(built) == (0 if compiler else 1)
