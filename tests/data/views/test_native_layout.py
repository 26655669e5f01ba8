"""Loading the extension: one that is missing is a reason, one from other sources is refused."""

import ctypes
import shutil
import subprocess
import sysconfig
from enum import IntEnum
from pathlib import Path

import pytest

from mocov3_ds.data.views import decode, native
from mocov3_ds.data.views.spec import PARAMETERS, Column

SOURCES = Path(native.__file__).parent

pytestmark = pytest.mark.skipif(
    bool(decode.explain_absence("native")), reason="the extension cannot run here"
)


@pytest.fixture
def library_of(monkeypatch):
    """Lets the module load the library of another folder, as on a first use."""

    def use_folder(folder):
        monkeypatch.setattr(native, "colour_library", lambda: native.load_library(folder))
        native.open_jpeg_library.cache_clear()

    yield use_folder
    monkeypatch.undo()
    native.open_jpeg_library.cache_clear()


def test_a_missing_library_is_a_reason(library_of, tmp_path):
    library_of(tmp_path)
    assert not native.is_built()
    with pytest.raises(RuntimeError, match="was not built"):
        native.jpeg_library()
    assert "was not built" in decode.explain_absence("native")


def test_the_library_tells_what_python_expects():
    layout = native.expected_layout()
    assert layout["PARAMETERS"] == 10 and layout["SOLARISE"] == 9 and layout["DRAW_FACTORS"] == 29
    assert layout["sizeof Spec"] == 20 * 8 and layout["Crop.out"] == 64
    assert native.load_library(SOURCES)


def test_a_column_that_python_alone_has_is_refused(library_of, monkeypatch):
    library_of(SOURCES)
    monkeypatch.setattr(native, "PARAMETERS", PARAMETERS + 1)
    sentence = r"\(PARAMETERS is 10 there, 11 here\); build it again: pip install -e \."
    for first_use in (
        native.is_built,
        native.jpeg_library,
        lambda: decode.explain_absence("native"),
    ):
        with pytest.raises(ValueError, match=sentence):
            first_use()


def test_a_column_of_another_name_or_place_is_refused(monkeypatch):
    names = [column.name for column in Column]
    for changed in ([*names[:-1], "GAMMA"], [*names[:-2], names[-1], names[-2]]):
        columns = IntEnum("Column", changed, start=0)
        monkeypatch.setattr(native, "Column", columns)
        with pytest.raises(ValueError, match="build it again"):
            native.load_library(SOURCES)


def test_a_structure_of_another_form_is_refused(monkeypatch):
    class Longer(ctypes.Structure):
        _fields_ = (*native.Spec._fields_, ("gamma_p", ctypes.c_double))

    Longer.__name__ = "Spec"
    monkeypatch.setattr(native, "Spec", Longer)
    with pytest.raises(ValueError, match=r"Spec\.gamma_p is None there, 160 here"):
        native.load_library(SOURCES)


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("int mocov3_open_library;", "it is older"),
        (
            'extern "C" const char* mocov3_layout(int i, int* value)'
            '{ *value = 11; return i ? nullptr : "PARAMETERS"; }',
            "ATTEMPTS is None there, 10 here",
        ),
    ],
)
def test_a_library_from_other_sources_is_refused(library_of, source, message, tmp_path):
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    (tmp_path / "other.cpp").write_text(source)
    files = [tmp_path / "other.cpp", "-o", tmp_path / f"_library{suffix}"]
    subprocess.run(["g++", "-shared", "-fPIC", *files], check=True)
    library_of(tmp_path)
    with pytest.raises(ValueError, match=f"was built from other C.. sources .{message}.; build it"):
        native.is_built()
